"""An engine of our own: agreement with transformers, hostile calls, no rows left behind."""

import asyncio
from dataclasses import asdict
from importlib import import_module

import numpy as np
import pytest
import torch
from vllm_support import published

from assay import poc
from assay.errors import ModelError, UsageError
from assay.poc.vllm.nonce_streams import NonceStream, sampling_parameters
from assay.poc.vllm.rows import Spec, new_key, request_id
from assay.poc.vllm.vllm_engine import RequestEngine, VLLMEngine
from tests.usual import tries
from tests.vllm.conftest import RUNNER, SEQ_LEN, SMALL_ENGINE, make_round
from tests.wordings import refuses

pytestmark = pytest.mark.usefixtures("forked_engines")

PRESETS = ("poc-2.0", "artifact", "hardened")
# float32 distances; vectors are published in float16.
AGREEMENT = {"poc-2.0": 2e-6, "artifact": 2e-3, "hardened": 2e-3}
COMPANY = 1e-6


@pytest.fixture(scope="module")
def engine():
    # A step takes two nonces and a half: prompts are cut into chunks at ever new places.
    options = {
        "enforce_eager": True,
        "max_model_len": 256,
        "max_num_batched_tokens": 160,
        "max_num_seqs": 16,
    }
    options |= SMALL_ENGINE
    with VLLMEngine(
        "reference:qwen3", dtype="float32", batch_size=8, seq_len=SEQ_LEN, in_flight=16, **options
    ) as made:
        yield made


def nothing_is_held(engine) -> bool:
    return all(
        count["rows"] == count["filled"] == count["streams"] == 0 for count in engine.counts()
    )


def test_it_says_what_it_is_and_what_it_supports(engine):
    assert (engine.hidden_size, engine.vocab_size, engine.dtype) == (256, 4096, "float32")
    assert engine.fingerprint.engine == "vllm"
    assert f"runner {RUNNER}" in engine.fingerprint.kernels
    assert all(engine.supports(poc.get_pipeline(preset)) for preset in PRESETS)


V2 = "req_ids num_reqs query_start_loc_np num_computed_tokens_np prefill_len_np positions"


@pytest.mark.parametrize(
    ("target", "names"),
    [
        ("vllm.v1.worker.gpu_model_runner:ExecuteModelState", "scheduler_output hidden_states"),
        ("vllm.v1.worker.gpu.model_runner:ExecuteModelState", "input_batch hidden_states"),
        ("vllm.v1.worker.gpu.input_batch:InputBatch", V2),
    ],
)
def test_both_model_runners_have_what_is_read_of_them(target: str, names: str):
    module, _, name = target.partition(":")
    assert set(names.split()) <= getattr(import_module(module), name).__annotations__.keys()


def check_agreement(engine, model, round: poc.Round, preset: str) -> None:
    ours = poc.prove(engine.model, round, range(40), engine=engine)
    theirs = poc.prove(model, round, range(40), batch_size=8)
    assert np.abs(published(ours) - published(theirs)).max() <= AGREEMENT[preset]
    assert ours.header.digest == theirs.header.digest
    assert nothing_is_held(engine)


@pytest.mark.parametrize("preset", PRESETS)
def test_it_agrees_with_transformers(engine, honest, preset: str):
    check_agreement(engine, honest, make_round(preset), preset)


@pytest.mark.parametrize("preset", ["layer-signs", "layer-normalize", "permutation"])
def test_pipelines_that_vllm_cannot_run_are_refused_in_words(engine, preset: str):
    with refuses(UsageError, "pipelines that vllm cannot run are refused in words"):
        poc.prove(engine.model, make_round(preset), range(8), engine=engine)


def on_loop(engine, work):
    return asyncio.run_coroutine_threadsafe(work, engine.client.loop).result()


async def hostile(engine, key: str, prompts: dict[str, dict]) -> None:
    """Send requests past the client's own checks."""
    for name, prompt in prompts.items():
        async for _ in engine.client.llm.generate(prompt, sampling_parameters(), name):
            pass


def test_hostile_requests_and_calls_leave_a_living_engine_and_no_rows(engine):
    key = new_key()
    on_loop(engine, engine.client.open(key, Spec(make_round(), poc.get_pipeline("poc-2.0"))))
    tokens = {"type": "token", "prompt_token_ids": [0] * SEQ_LEN}
    wrong = {
        f"{key}.": tokens,
        f"{key}.-1": tokens,
        f"{key}.abc": tokens,
        f"{key}.99999999999999999999": tokens,
        request_id(new_key(), 1): tokens,
        request_id(key, 1): tokens | {"prompt_token_ids": [0] * (SEQ_LEN - 1)},
        request_id(key, 2): {"type": "embeds", "prompt_embeds": torch.zeros(SEQ_LEN, 128)},
        request_id(key, 3): {"type": "embeds", "prompt_embeds": torch.zeros(SEQ_LEN + 3, 256)},
        request_id(key, 4): {
            "type": "embeds",
            "prompt_embeds": torch.full((SEQ_LEN, 256), float("nan")),
        },
    }
    on_loop(engine, hostile(engine, key, wrong))
    for nonce in (1, 2, 3, 4):
        with pytest.raises(ModelError, match=f"nonce {nonce}"):
            on_loop(engine, engine.client.collect(key, [nonce]))
    call = engine.client.call
    wrong = (
        ({"block": "b"}, "poc-2.0"),
        (asdict(make_round()), "no-preset"),
        ({"block_hash": "b", "public_key": ""}, "poc-2.0"),
    )
    for given, word in zip(wrong, ("block", "no-preset", "public_key"), strict=True):
        assert all(
            word in reason for reason in on_loop(engine, call("assay_open", new_key(), *given))
        )
    assert all(
        reply["failed"] == {} for reply in on_loop(engine, call("assay_collect", "unknown", [1, 2]))
    )
    on_loop(engine, call("assay_close", "unknown"))
    on_loop(engine, call("assay_close", key))
    assert nothing_is_held(engine)
    assert poc.prove(engine.model, make_round(), range(8), engine=engine).footer.records == 8


def test_a_stream_that_a_worker_refuses_is_held_by_none(engine, monkeypatch: pytest.MonkeyPatch):
    call = engine.client.call

    async def refuse(method, *arguments):
        return [*await call(method, *arguments), *(["a reason"] if method == "assay_open" else [])]

    with monkeypatch.context() as patch:
        patch.setattr(engine.client, "call", refuse)
        with refuses(UsageError, "a stream that a worker refuses is held by none"):
            next(engine.run(make_round().inputs(range(4)), poc.get_pipeline("poc-2.0")))
    assert nothing_is_held(engine)


def test_a_stream_that_is_closed_in_the_middle_leaves_nothing(engine):
    for _ in range(5):
        outputs = engine.run(
            make_round(key="closed").inputs(range(2**40)), poc.get_pipeline("poc-2.0")
        )
        next(outputs)
        outputs.close()
    assert nothing_is_held(engine)
    assert engine.client.throttle.in_flight == 0


def test_requests_that_are_aborted_run_again(engine, monkeypatch: pytest.MonkeyPatch):
    throttle = engine.client.throttle
    monkeypatch.setattr(
        throttle, "settings", throttle.settings.model_copy(update={"path": "requests"})
    )

    async def scenario():
        spec = Spec(make_round(key="abort"), poc.get_pipeline("poc-2.0"))
        stream = NonceStream(engine.client, spec, range(16), 16)
        await stream.open()
        waiting = asyncio.ensure_future(stream.next())
        for _ in range(2):  # a nonce is tried three times
            await asyncio.sleep(0.01)
            await engine.client.llm.abort([request_id(stream.key, nonce) for nonce in range(16)])
        values = await waiting
        await stream.close()
        return values

    again = on_loop(engine, scenario())
    proof = poc.prove(engine.model, make_round(key="abort"), range(16), engine=engine)
    assert np.abs(again - published(proof)).max() <= COMPANY
    assert nothing_is_held(engine)


def test_inputs_of_a_client_that_are_not_finite_spoil_nothing(engine):
    """Left in the blocks of the cache, NaN would come back in the results of later requests."""
    round = make_round(key="nan")
    before = poc.prove(engine.model, round, range(32), engine=engine)
    nan = {"type": "embeds", "prompt_embeds": torch.full((SEQ_LEN, 256), float("inf"))}
    on_loop(engine, hostile(engine, "", {f"from-a-client-{number}": nan for number in range(16)}))
    after = poc.prove(engine.model, round, range(32), engine=engine)
    assert np.abs(published(before) - published(after)).max() <= COMPANY


def test_thousands_of_nonces_leave_no_rows(engine):
    """Short nonces, in one batch of more than the workers would hold: what counts is how many come
    and go.
    """
    wanted = tries(10_000, 5_000)
    small = replace_shape(engine, seq_len=4, batch_size=wanted)
    count = 0
    inputs = make_round(seq_len=4, key="soak").inputs(range(wanted))
    for values in small.run(inputs, poc.get_pipeline("artifact")):
        count += len(values["vector"])
        assert np.isfinite(values["vector"]).all()
    assert count == wanted
    assert nothing_is_held(engine)


def replace_shape(engine, *, seq_len: int, batch_size: int):
    """Another shape on the engine that runs."""
    return RequestEngine(engine.client, batch_size=batch_size, seq_len=seq_len)


def test_the_longest_sequence_is_refused_before_it_runs(engine):
    with refuses(UsageError, "the longest sequence is refused before it runs"):
        replace_shape(engine, seq_len=256, batch_size=1)
    longest = replace_shape(engine, seq_len=255, batch_size=1)
    values = next(longest.run(make_round(seq_len=255).inputs([0]), poc.get_pipeline("artifact")))
    assert values["vector"].shape == (1, 12)


@pytest.mark.parametrize(
    ("options", "refusal"),
    [({"tensor_parallel": 2}, "options of vLLM"), ({"quantization": "fp8"}, "--quantization fp8")],
)
def test_options_under_which_nonces_cannot_run_are_refused_before_the_start(options, refusal: str):
    with pytest.raises((UsageError, ModelError), match=refusal):
        VLLMEngine("reference:qwen3", **options)
