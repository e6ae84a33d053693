"""The chain's decode proof on vLLM: the points and margins of transformers, beside one another in
chunks.
"""

import os
from contextlib import closing

import numpy as np
import pytest

from assay import poc
from assay.errors import UsageError
from assay.models import load_model
from assay.poc import HFEngine
from assay.poc.vllm.vllm_engine import VLLMEngine
from tests.vllm.conftest import ONE_GPU, SMALL_ENGINE, make_round
from tests.wordings import refuses

pytestmark = pytest.mark.usefixtures("v1_runner", "forked_engines")

STEPS = 24
PROMPT = 32
PRESET = f"chain-decode-{STEPS}"
OPTIONS = {"max_model_len": 96, "max_num_batched_tokens": 48, "max_num_seqs": 16} | SMALL_ENGINE
SHAPE = {"batch_size": 8, "seq_len": PROMPT}


@pytest.fixture(scope="module")
def v1_runner():
    """On a GPU vLLM takes the V2 runner by itself."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_USE_V2_MODEL_RUNNER", "0")
        yield


@pytest.fixture(scope="module")
def engine(v1_runner):
    # A step takes one prompt and a half, so prompts come in chunks beside chains that run.
    with VLLMEngine(
        "reference:qwen3", dtype="float32", in_flight=16, enforce_eager=True, **SHAPE, **OPTIONS
    ) as made:
        yield made


@pytest.fixture(scope="module")
def model():
    return load_model("reference:qwen3", dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def theirs(model) -> poc.Proof:
    return poc.prove(model, make_round(PRESET, seq_len=PROMPT), range(24), batch_size=8)


def check_points(engine, theirs: poc.Proof) -> None:
    """Prove the nonces of a proof on an engine, which must find its points and hold nothing."""
    ours = poc.prove(engine.model, theirs.round, range(24), engine=engine)
    pairs = zip(ours.records, theirs.records, strict=True)
    same = [bool((mine.points == other.points).all()) for mine, other in pairs]
    assert np.mean(same) >= 0.9  # a point on a border may fall to either side, and the rest follows
    assert all(
        count["rows"] == count["filled"] == count["streams"] == count["errors"] == 0
        for count in engine.counts()
    )


def test_points_are_those_of_transformers(engine, theirs):
    check_points(engine, theirs)


@pytest.mark.skipif(ONE_GPU, reason="two workers need two GPUs")
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="two workers need two cores")
def test_two_workers_find_the_points_of_transformers(theirs, monkeypatch: pytest.MonkeyPatch):
    # One core each, as the CPU build of vLLM wants to be told.
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    options = OPTIONS | {"tensor_parallel_size": 2, "enforce_eager": True}
    with VLLMEngine("reference:qwen3", dtype="float32", **SHAPE, **options) as made:
        check_points(made, theirs)


def test_a_replay_gives_the_margins_of_transformers_for_any_points(engine, model, theirs):
    pipeline = poc.get_pipeline(PRESET)
    points = np.stack([record.points for record in theirs.records[:10]])
    points[1, 10] = (points[1, 10] + 3) % 16
    found = {}
    for name, one in (("vllm", engine), ("hf", HFEngine(model, **SHAPE))):
        with closing(one.run(theirs.round.inputs(range(10)), pipeline, points)) as batches:
            found[name] = np.concatenate([values["margins"] for values in batches])
    assert found["vllm"][1, 10] > 1e-3
    np.testing.assert_allclose(found["vllm"], found["hf"], atol=1e-3)


def test_other_nonces_of_the_engine_are_not_reflected(engine, model):
    round = make_round("artifact", seq_len=PROMPT)
    mine, other = (
        poc.prove(model, round, range(8), **given)
        for given in ({"engine": engine}, {"batch_size": 8})
    )
    apart = [
        np.abs(a.vector.astype(float) - b.vector).max()
        for a, b in zip(mine.records, other.records, strict=True)
    ]
    assert max(apart) < 2e-3


def test_compiled_layers_are_refused_with_the_option_to_use():
    """It is refused where vLLM may compile them; here it does not, which takes a minute."""
    options = OPTIONS | {"compilation_config": {"mode": 0}}
    with (
        VLLMEngine("reference:qwen3", dtype="float32", **SHAPE, **options) as made,
        refuses(UsageError, "compiled layers are refused with the option to use"),
    ):
        poc.prove(made.model, make_round(PRESET, seq_len=PROMPT), range(2), engine=made)
