"""Assay's own decoder inside real engines and a server: the weights of vLLM, the law of requests, chat as before.

The CPU build frees the weights that it has packed, so workers of these tests keep them (``_unpacked``), but for the one
that is refused for it. What needs no engine is in test_parts_own.py.
"""

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from _vllm import KEY, REFERENCE, choose_forward, talk
from _vllm_forked import ForkedServer

from assay import poc
from assay.errors import CalibrationError, ModelError, UsageError
from assay.models import load_model
from assay.models.resolve import checkpoint_directory
from assay.poc.cheats import rounded
from assay.poc.vllm import engine as _engine
from assay.poc.vllm.start import before_start
from tests.poc.engines.test_lean import KINDS, SHAPE
from tests.vllm.conftest import ON_GPU, ONE_GPU, SEQ_LEN, SMALL, SMALL_ENGINE, break_passes, make_round
from tests.vllm.test_inprocess import AGREEMENT, nothing_is_held, published
from tests.vllm.test_models import chat

pytestmark = pytest.mark.usefixtures("forked_engines")

UNPACKED = "_unpacked.Unpacked"
OPTIONS = {"enforce_eager": True, "max_model_len": 512, "max_num_batched_tokens": 1024, "max_num_seqs": 16}
OPTIONS |= SMALL_ENGINE
PRESETS = ("poc-2.0", "artifact", "hardened")


@pytest.fixture(scope="module")
def unpacked():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_engine, "EXTENSION", UNPACKED)
        yield


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def engine(request, unpacked):
    from assay.poc.vllm.engine import VLLMEngine

    shape = {"dtype": request.param, "batch_size": 8, "seq_len": SEQ_LEN}
    with VLLMEngine("reference:qwen3", forward="assay", **shape, **OPTIONS) as made:
        yield made


@pytest.fixture(scope="module")
def model(engine):
    return load_model("reference:qwen3", dtype=engine.dtype, device="cuda" if ON_GPU else "cpu")


def own(engine, preset: str, count: int = 48) -> poc.Proof:
    """Prove by assay's own decoder; every nonce must have run in a call."""
    before = engine._client.direct.nonces
    proof = poc.prove(engine.model, make_round(preset, key="own"), range(count), engine=engine)
    assert engine._client.direct.nonces - before == count
    return proof


def by_requests(engine, preset: str, count: int = 48) -> poc.Proof:
    """Prove by requests of vLLM."""
    throttle = engine._client.throttle
    choose_forward(engine, "vllm")
    throttle.settings = replace(throttle.settings, path="requests")
    try:
        return poc.prove(engine.model, make_round(preset, key="own"), range(count), engine=engine)
    finally:
        throttle.settings = replace(throttle.settings, path="auto")
        choose_forward(engine, "assay")


def ask(engine, method: str, **arguments: Any) -> Any:
    """What a method of the worker of an engine returns."""
    return engine._thread.run(engine._client._llm.collective_rpc(method, kwargs=arguments))[0]


def test_the_fingerprint_names_it_and_the_default_says_nothing_of_it(engine):
    kernels = engine.fingerprint.kernels
    assert "forward assay" in kernels
    choose_forward(engine, "vllm")
    assert engine.fingerprint.kernels == kernels[: kernels.index("forward assay")]
    choose_forward(engine, "assay")
    assert engine.fingerprint.kernels == kernels


def test_it_runs_over_the_memory_of_every_parameter_of_the_decoder(engine):
    theirs, taken = ask(engine, "assay_places")
    assert theirs == taken
    assert len(taken) > 50


@pytest.mark.parametrize("preset", PRESETS)
def test_it_agrees_with_requests_and_with_transformers(engine, model, preset: str):
    ours, requests = published(own(engine, preset)), published(by_requests(engine, preset))
    theirs = published(poc.prove(model, make_round(preset, key="own"), range(48), batch_size=8))
    noise = np.abs(requests - theirs)
    for others in (theirs, requests):
        apart = np.abs(ours - others)
        if engine.dtype == "float32":
            assert apart.max() <= AGREEMENT[preset]
        else:  # as far as requests are from transformers
            assert np.median(apart) <= 1.5 * np.median(noise)
            assert apart.max() <= 2 * noise.max()
    assert nothing_is_held(engine)


def test_verdicts_are_by_a_law_of_its_own(engine, model):
    """Honest in both directions, and four bits are a fraud; the law of requests is that of another build."""
    ours, requests = own(engine, "hardened", 96), by_requests(engine, "hardened", 96)
    theirs = poc.prove(model, make_round("hardened", key="own"), range(96), batch_size=8)
    judge: Any = {"sample": 64, "seed": 1, "prover_dtype": engine.dtype}
    judge |= {"calibration": poc.calibrate(ours, theirs)}
    assert poc.verify(ours, model, **judge).verdict == "honest"
    assert poc.verify(theirs, engine.model, engine=engine, **judge).verdict == "honest"
    cheat = poc.prove(rounded(model, 4), make_round("hardened", key="own"), range(64), batch_size=8)
    assert poc.verify(cheat, engine.model, engine=engine, **judge).verdict == "fraud"
    with pytest.raises(CalibrationError, match="another library"):
        poc.verify(ours, model, **judge | {"calibration": poc.calibrate(requests, theirs)})


def test_after_weights_were_loaded_again_in_place_it_runs_on_the_new_ones(engine, model, int4_checkpoint):
    before = published(own(engine, "poc-2.0"))
    other = load_model(int4_checkpoint, dtype=engine.dtype, device=str(model.device))
    theirs = published(poc.prove(other, make_round("poc-2.0", key="own"), range(48), batch_size=8))
    places = ask(engine, "assay_places")
    ask(engine, "reload_weights", weights_path=str(int4_checkpoint))
    try:
        after = published(own(engine, "poc-2.0"))
        assert ask(engine, "assay_places") == places
    finally:
        ask(engine, "reload_weights", weights_path=str(checkpoint_directory("reference:qwen3")))
    bound = AGREEMENT["poc-2.0"] if engine.dtype == "float32" else 5e-4
    assert np.median(np.abs(after - theirs)) <= bound < np.median(np.abs(after - before))
    assert np.array_equal(published(own(engine, "poc-2.0")), before)


def test_passes_that_fail_end_the_round_in_words_and_leave_chat_as_it_was(engine, monkeypatch: pytest.MonkeyPatch):
    answer, expected = engine._thread.run(chat(engine)), published(own(engine, "poc-2.0"))
    with monkeypatch.context() as patch:
        break_passes(patch, engine)
        with pytest.raises(ModelError, match="assay's own forward pass"):
            own(engine, "poc-2.0")
        assert engine._thread.run(chat(engine)) == answer
    assert nothing_is_held(engine)
    assert np.array_equal(published(own(engine, "poc-2.0")), expected) or ON_GPU


@pytest.mark.parametrize("kind", ["llama, biases", "mistral", "qwen2"])
def test_other_architectures_agree_with_transformers(kind: str, unpacked, tmp_path: Path):
    import torch

    from assay.poc.vllm.engine import VLLMEngine

    factory, configure, more = KINDS[kind]
    sizes = {**SHAPE, **more, "hidden_size": 128, "max_position_embeddings": 256}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = factory(configure(**sizes))
        for parameter in module.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
    module.save_pretrained(tmp_path)
    with VLLMEngine(
        str(tmp_path),
        dtype="float32",
        batch_size=8,
        seq_len=SEQ_LEN,
        forward="assay",
        **OPTIONS | {"max_model_len": 256},
    ) as engine:
        ours = own(engine, "hardened", 24)
    theirs = poc.prove(load_model(tmp_path, dtype="float32", device="cpu"), ours.header.round, range(24), batch_size=8)
    assert np.abs(published(ours) - published(theirs)).max() <= AGREEMENT["hardened"]


@pytest.mark.skipif(ON_GPU, reason="there weights stay as they were loaded")
def test_weights_that_are_packed_are_refused_by_name(monkeypatch: pytest.MonkeyPatch):
    from assay.poc.vllm.compatibility import EXTENSION
    from assay.poc.vllm.engine import VLLMEngine

    monkeypatch.setattr(_engine, "EXTENSION", EXTENSION)
    with pytest.raises(UsageError, match="ASSAY_VLLM_FORWARD=assay with weights that vLLM has packed"):
        VLLMEngine("reference:qwen3", dtype="float32", seq_len=SEQ_LEN, forward="assay", **OPTIONS)


@pytest.mark.skipif(ONE_GPU, reason="vLLM refuses two workers there by itself")
def test_what_settings_say_is_refused_before_an_engine_is_loaded(monkeypatch: pytest.MonkeyPatch):
    from vllm.v1.engine.async_llm import AsyncLLM

    from assay.poc.vllm.engine import VLLMEngine

    def started(*args: object, **kwargs: object) -> None:
        raise AssertionError("an engine was loaded")

    monkeypatch.setattr(AsyncLLM, "from_vllm_config", started)
    with pytest.raises(UsageError, match="tensor parallelism over 2 workers"):
        VLLMEngine("reference:qwen3", seq_len=SEQ_LEN, forward="assay", tensor_parallel_size=2, **OPTIONS)


@pytest.mark.skipif(ONE_GPU, reason="vLLM refuses two workers there by itself")
def test_a_server_that_asks_for_what_cannot_run_does_not_start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    environment = {"VLLM_PLUGINS": "assay", "ASSAY_API_KEY": KEY, "ASSAY_DATA_DIR": str(tmp_path)}
    for name, value in (environment | {"ASSAY_VLLM_FORWARD": "assay", "TRITON_F32_DEFAULT": "ieee"}).items():
        monkeypatch.setenv(name, value)
    needed = ["--enable-prompt-embeds", "--worker-extension-cls", UNPACKED, "--dtype", "float32"]
    monkeypatch.setattr("sys.argv", ["/bin/vllm", "serve", str(REFERENCE), *needed])
    before_start()
    monkeypatch.setattr("sys.argv", ["/bin/vllm", "serve", str(REFERENCE), *needed, "-tp", "2"])
    with pytest.raises(SystemExit) as end:
        before_start()
    assert "ASSAY_VLLM_FORWARD=assay with tensor parallelism over 2 workers" in str(end.value.code)
    monkeypatch.setenv("ASSAY_VLLM_FORWARD", "vllm")
    before_start()


def test_chat_beside_a_round_is_the_same_and_no_nonce_is_a_request(honest, tmp_path: Path):
    environment = {"ASSAY_SEQ_LEN": str(SEQ_LEN), "ASSAY_VLLM_QUIET": "0.2", "ASSAY_VLLM_FORWARD": "assay"}
    options = SMALL | {"--worker-extension-cls": UNPACKED}
    with ForkedServer(tmp_path, options=options, environment=environment) as server:
        alone = asyncio.run(talk(server.url, 24))
        server.begin("own-chat")
        server.wait_for(32)
        before = server.checked()
        beside = asyncio.run(talk(server.url, 24))
        meanwhile = server.checked() - before
        server.wait_for(server.checked() + 32)
        assert server.post("/engine", {"path": "requests"}).status_code == 422
        server.post("/stop").raise_for_status()
        engine = server.idle_counts()
        page = server.get("/status", after=-1, limit=10_000).json()
    assert [one["status"] for one in beside] == [200] * 24
    assert [one["text"] for one in beside] == [one["text"] for one in alone]
    assert meanwhile > 0
    assert (engine["forward"], engine["direct"]["reason"], engine["nonces"]) == ("assay", None, 0)
    assert engine["direct"]["nonces"] >= page["total_checked"]
    round = poc.Round(block_hash="own-chat", public_key="node", block_height=1, seq_len=SEQ_LEN, r_target=2.0)
    theirs = [record.distance for record in poc.prove(honest, round, page["valid_nonces"], batch_size=8).records]
    assert np.abs(np.array(page["valid_distances"]) - np.array(theirs)).max() <= AGREEMENT["poc-2.0"]
