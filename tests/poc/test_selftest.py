"""The self-test of an engine: it finds what changes bits, by how much, and says nothing else."""

from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from assay import stats
from assay.errors import ModelError, OutOfMemory, UsageError
from assay.poc import HFEngine, Noise, Record, Round
from assay.poc.launch import Launch
from assay.poc.selftest import SelfTest, SettingResult, compare, run_selftest
from tests.models.storing import make_mixture

ROUND = Round(block_hash="b", public_key="k", seq_len=16)
ORDERS = ("again", "other neighbours", "alone in the batch", "other places in the batch")


def outcomes(result):
    return {row.setting: row.outcome for row in result.comparisons}


@pytest.mark.no_law
def test_the_order_of_nonces_changes_no_bit_of_a_dense_model(small_checkpoint):
    launch = Launch(model=str(small_checkpoint), device="cpu", dtype="float32")
    seen = []
    result = run_selftest(
        launch, ROUND, batch_size=8, nonces=12, progress=lambda *at: seen.append(at)
    )
    found = outcomes(result)
    assert {found[name] for name in ORDERS} == {"same bits"}
    assert found["batches of 2"] == "same bits"
    assert "eager attention" in found
    assert result.engine["batch_size"] == 8
    assert seen[-1][0] == seen[-1][1] > 1


@pytest.mark.slow
@pytest.mark.no_law
def test_the_neighbours_change_bits_of_a_mixture_in_float32(tmp_path):
    """An expert sees as many rows as the router sends to it."""
    path = make_mixture("qwen3-moe", tmp_path / "mixture", num_experts=32, num_experts_per_tok=2)
    launch = Launch(model=str(path), device="cpu", dtype="float32")
    result = run_selftest(launch, ROUND, batch_size=8, nonces=32)
    rows = {row.setting: row for row in result.comparisons}
    assert rows["again"].outcome == "same bits"
    beside = rows["other neighbours"]
    assert beside.outcome == "no law"
    assert 0 < beside.changed <= beside.nonces == 32
    assert 0 < beside.bits < 8
    assert beside.reason
    assert result.exit_code == 2


def vectors(values):
    return [Record(n, vector=np.array(row, np.float16)) for n, row in enumerate(values)]


NOISE = Noise(stats.LogNoise(np.log(0.01), 0.3))


@pytest.mark.parametrize(
    ("moved", "outcome"), [(0.0, "same bits"), (0.01, "within the law"), (0.5, "beyond the law")]
)
def test_a_change_is_judged_by_the_law(moved, outcome):
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((40, 12))
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    shifts = rng.standard_normal((40, 12))
    shifts *= moved / np.linalg.norm(shifts, axis=1, keepdims=True)
    row = compare("x", vectors(rows), vectors(rows + shifts), NOISE)
    assert row.outcome == outcome
    assert row.multiple == pytest.approx(row.largest / 0.01)
    assert (row.changed > 0) == (moved > 0)


@pytest.mark.parametrize(("values", "bits"), [((0.0, -0.0), 0), ((1.0, 1.0), 0), ((0.5, -0.5), 15)])
def test_bits_of_vectors_count_steps_of_the_format(values, bits):
    first, second = (vectors([[value] * 12]) for value in values)
    assert compare("x", first, second, None).bits == bits


@pytest.mark.parametrize(("steps", "bits"), [(1, 1), (2, 2), (3, 2), (4, 3), (7, 3), (8, 4)])
def test_bits_are_the_low_ones_that_differ(steps, bits):
    one = np.ones(12, np.float16)
    other = (one.view(np.int16) + steps).view(np.float16)
    row = compare("x", [Record(0, vector=one)], [Record(0, vector=other)], None)
    assert row.bits == bits
    distance = np.float32(1.4)
    moved = float(str((np.array([distance]).view(np.int32) + steps).view(np.float32)[0]))
    first = [Record(0, distance=float(str(distance)))]
    assert compare("x", first, [Record(0, distance=moved)], None).bits == bits


@pytest.mark.parametrize(
    ("found", "code"),
    [
        (["same bits"], 0),
        (["same bits", "within the law", "not run"], 0),
        (["same bits", "no law"], 2),
        (["no law", "beyond the law"], 1),
    ],
)
def test_the_exit_code_is_that_of_the_worst_setting(found, code):
    rows = tuple(SettingResult(setting="x", outcome=outcome) for outcome in found)
    assert SelfTest(comparisons=rows, engine={}).exit_code == code


def test_a_model_that_cannot_be_loaded_is_no_row(tmp_path: Path):
    with pytest.raises(ModelError):
        run_selftest(Launch(model=str(tmp_path / "none"), device="cpu"), ROUND)


def test_no_nonces_are_refused_before_a_model_is_loaded(tmp_path: Path):
    with pytest.raises(UsageError):
        run_selftest(Launch(model=str(tmp_path / "none"), device="cpu"), ROUND, nonces=0)


def test_every_switch_of_vllm_has_an_engine_or_a_reason(small_model, monkeypatch):
    """Without vLLM: the options that its engine is given, where two of them cannot run."""
    asked = []

    @contextmanager
    def stand_in(launch, dtype, *, batch_size, seq_len, frame, options):
        asked.append((batch_size, dict(options)))
        if options["enable_prefix_caching"]:
            raise OutOfMemory("a device without room", wanted="room", do="free some")
        if "speculative_config" in options:
            raise UsageError("vLLM with speculation", wanted="none", do="leave it out")
        yield small_model, HFEngine(small_model, batch_size=batch_size, seq_len=seq_len)

    monkeypatch.setattr("assay.poc.launch.vllm_engine", stand_in)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    launch = Launch(model="small", engine="vllm")
    result = run_selftest(launch, ROUND, batch_size=8, nonces=8)
    rows = {row.setting: row for row in result.comparisons}
    assert [name for name, row in rows.items() if row.outcome == "not run"] == [
        "prefix cache",
        "speculative decoding",
    ]
    assert rows["speculative decoding"].reason == "vLLM with speculation"
    assert rows["chunked prefill"].outcome == "same bits"
    assert result.exit_code == 0
    usual, smaller, requests, cache, chunks, _, divided = (options for _, options in asked)
    assert [size for size, _ in asked] == [8, 2, 8, 8, 8, 8, 8]
    assert divided == usual | {"tensor_parallel_size": 2}
    assert usual == smaller
    assert "path" not in usual
    assert requests["path"] == "requests"
    assert (usual["enable_prefix_caching"], cache["enable_prefix_caching"]) == (False, True)
    assert chunks["max_num_batched_tokens"] < ROUND.seq_len < usual["max_num_batched_tokens"]


def test_an_engine_that_does_not_start_in_its_usual_setting_is_an_error(monkeypatch):
    def refuse(*_, **__):
        raise ModelError("vLLM does not start", wanted="an engine", do="see its log")

    monkeypatch.setattr("assay.poc.launch.vllm_engine", refuse)
    with pytest.raises(ModelError):
        run_selftest(Launch(model="small", engine="vllm"), ROUND)
