"""The process: signals, locks, addresses, many readers, a full disk, an old database."""

import json
import os
import shutil
import signal
import sqlite3
import subprocess
import urllib.request
from contextlib import suppress
from pathlib import Path

import pytest

from tests.end_to_end.readers import read_at_once
from tests.end_to_end.server import Server
from tests.poc.service.conftest import ROUND as SERVICE_ROUND
from tests.waiting import until

VECTORS = Path(__file__).parents[1] / "vectors"
ROUND = SERVICE_ROUND | {
    "block_hash": "block_gamma",
    "block_height": 1,
    "batch_size": 8,
    "seq_len": 8,
}


def _refused(server: Server) -> str:
    """Start a command that must not start; return what it said."""
    server.start()
    assert server.wait(60) == 2
    said = server.log.read_text()
    assert "wanted:" in said
    assert "Traceback" not in said
    return said


@pytest.mark.slow
def test_a_node_serves_in_eight_bits(launch):
    server = launch("--dtype", "float8")
    server.post("/init/generate", ROUND)
    until(lambda: server.status()["total_checked"] > 0, 60)
    until(lambda: server.get("/api/v1/pow/snapshot")["model"], 60)
    assert server.get("/api/v1/pow/snapshot")["model"]["dtype"] == "float8"


@pytest.mark.slow
@pytest.mark.parametrize("drain", ["30", "0"])
def test_sigterm_in_a_round_leaves_it_to_the_next_start(launch, drain):
    """With no time to drain, the running batch is abandoned and computed again."""
    server = launch("--drain", drain)
    server.post("/init/generate", ROUND)
    reached = 0
    for _ in range(3):
        until(lambda reached=reached: server.status()["total_checked"] > reached, 30)
        assert server.terminate() == 0
        server.start()
        server.wait_for()
        found = server.status()
        assert (found["state"], found["error"]) == ("GENERATING", None)
        reached = found["total_checked"]
    until(lambda: server.status()["total_checked"] > reached, 30)
    server.post("/stop")
    with sqlite3.connect(server.data_dir / "service.sqlite3") as database:
        nonces = [row[0] for row in database.execute("SELECT nonce FROM records ORDER BY nonce")]
    database.close()
    assert nonces == list(range(server.status()["total_checked"]))


@pytest.mark.slow
def test_a_thousand_readers_at_once_get_an_answer(launch):
    server = launch()
    server.post("/init/generate", ROUND)
    until(lambda: server.status()["total_checked"] > 0, 30)
    before = server.status()["total_checked"]
    answers = read_at_once(server.port, "/api/v1/pow/status", 1000)
    assert [status for status, _ in answers] == [200] * 1000
    assert server.status()["state"] == "GENERATING"
    until(lambda: server.status()["total_checked"] > before, 30)


def test_other_addresses_need_a_key(tmp_path):
    server = Server(tmp_path, "--host", "0.0.0.0", model="reference:qwen3")
    assert "without a key" in _refused(server)
    assert not server.data_dir.exists()


def test_a_model_that_cannot_be_loaded_ends_the_process(tmp_path):
    assert str(tmp_path / "none") in _refused(Server(tmp_path, model=tmp_path / "none"))


def _mount(path: Path, size: str) -> bool:
    path.mkdir()
    return (
        subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(path)], check=False
        ).returncode
        == 0
    )


def _fill(path: Path) -> None:
    with suppress(OSError), path.open("wb", buffering=0) as file:
        while True:
            file.write(b"x" * 4096)


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
def test_a_full_disk_pauses_the_round_and_it_continues_when_there_is_room(
    tmp_path, small_checkpoint
):
    disk = tmp_path / "disk"
    if not _mount(disk, "2m"):
        pytest.skip("this machine does not let tests mount a disk")
    server = Server(disk, model=small_checkpoint)
    server.log = tmp_path / "server.log"
    ballast = disk / "ballast"
    try:
        server.start()
        server.wait_for()
        server.post("/init/generate", ROUND)
        until(lambda: server.status()["total_checked"] > 0, 30)
        _fill(ballast)
        until(lambda: server.status()["paused"] == "storage", 30)
        paused = server.status()
        assert paused["state"] == "GENERATING"
        assert server.get("/ready") == {"ready": True}
        status, _ = server.call("POST", "/api/v1/pow/phase/validate", {})
        assert status == 503
        ballast.unlink()
        until(lambda: server.status()["paused"] is None, 30)
        until(lambda: server.status()["total_checked"] > paused["total_checked"], 30)
        server.post("/stop")
        found = server.get("/api/v1/pow/status?after=-1&limit=10000")
        assert len(found["valid_nonces"]) == len(set(found["valid_nonces"])) == found["total_valid"]
        assert server.terminate() == 0
    finally:
        server.close()
        subprocess.run(["umount", str(disk)], check=False)


@pytest.mark.slow
def test_a_second_signal_is_not_needed_while_streams_are_open(launch):
    server = launch()
    stream = urllib.request.urlopen(f"{server.base}/api/v1/pow/events", timeout=10)
    try:
        assert b"retry" in stream.readline()
        os.kill(server.pid, signal.SIGTERM)
        assert server.wait(15) == 0
    finally:
        stream.close()


def test_a_database_of_the_first_version_opens(tmp_path):
    data = tmp_path / "data"
    data.mkdir(mode=0o700)
    shutil.copy(VECTORS / "first" / "service" / "service.sqlite3", data)
    before = json.loads((VECTORS / "first" / "service" / "status.json").read_text(encoding="utf-8"))
    server = Server(tmp_path, "--seq-len", "8", model="reference:qwen3")
    server.start()
    try:
        server.wait_for()
        now = server.status()
        for field in (
            "state",
            "valid_nonces",
            "valid_distances",
            "total_checked",
            "total_valid",
            "config",
        ):
            assert now[field] == before[field], field
    finally:
        server.close()
