"""Replay with an offline vLLM: the tokens and sketches of transformers, in float32."""

from dataclasses import replace
from pathlib import Path

import pytest

from assay.errors import UsageError
from assay.models import load_model
from assay.poc.responses import HFPrefill, Receipts, Request, Sampling, replay, respond
from assay.poc.responses.adapters import load_adapter
from assay.poc.responses.receipts import Adapter
from assay.poc.vllm.vllm_prefill import VLLMPrefill
from tests.lora import write_adapter
from tests.vllm.conftest import SMALL_ENGINE
from tests.wordings import refuses

NARROW = 18
"""Columns of a profile up to differences of a quarter."""

WAYS = (
    Sampling(),
    Sampling(temperature=0.7, top_k=100, top_p=0.9, repetition_penalty=1.2),
    Sampling(temperature=0),
    Sampling(temperature=0.8, top_k=20, min_p=0.01, frequency_penalty=0.3),
)
OPTIONS = {"dtype": "float32", "max_model_len": 256, "enforce_eager": True} | SMALL_ENGINE


@pytest.fixture(scope="module")
def model():
    return load_model("reference:qwen3", dtype="float32", device="cpu")


def responses_of(model) -> Receipts:
    requests = [
        Request(
            prompt=(5 + number, 9, 12, 40), request_id=f"r{number}", max_tokens=40, sampling=way
        )
        for number, way in enumerate(WAYS)
    ]
    return respond(model, requests, block_hash="block_alpha", public_key="node_A", end_tokens=())


def test_vllm_gives_the_margins_profiles_and_sketches_of_transformers(model, tmp_path: Path):
    receipts = responses_of(model)
    ours = replay(receipts, model, engine=HFPrefill(model))
    # A step takes one response and a half: prompts come in chunks, and states from several steps.
    with VLLMPrefill(
        "reference:qwen3", max_num_batched_tokens=64, max_num_seqs=8, **OPTIONS
    ) as engine:
        theirs = replay(receipts, engine.model, engine=engine)
        assert (engine.fingerprint.engine, engine.fingerprint.dtype) == ("vllm", "float32")
        adapter = load_adapter(write_adapter(tmp_path, model))
        named = replace(receipts.receipts[0], adapter=Adapter("tuned", adapter.digest))
        with refuses(UsageError, "vllm gives the margins profiles and sketches of transformers"):
            replay(
                Receipts.build(receipts.header, [named], 1.0),
                engine.model,
                adapter=adapter,
                engine=engine,
            )
        wide = replace(
            receipts.receipts[1],
            sampling=Sampling(temperature=0.7, top_p=0.9, repetition_penalty=1.2),
        )
        with refuses(UsageError, "vllm gives the margins profiles and sketches of transformers, 2"):
            replay(Receipts.build(receipts.header, [wide], 1.0), engine.model, engine=engine)
    for one, other in zip(ours, theirs, strict=True):
        assert one.matches == other.matches == 40
        # vLLM lists the likeliest tokens alone: at scales at which all others matter, a claimed
        # token is likelier.
        assert other.profiles[:, 8:NARROW] == pytest.approx(one.profiles[:, 8:NARROW], abs=0.05)
        assert (other.profiles >= one.profiles - 0.05)[:, 8:].all()
        assert len(other.residuals) == 2
        assert other.residuals.max() < 1e-3
