"""Many processes, one proof: on the CPU, by hand and as torchrun starts them."""

import json
import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from assay.errors import ModelError, UsageError
from assay.models import Model, load_model
from assay.poc import Proof, Round, prove
from assay.poc.engines import joined, processes

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def start(rank: int, port: int, checkpoint: Path) -> "subprocess.Popen[str]":
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("two_processes.py")), str(checkpoint)],
        env=ENVIRONMENT | {name: str(value) for name, value in place.items()},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture(scope="module")
def scenes(small_checkpoint: Path) -> dict[str, object]:
    """What the first of two processes saw in each scene of two_processes.py."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with start(0, port, small_checkpoint) as first, start(1, port, small_checkpoint) as second:
        out, err = first.communicate(timeout=120)
        second.communicate(timeout=60)
    assert first.returncode == 0, err
    return json.loads(out)


@pytest.fixture(scope="module")
def alone(small_model: Model, round_: Round) -> Proof:
    return prove(small_model, round_, range(44), batch_size=8)


def test_two_processes_give_the_bits_of_one(scenes: dict[str, dict[str, object]], alone: Proof, small_model, round_):
    assert scenes["plain"]["values"] == alone.distances.tolist()
    assert scenes["plain"]["library"] == alone.header.fingerprint.library
    hardened = prove(small_model, replace(round_, preset="hardened"), range(44), batch_size=8)
    assert scenes["hardened"]["values"] == [record.vector.tobytes().hex() for record in hardened.records]


def test_the_error_of_any_process_ends_the_proof_and_nothing_else(scenes: dict[str, object]):
    assert scenes["failing"] == "OutOfMemory: no room on the second device"
    assert scenes["after the failure"] == scenes["plain"]


def test_two_processes_hold_one_model(scenes: dict[str, dict[str, object]], alone: Proof):
    spread = scenes["spread"]
    assert spread["digest"] == alone.header.digest
    assert spread["library"] == f"{alone.header.fingerprint.library}, tp 2"
    np.testing.assert_allclose(spread["values"], alone.distances, atol=2e-5, rtol=0)


def test_random_weights_are_the_same_when_they_are_spread(scenes, small_checkpoint: Path, round_: Round):
    model = load_model(small_checkpoint, weights="random-all", block_hash="b", dtype="float32", device="cpu")
    whole = prove(model, replace(round_, preset="artifact"), range(44), batch_size=8)
    assert scenes["spread, random"]["digest"] == whole.header.digest
    seen = np.array([np.frombuffer(bytes.fromhex(text), np.float16) for text in scenes["spread, random"]["values"]])
    wanted = np.array([record.vector for record in whole.records])
    np.testing.assert_allclose(seen.astype(np.float32), wanted.astype(np.float32), atol=2e-3, rtol=0)


def test_a_process_that_dies_is_named(scenes: dict[str, str]):
    assert scenes["dying"].startswith("ResourceError: a process of this proof has gone")


def test_torchrun_writes_one_file_and_goes_on_where_it_was_stopped(
    alone: Proof, small_checkpoint: Path, tmp_path: Path
):
    path, whole = tmp_path / "two.jsonl", tmp_path / "one.jsonl"
    shape = ("--seq-len", "16", "--batch-size", "8", "--device", "cpu", "--dtype", "float32", "--nonces", "0:44")
    round = ("--block-hash", "block_alpha", "--public-key", "node_A", "--model", str(small_checkpoint))
    replace_model = replace(alone.header, round=replace(alone.round, model=str(small_checkpoint)))
    Proof.build(replace_model, alone.records, 1.0).save(whole)
    records = whole.read_text().splitlines()[:-1]
    # What an interrupted run leaves: the header, two batches and a torn line.
    partial = path.with_name("two.jsonl.partial")
    partial.write_text("".join(f"{line}\n" for line in records[:17]) + '{"nonce":16,"dist')
    command = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "assay", "poc", "prove")
    made = subprocess.run(
        [*command, *round, *shape, "-o", str(path)], env=ENVIRONMENT, capture_output=True, text=True, timeout=120
    )
    assert made.returncode == 0, made.stderr
    assert made.stdout.count("nonces per second") == 1, "only the first process reports"
    assert path.read_text().splitlines()[:-1] == records
    assert Proof.load(path).footer.sha256 == alone.footer.sha256
    assert not partial.exists()


def test_processes_that_cannot_be_divided_are_refused(monkeypatch: pytest.MonkeyPatch):
    assert processes() == 1
    for name, value in {"RANK": "0", "WORLD_SIZE": "3", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    assert processes() == 3
    with pytest.raises(UsageError, match="--tensor-parallel 2 of 3 processes"), joined(tensor_parallel=2):
        pass
    with pytest.raises(UsageError, match="under torchrun"), joined(device="cuda:1"):
        pass


def test_models_that_cannot_be_cut_are_refused(small_model: Model):
    from types import SimpleNamespace

    from assay.models._sharded import shard

    with pytest.raises(UsageError, match="num_key_value_heads 2 over 4 devices"):
        shard(small_model.module, SimpleNamespace(size=lambda: 4))
    planless = SimpleNamespace(tp_plan={"lm_head": "colwise"}, base_model_prefix="model", config=None)
    with pytest.raises(ModelError, match="over 2 devices"):
        shard(planless, SimpleNamespace(size=lambda: 2))
