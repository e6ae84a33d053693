"""A measurement that is killed at random moments measures nothing twice, and gives the same law."""

import multiprocessing as mp
import random
import signal
import time
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import pytest

from assay.cli import run
from tests.end_to_end.server import PRELOAD, run_forked
from tests.usual import tries
from tests.waiting import until

KILLS = tries(10, 3)
SHAPE = ("--preset", "poc-2.0", "--seq-len", "16", "--dtype", "bfloat16,float32", "--device", "cpu")


def command(model: Path, output: Path) -> list[str]:
    """Words that measure the small checkpoint in two formats, 6144 nonces in all."""
    return ["poc", "calibrate", "--model", str(model), *SHAPE, "-o", str(output)]


def kept(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Every file of a measurement: its inode, and the whole lines that are measured."""
    files = {}
    for path in sorted(folder.glob("*.json*")):
        try:
            content = path.read_bytes()
            inode = path.stat().st_ino
        except FileNotFoundError:  # it was finished in this moment, and has its last name now
            continue
        # The last line of a proof says how long it took, and is written again after a kill.
        lines = content[: content.rfind(b"\n") + 1].splitlines(keepends=True)
        whole = b"".join(line for line in lines if b'"sha256"' not in line)
        files[path.name.removesuffix(".partial")] = (inode, whole)
    return files


def size(folder: Path) -> int:
    """Bytes of all files of a measurement."""
    return sum(len(content) for _, content in kept(folder).values())


def start(words: list[str], log: Path) -> ForkServerProcess:
    """Start a command in a process that is forked from one that has imported everything."""
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    process = context.Process(target=run_forked, args=(words, str(log)))
    process.start()
    return process


@pytest.mark.kill
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_kills_repeat_nothing_and_change_no_bit(tmp_path, small_checkpoint):
    undisturbed = tmp_path / "undisturbed.json"
    assert run(command(small_checkpoint, undisturbed)) == 0
    rng = random.Random(5)
    output = tmp_path / "law.json"
    folder = tmp_path / "law.json.part"
    log = tmp_path / "log"
    words = command(small_checkpoint, output)
    before: dict[str, tuple[int, bytes]] = {}
    for _ in range(KILLS):
        begun = size(folder)
        child = start(words, log)
        try:
            until(lambda begun=begun: size(folder) > begun, 300, pause=0.01)
            time.sleep(rng.uniform(0.0, 0.5))
        finally:
            child.kill()
            child.join()
        assert child.exitcode == -signal.SIGKILL, f"it was not measuring: {log.read_text()}"
        after = kept(folder)
        for name, (inode, lines) in before.items():
            assert after[name][0] == inode, "a file was begun again"
            assert after[name][1].startswith(lines), "lines were written again"
        assert size(folder) > begun
        before = after
    last = start(words, log)
    last.join()
    assert last.exitcode == 0, log.read_text()
    assert output.read_bytes() == undisturbed.read_bytes()
    assert not folder.exists()
