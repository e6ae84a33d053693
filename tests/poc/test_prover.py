"""The prover: batch invariance, resuming, and what it refuses."""

import copy
import itertools
import resource
import signal
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from assay.errors import (
    BadWeights,
    ModelError,
    OutOfMemory,
    ProofFormatError,
    StorageError,
    UsageError,
)
from assay.poc import HFEngine, Proof, Round, prove, verify
from assay.poc.protocol.pipelines import FORWARD
from tests.docs.shell import ENVIRONMENT
from tests.wordings import refuses


def distances(proof: Proof) -> dict[int, object]:
    return {r.nonce: r.distance if r.vector is None else r.vector.tobytes() for r in proof.records}


@pytest.mark.parametrize("preset", FORWARD)
def test_a_nonce_has_the_same_bits_wherever_it_stands(preset: str, small_model, round_: Round):
    round = replace(round_, preset=preset)
    engine = HFEngine(small_model, batch_size=8, seq_len=16)
    whole = distances(prove(small_model, round, range(19), engine=engine))
    alone = distances(prove(small_model, round, [7], engine=engine))
    moved = distances(prove(small_model, round, [0, 3, 7, 11, 18], engine=engine))
    last = distances(prove(small_model, round, range(7, 15), engine=engine))
    for other in (alone, moved, last):
        assert {n: whole[n] for n in other if n in whole} == {
            n: d for n, d in other.items() if n in whole
        }


@pytest.mark.parametrize(
    ("batch_size", "seq_len"), [(2, 5), (3, 2), (5, 16), (6, 1), (7, 33), (32, 16), (11, 1)]
)
def test_odd_shapes_keep_a_row_s_bits(batch_size: int, seq_len: int, small_model, round_: Round):
    round = replace(round_, seq_len=seq_len)
    engine = HFEngine(small_model, batch_size=batch_size, seq_len=seq_len)
    whole = distances(prove(small_model, round, range(2 * engine.batch_size + 1), engine=engine))
    for start in (1, engine.batch_size - 1):
        shifted = distances(
            prove(small_model, round, range(start, start + engine.batch_size), engine=engine)
        )
        assert shifted == {n: whole[n] for n in shifted}


def test_nonces_of_any_kind_are_taken(small_model, round_: Round, proof: Proof):
    for nonces in (
        np.arange(3),
        [np.uint8(0), 1, np.int64(2)],
        (n for n in range(3)),
        {0: "a", 1: "b", 2: "c"},
    ):
        made = prove(small_model, round_, nonces, batch_size=8)
        assert [record.nonce for record in made.records] == [0, 1, 2]
        assert made.distances.tolist() == proof.distances[:3].tolist()


def test_streaming_to_a_file_gives_the_same_proof(
    small_model, round_: Round, proof: Proof, tmp_path: Path
):
    seen = []
    path = tmp_path / "proof.jsonl"
    streamed = prove(
        small_model,
        round_,
        range(40),
        batch_size=8,
        output=path,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert streamed.footer.sha256 == proof.footer.sha256
    assert Proof.load(path).footer == streamed.footer
    assert seen == [(0, 40), (8, 40), (16, 40), (24, 40), (32, 40), (40, 40)]
    assert list(tmp_path.iterdir()) == [path]


class OneBatchShort:
    """An engine whose stream ends a batch early, or whose last batch lacks a row."""

    def __init__(self, engine: HFEngine, rows_of_the_last: int = 0) -> None:
        self._engine = engine
        self._rows = rows_of_the_last

    def __getattr__(self, name: str):
        return getattr(self._engine, name)

    def run(self, inputs, pipeline, claimed_MN=None):
        *whole, last = self._engine.run(inputs, pipeline, claimed_MN)
        yield from whole
        if self._rows:
            yield {name: values[: self._rows] for name, values in last.items()}


@pytest.mark.parametrize("rows_of_the_last", [0, 7])
def test_an_engine_that_ends_early_gives_no_proof_and_no_verdict(
    rows_of_the_last: int, small_model, round_: Round, proof: Proof, tmp_path: Path
):
    short = OneBatchShort(HFEngine(small_model, batch_size=8, seq_len=16), rows_of_the_last)
    with pytest.raises(ModelError, match=f"{rows_of_the_last} results for a batch of 8 nonces"):
        prove(small_model, round_, range(40), engine=short, output=tmp_path / "proof.jsonl")
    assert [path.name for path in tmp_path.iterdir()] == ["proof.jsonl.partial"]
    with pytest.raises(ModelError, match=f"{rows_of_the_last} results for a batch of 8 nonces"):
        verify(proof, small_model, engine=short, sample=40, expect=round_)
    with refuses(UsageError, "an engine that ends early gives no proof and no verdict"):
        Proof.build(proof.header, proof.records[:-1], 1.0)


class Stop(Exception):
    """Raised by a test in the middle of a proof."""


@pytest.fixture
def interrupted(small_model, round_: Round, tmp_path: Path) -> Path:
    """The file of a proof of 40 nonces that was stopped after 16, with its partial file beside
    it.
    """

    def progress(done: int, total: int) -> None:
        if done >= 16:
            raise Stop

    path = tmp_path / "proof.jsonl"
    with pytest.raises(Stop):
        prove(small_model, round_, range(40), batch_size=8, output=path, progress=progress)
    assert not path.exists()
    return path


@pytest.mark.parametrize("torn", ["", '{"nonce":16,"dist', "garbage\n"])
def test_resuming_gives_the_bytes_of_an_uninterrupted_run(
    torn: str, small_model, round_, proof, interrupted: Path
):
    partial = interrupted.with_name("proof.jsonl.partial")
    whole = interrupted.with_name("whole.jsonl")
    assert len(partial.read_text().splitlines()) == 17
    with partial.open("a") as file:
        file.write(torn)
    prove(small_model, round_, range(40), batch_size=8, output=interrupted)
    proof.save(whole)
    assert interrupted.read_text().splitlines()[:-1] == whole.read_text().splitlines()[:-1]


def test_a_run_that_died_before_the_rename_ends_well(small_model, round_, proof, tmp_path: Path):
    path = tmp_path / "proof.jsonl"
    partial = tmp_path / "proof.jsonl.partial"
    proof.save(path)
    path.rename(partial)
    prove(small_model, round_, range(40), batch_size=8, output=path)
    assert Proof.load(path).footer.sha256 == proof.footer.sha256


def test_resuming_another_round_or_an_edited_file_is_refused(
    small_model, round_, interrupted: Path
):
    with refuses(UsageError, "resuming another round or an edited file is refused"):
        prove(
            small_model,
            replace(round_, block_hash="other"),
            range(40),
            batch_size=8,
            output=interrupted,
        )
    partial = interrupted.with_name("proof.jsonl.partial")
    partial.write_text(partial.read_text().replace('"nonce":9', '"nonce":99'))
    with refuses(ProofFormatError, "resuming another round or an edited file is refused, 2"):
        prove(small_model, round_, range(40), batch_size=8, output=interrupted)


def killable(checkpoint: Path, output: Path) -> list[str]:
    """A proof that takes a few seconds, as a command."""
    command = ["assay", "poc", "prove", "--model", str(checkpoint), "--device", "cpu"]
    command += [
        "--block-hash",
        "b",
        "--public-key",
        "k",
        "--nonces",
        "0:800",
        "--seq-len",
        "64",
        "--batch-size",
        "16",
    ]
    return [*command, "-o", str(output)]


def hear_sigint() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.fixture(scope="module")
def uninterrupted(
    small_checkpoint: Path, fork_server: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    path = tmp_path_factory.mktemp("uninterrupted") / "whole.jsonl"
    command = [*fork_server, *killable(small_checkpoint, path)]
    subprocess.run(command, env=ENVIRONMENT, capture_output=True, check=True)
    return path


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_killed_command_leaves_a_file_to_resume(
    number,
    small_checkpoint: Path,
    fork_server: tuple[str, ...],
    uninterrupted: Path,
    tmp_path: Path,
):
    path = tmp_path / "proof.jsonl"
    partial = tmp_path / "proof.jsonl.partial"
    command = [*fork_server, *killable(small_checkpoint, path)]
    # Where the tests run in the background of a shell, SIGINT is ignored, and children inherit
    # that.
    process = subprocess.Popen(
        command, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True, preexec_fn=hear_sigint
    )
    while not partial.exists() or len(partial.read_bytes().splitlines()) < 100:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    process.send_signal(number)
    stderr = process.communicate(timeout=60)[1]
    assert process.returncode == {signal.SIGINT: 130, signal.SIGTERM: 143}.get(number, -number)
    assert "Traceback" not in stderr
    assert not path.exists()
    assert 100 <= len(partial.read_text().splitlines()) < 800
    again = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr
    assert path.read_text().splitlines()[:-1] == uninterrupted.read_text().splitlines()[:-1]
    assert Proof.load(path).footer.sha256 == Proof.load(uninterrupted).footer.sha256


def test_an_engine_and_another_batch_size_are_refused(small_model, round_: Round):
    """Which of the two counted was not said: the engine's did."""
    engine = HFEngine(small_model, batch_size=4, seq_len=16)
    with refuses(UsageError, "an engine and another batch size are refused"):
        prove(small_model, round_, range(8), batch_size=8, engine=engine)
    assert (
        prove(
            small_model, round_, range(8), batch_size=4, engine=engine
        ).header.fingerprint.batch_size
        == 4
    )
    assert prove(small_model, round_, range(8), engine=engine).header.fingerprint.batch_size == 4
    assert prove(small_model, round_, range(8)).header.fingerprint.batch_size == 32


def test_what_cannot_run_is_refused(small_model, round_: Round):
    with refuses(OutOfMemory, "what cannot run is refused"):
        HFEngine(changed(small_model, claim_width), batch_size=65_536, seq_len=128)
    for wrong in (0, 8.0, "8", True, np.int64(8)):
        with refuses(UsageError, "what cannot run is refused, 2"):
            HFEngine(small_model, batch_size=wrong)
    for empty in ([], range(0), 64, None):
        with refuses(UsageError, "what cannot run is refused, 3"):
            prove(small_model, round_, empty)
    for endless in (range(2**70), itertools.count()):
        with refuses(UsageError, "what cannot run is refused, 4"):
            prove(small_model, round_, endless)
    with refuses(UsageError, "what cannot run is refused, 5"):
        prove(small_model, round_, [3, 2])
    with refuses(UsageError, "what cannot run is refused, 6"):
        prove(small_model, round_, range(4), engine=HFEngine(small_model, batch_size=8, seq_len=32))


def changed(model, change):
    """A copy of the model whose module a function has changed."""
    module = copy.deepcopy(model.module)
    with torch.no_grad():
        change(module)
    return replace(model, module=module)


def claim_width(module) -> None:
    """A configuration that claims a wide model over small weights: only the estimate is asked."""
    module.config.intermediate_size = (
        1_000_000  # a row of it fits into a small machine, and the batch into none
    )


def failing(error: Exception):
    def forward(*_, **__):
        raise error

    return lambda module: setattr(module.model, "forward", forward)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (
            lambda module: module.model.norm.weight.fill_(float("nan")),
            BadWeights,
            "NaN or infinity",
        ),
        (
            lambda module: module.model.norm.weight.zero_(),
            BadWeights,
            "NaN or infinite",
        ),  # states without a direction
        (
            failing(TypeError("unexpected keyword")),
            ModelError,
            "Qwen3ForCausalLM\\) does not run: TypeError",
        ),
        (
            failing(RuntimeError("DefaultCPUAllocator: can't allocate memory")),
            OutOfMemory,
            "ran out of memory",
        ),
    ],
)
def test_a_model_that_cannot_run_is_an_error(
    change, error, words: str, small_model, round_: Round, tmp_path: Path
):
    with pytest.raises(error, match=words):
        prove(changed(small_model, change), round_, range(4), output=tmp_path / "proof.jsonl")


def test_a_full_disk_is_one_clear_error(small_model, round_: Round, tmp_path: Path):
    """A file size limit stands for the full disk: the write fails in the middle."""
    path = tmp_path / "proof.jsonl"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1600, hard))
    try:
        with refuses(StorageError, "a full disk is one clear error"):
            prove(small_model, round_, range(40), batch_size=8, output=path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, old)
    assert not path.exists()
    prove(small_model, round_, range(40), batch_size=8, output=path)
    assert len(Proof.load(path).records) == 40
