"""Many processes, one proof: on the CPU, by hand and as torchrun starts them."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from assay.errors import AssayError, ModelError, UsageError
from assay.models import Model, load_model
from assay.models.load import _shard
from assay.poc import Proof, Round, prove
from assay.poc.engines.hf.parallel import joined, processes
from tests.end_to_end.server import free_port


def start(rank: int, ports: list[int], *arguments: Path) -> "subprocess.Popen[str]":
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": ports[0]}
    program = Path(__file__).with_name("two_processes.py")
    return subprocess.Popen(
        [sys.executable, str(program), *map(str, arguments), str(ports[1])],
        env={**os.environ, "OMP_NUM_THREADS": "1"} | {name: str(value) for name, value in place.items()},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture(scope="module")
def alone(small_model: Model, round_: Round, small_checkpoint: Path) -> Proof:
    """A proof of 44 nonces, six batches of which the last is short, by one process."""
    return prove(small_model, replace(round_, model=str(small_checkpoint)), range(44), batch_size=8)


@pytest.fixture(scope="module")
def output(alone: Proof, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the command line writes, with what an interrupted run left: two batches and a torn line."""
    path = tmp_path_factory.mktemp("two") / "proof.jsonl"
    alone.save(path.with_name("alone.jsonl"))
    lines = path.with_name("alone.jsonl").read_text().splitlines()[:17]
    partial = "".join(f"{line}\n" for line in lines) + '{"nonce":16,"dist'
    path.with_name("proof.jsonl.partial").write_text(partial)
    return path


@pytest.fixture(scope="module")
def scenes(small_checkpoint: Path, output: Path) -> dict[str, Any]:
    """What the first of two processes saw in each scene of two_processes.py."""
    ports = [free_port(), free_port()]
    given = (small_checkpoint, output)
    with start(0, ports, *given) as first, start(1, ports, *given) as second:
        out, err = first.communicate(timeout=200)
        second_out, _ = second.communicate(timeout=60)
    assert first.returncode == 0, err
    assert second_out == "", "only the first process reports"
    table, _, last = out.strip().rpartition("\n")
    assert "nonces per second" in table
    return json.loads(last)


def test_the_command_line_writes_one_file_and_goes_on_where_it_was_stopped(scenes, alone: Proof, output: Path):
    assert scenes["command line"] == 0
    assert output.read_text().splitlines()[:-1] == output.with_name("alone.jsonl").read_text().splitlines()[:-1]
    assert Proof.load(output).footer.sha256 == alone.footer.sha256
    assert not output.with_name("proof.jsonl.partial").exists()


def test_two_processes_give_the_bits_of_one(scenes: dict[str, Any], alone: Proof, small_model, round_):
    assert scenes["plain"]["values"] == alone.distances.tolist()
    assert scenes["plain"]["library"] == alone.header.fingerprint.as_dict()["library"]
    hardened = prove(small_model, replace(round_, preset="hardened"), range(44), batch_size=8)
    assert scenes["hardened"]["values"] == [record.vector.tobytes().hex() for record in hardened.records]


def test_the_error_of_any_process_ends_the_proof_and_nothing_else(scenes: dict[str, Any]):
    assert scenes["failing"] == scenes["failing at the end"] == "ModelError: the second device does not run"
    assert scenes["after the failure"] == scenes["plain"]


def test_two_processes_hold_one_model(scenes: dict[str, Any], alone: Proof):
    spread = scenes["spread"]
    assert spread["digest"] == alone.header.digest
    assert spread["library"] == f"{alone.header.fingerprint.as_dict()['library']}, tp 2"
    np.testing.assert_allclose(spread["values"], alone.distances, atol=2e-5, rtol=0)


def test_random_weights_are_the_same_when_they_are_spread(scenes, small_checkpoint: Path, round_: Round):
    model = load_model(small_checkpoint, weights="random-all", block_hash="b", dtype="float32", device="cpu")
    whole = prove(model, replace(round_, preset="artifact"), range(44), batch_size=8)
    assert scenes["spread, random"]["digest"] == whole.header.digest
    seen = np.array([np.frombuffer(bytes.fromhex(text), np.float16) for text in scenes["spread, random"]["values"]])
    wanted = np.array([record.vector for record in whole.records])
    np.testing.assert_allclose(seen.astype(np.float32), wanted.astype(np.float32), atol=2e-3, rtol=0)


def test_a_process_that_dies_is_named(scenes: dict[str, Any]):
    assert scenes["dying"].startswith("ResourceError: a process of this proof has gone")


@pytest.mark.parametrize(
    ("changed", "asked", "words"),
    [
        ({"WORLD_SIZE": "3"}, {"tensor_parallel": 2}, "--tensor-parallel 2 of 3 processes"),
        ({}, {"device": "cuda:1"}, "under torchrun"),
        ({"RANK": "99", "WORLD_SIZE": "100", "LOCAL_RANK": "99"}, {"device": "cuda"}, "cuda:99"),
        ({"LOCAL_RANK": None}, {}, "no LOCAL_RANK"),
        ({"RANK": "first"}, {}, "RANK='first'"),
        ({"WORLD_SIZE": "many"}, {}, "WORLD_SIZE='many'"),
        ({"MASTER_PORT": None}, {"device": "cpu"}, "the processes did not meet: .*MASTER_PORT"),
    ],
)
def test_processes_that_cannot_work_together_are_refused(changed, asked, words, monkeypatch: pytest.MonkeyPatch):
    given = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": None}
    for name, value in (given | changed).items():
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)
    with pytest.raises(AssayError, match=words), joined(**asked):
        pass


def test_torchrun_says_how_many_processes_there_are(monkeypatch: pytest.MonkeyPatch):
    assert processes() == 1
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert processes() == 3
    monkeypatch.setenv("WORLD_SIZE", "")
    with pytest.raises(UsageError, match="no WORLD_SIZE"):
        processes()


def test_models_that_cannot_be_cut_are_refused(small_model: Model):
    with pytest.raises(UsageError, match="num_key_value_heads 2 over 4 devices"):
        _shard(small_model.module, SimpleNamespace(size=lambda: 4))
    planless = SimpleNamespace(tp_plan={"lm_head": "colwise"}, base_model_prefix="model", config=None)
    with pytest.raises(ModelError, match="over 2 devices"):
        _shard(planless, SimpleNamespace(size=lambda: 2))
