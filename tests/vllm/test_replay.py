"""Replay with an offline vLLM: the same tokens match as with transformers, in float32."""

import pytest

from assay import load_model
from assay.poc.responses import HFPrefill, Request, Sampling, VLLMPrefill, replay, respond

NARROW = 18
"""Columns of a profile up to differences of a quarter."""

WAYS = (
    Sampling(),
    Sampling(temperature=0.7, top_p=0.9, repetition_penalty=1.2),
    Sampling(temperature=0),
    Sampling(temperature=0.8, top_k=20, min_p=0.01, frequency_penalty=0.3),
)


def test_vllm_gives_the_margins_and_profiles_of_transformers():
    model = load_model("reference:qwen3", dtype="float32", device="cpu")
    requests = [
        Request(prompt=(5 + number, 9, 12, 40), request_id=f"r{number}", max_tokens=24, sampling=way)
        for number, way in enumerate(WAYS)
    ]
    receipts = respond(model, requests, block_hash="block_alpha", public_key="node_A", stop=())
    ours = replay(receipts, model, engine=HFPrefill(model))
    with VLLMPrefill("reference:qwen3", dtype="float32", max_model_len=256, enforce_eager=True) as engine:
        theirs = replay(receipts, engine.model, engine=engine)
        assert (engine.fingerprint.engine, engine.fingerprint.dtype) == ("vllm", "float32")
    for one, other in zip(ours, theirs, strict=True):
        assert one.matches == other.matches == 24
        # vLLM lists the likeliest tokens alone: at scales at which all others matter, a claimed token is likelier.
        assert other.profiles[:, 8:NARROW] == pytest.approx(one.profiles[:, 8:NARROW], abs=0.05)
        assert (other.profiles >= one.profiles - 0.05)[:, 8:].all()
        assert other.residuals.size == 0
