"""Proofs of decoding on vLLM: tokens, sketches and margins of transformers, and verdicts both
ways.
"""

import asyncio
import base64
from contextlib import closing
from functools import cache

import httpx
import numpy as np
import pytest
from _vllm import MODEL, ForkedServer, chat_once

from assay import poc
from assay.errors import UsageError
from assay.models import load_model
from assay.poc import HFEngine
from assay.poc.cheats import rounded
from assay.poc.protocol.records import pack_record
from assay.poc.vllm.vllm_engine import VLLMEngine
from tests.vllm.conftest import SMALL, SMALL_ENGINE, check_idle, make_round
from tests.wordings import refuses

pytestmark = pytest.mark.usefixtures("forked_engines")

PRESET = "decode-64"
STEPS = 64
PROMPT = 32
HONEST = 24
CHEATED = 16  # nonces of the proofs of transformers: enough to be honest, and to be a fraud


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def dtype(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def engine(dtype: str):
    # A step takes one prompt and a half, so prompts come in chunks beside nonces that decode.
    options = {
        "enforce_eager": True,
        "max_model_len": 160,
        "max_num_batched_tokens": 48,
        "max_num_seqs": 16,
    }
    options |= SMALL_ENGINE
    with VLLMEngine(
        "reference:qwen3", dtype=dtype, batch_size=8, seq_len=PROMPT, in_flight=16, **options
    ) as made:
        yield made


@pytest.fixture(scope="module")
def model(dtype: str):
    return load_model("reference:qwen3", dtype=dtype, device="cpu")


def proof_of(model, engine=None, count: int = 24, key: str = "node") -> poc.Proof:
    batch = {} if engine is not None else {"batch_size": 8}
    return poc.prove(
        model, make_round(PRESET, key=key, seq_len=PROMPT), range(count), engine=engine, **batch
    )


@cache
def theirs(dtype: str, bits: int = 0) -> poc.Proof:
    """Return a proof of transformers, or one of its weights in so many bits."""
    model = load_model("reference:qwen3", dtype=dtype, device="cpu")
    return proof_of(rounded(model, bits), count=CHEATED) if bits else proof_of(model, count=HONEST)


@pytest.fixture(scope="module")
def ours(engine) -> poc.Proof:
    return proof_of(engine.model, engine, HONEST)


def test_tokens_and_sketches_are_those_of_transformers(engine, ours, dtype: str):
    pairs = list(zip(ours.records, theirs(dtype).records, strict=True))
    same = np.mean([np.mean(a.tokens == b.tokens) for a, b in pairs])
    first = [np.abs(a.sketches[0].astype(float) - b.sketches[0]).max() for a, b in pairs]
    assert max(first) <= (2e-3 if dtype == "float32" else 5e-2)
    assert (
        same == 1.0 if dtype == "float32" else same > 0.5
    )  # after a token that differs, all others may
    assert all(
        count["rows"] == count["filled"] == count["streams"] == 0 for count in engine.counts()
    )


def test_verdicts_across_engines(engine, model, ours, dtype: str):
    """Prover vLLM and validator transformers, the reverse, and vLLM for both: honest. Four bits:
    fraud.
    """
    assert poc.verify(ours, model).verdict == "honest"
    assert poc.verify(theirs(dtype), engine.model, engine=engine).verdict == "honest"
    assert poc.verify(ours, engine.model, engine=engine).verdict == "honest"
    assert poc.verify(theirs(dtype, 4), engine.model, engine=engine).verdict == "fraud"


def test_a_replay_gives_the_margins_of_transformers_for_any_tokens(engine, model, dtype: str):
    round = make_round(PRESET, seq_len=PROMPT)
    pipeline = poc.get_pipeline(PRESET)
    tokens = np.stack([record.tokens for record in theirs(dtype).records[:4]]).astype(np.uint32)
    tokens[1, 10], tokens[2, 20] = (tokens[1, 10] + 1) % 4096, 2**31
    found = {}
    for name, one in (("vllm", engine), ("hf", HFEngine(model, batch_size=8, seq_len=PROMPT))):
        with closing(one.run(round.inputs(range(4)), pipeline, tokens)) as batches:
            found[name] = next(batches)
    vllm = found["vllm"]
    hf = found["hf"]
    assert np.isinf(vllm["margins"][2, 20])
    assert vllm["margins"][1, 10] > 0
    finite = np.isfinite(hf["margins"])
    assert (finite == np.isfinite(vllm["margins"])).all()
    tight = 1e-3 if dtype == "float32" else 0.5
    np.testing.assert_allclose(vllm["margins"][finite], hf["margins"][finite], atol=tight)
    assert np.abs(vllm["sketches"].astype(float) - hf["sketches"]).max() <= (
        2e-3 if dtype == "float32" else 0.1
    )


def test_prompts_and_tokens_that_do_not_fit_are_refused_before_they_run(engine):
    with refuses(
        UsageError, "prompts and tokens that do not fit are refused before they run"
    ) as raised:
        poc.prove(engine.model, make_round("decode", seq_len=PROMPT), range(4), engine=engine)
    assert "--max-model-len" in raised.value.do


# The plugin of a server


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory):
    options = SMALL | {
        "--max-num-batched-tokens": "96"
    }  # prompts come in chunks, beside one another and beside chat
    environment = {"ASSAY_SEQ_LEN": str(PROMPT)}
    with ForkedServer(
        tmp_path_factory.mktemp("server"), options=options, environment=environment
    ) as running:
        yield running


def job_of(count: int, **other) -> dict:
    body = {
        "block_hash": "block",
        "public_key": "node",
        "block_height": 1,
        "node_id": 0,
        "node_count": 1,
    }
    params = {"model": MODEL, "seq_len": PROMPT, "k_dim": 12, "preset": PRESET}
    return (
        body
        | {"params": params, "nonces": list(range(count)), "batch_size": 8, "wait": True}
        | other
    )


def artifacts_of(proof: poc.Proof, count: int) -> list[dict]:
    packed = [
        (record.nonce, base64.b64encode(pack_record(record)).decode())
        for record in proof.records[:count]
    ]
    return [{"nonce": nonce, "vector_b64": text} for nonce, text in packed]


def tokens_of(artifacts: list[dict]) -> list[bytes]:
    return [base64.b64decode(one["vector_b64"])[: 4 * STEPS] for one in artifacts]


def test_a_server_decodes_beside_chat_and_both_have_their_own_tokens(server):
    async def talk(client: httpx.AsyncClient) -> list[str]:
        answers = await asyncio.gather(*(chat_once(client, index, tokens=40) for index in range(8)))
        assert {one["status"] for one in answers} == {200}
        return [one["text"] for one in answers]

    async def scenario() -> tuple[list[str], list[str], dict]:
        async with httpx.AsyncClient(
            base_url=server.url, timeout=300.0, headers=server.client.headers
        ) as client:
            alone = await talk(client)
            job = asyncio.ensure_future(client.post("/api/v1/pow/generate", json=job_of(12)))
            return alone, await talk(client), (await job).json()

    alone, beside, done = asyncio.run(scenario())
    assert beside == alone
    assert done["status"] == "completed", done
    assert tokens_of(done["artifacts"]) == tokens_of(artifacts_of(theirs("float32"), 12))
    check_idle(server)


def test_a_server_judges_proofs_of_transformers_by_prefill(server):
    for bits, fraud in ((0, False), (4, True)):
        sent = artifacts_of(theirs("float32", bits), CHEATED)
        checked = server.post("/generate", job_of(CHEATED, validation={"artifacts": sent})).json()
        assert checked["fraud_detected"] is fraud, checked
        assert (checked["residual_test"]["verdict"] == "fraud") is fraud


def test_what_does_not_fit_the_server_is_refused_before_it_runs(server):
    long = job_of(4)
    long["params"]["preset"] = "decode-1024"
    assert server.post("/generate", long).status_code == 422
