"""Models whose layers keep a state, and models that read images too, beside transformers.

What is measured is that of the benchmark from which docs/vllm.md has its table.
"""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import _vllm_router
import numpy as np
import pytest
from vllm_support import CASES, PRESETS, checkpoint, measure

from assay import poc
from assay.models import load_model
from tests.models.storing import make_hybrid
from tests.vllm import states
from tests.vllm.conftest import ON_GPU, make_round
from tests.vllm.test_inprocess import AGREEMENT, nothing_is_held, published

pytestmark = [
    pytest.mark.skipif(ON_GPU, reason="models of the CPU build"),
    pytest.mark.usefixtures("forked_engines"),
]


LONG = 192
"""Positions of a nonce with state: more than a block of the cache, so that its state is kept where the block ends."""

BLOCKS = 48
"""Blocks of the cache, for eight nonces at once: those of a nonce that were kept would soon be missing."""


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory: pytest.TempPathFactory):
    """An engine of a model with state, and the model on transformers."""
    from assay.poc.vllm.engine import VLLMEngine

    _vllm_router.allow_hooks()
    path = make_hybrid("falcon_h1", tmp_path_factory.mktemp("hybrid") / "falcon_h1")
    # The cache of prefixes is that of a server. A step takes less than a nonce, whose state is carried to the next.
    options = {"enforce_eager": True, "max_model_len": 256, "max_num_batched_tokens": 160, "max_num_seqs": 8}
    options |= {"num_gpu_blocks_override": BLOCKS, "in_flight": 8, "enable_prefix_caching": True}
    with VLLMEngine(str(path), dtype="float32", batch_size=8, seq_len=LONG, **options) as engine:
        yield engine, load_model(path, dtype="float32", device="cpu")


def inside(engine, method: Callable[[Any], Any]) -> Any:
    """What a function returns of the worker of an engine."""
    return engine._thread.run(engine._client._llm.collective_rpc(method))[0]


def chat(engine) -> Awaitable[list[int]]:
    """Answer a prompt in the engine with its likeliest tokens."""
    from assay.poc.vllm.client import sampling_parameters

    async def answer() -> list[int]:
        prompt = {"type": "token", "prompt_token_ids": list(range(3, 45))}
        sampling = sampling_parameters(24, ignore_eos=True)
        return [out async for out in engine._client._llm.generate(prompt, sampling, "chat")][-1].outputs[0].token_ids

    return answer()


@pytest.mark.parametrize("preset", PRESETS)
def test_nonces_with_state_are_those_of_transformers(hybrid, preset: str):
    engine, model = hybrid
    round = make_round(preset, seq_len=LONG)
    ours = poc.prove(engine.model, round, range(40), engine=engine)
    theirs = poc.prove(model, round, range(40), batch_size=8)
    assert np.abs(published(ours) - published(theirs)).max() <= AGREEMENT[preset]
    assert ours.header.digest == theirs.header.digest
    assert nothing_is_held(engine)


def test_no_state_goes_from_one_request_to_another(hybrid):
    engine, model = hybrid
    round = make_round(key="state", seq_len=LONG)
    theirs = published(poc.prove(model, round, range(24), batch_size=8))
    alone = engine._thread.run(chat(engine))
    inside(engine, states.watch)
    inside(engine, states.spoil)
    # Beside chat, whose state is carried on from token to token.
    answer = asyncio.run_coroutine_threadsafe(chat(engine), engine._loop)
    ours = published(poc.prove(engine.model, round, range(24), engine=engine))
    assert np.abs(ours - theirs).max() <= AGREEMENT["poc-2.0"]
    assert answer.result() == alone == engine._thread.run(chat(engine))
    steps, begun = inside(engine, states.take), set()
    for step in steps:
        assert len({block for _, block, _ in step}) == len(step)
        for name, block, is_read in step:
            assert block > 0  # kernels take block 0 for none, and leave out what is computed with it
            assert is_read == (name in begun)
            begun.add(name)
    assert len(begun) == 24 + 2  # with the chat beside them and after them
    assert any(is_read for step in steps for _, _, is_read in step)


def test_a_checkpoint_that_reads_images_is_honest_as_text_on_both_engines(tmp_path: Path):
    kind, dtype = CASES["Qwen2.5-VL, as text"]
    row = measure(checkpoint(kind, tmp_path), kind, dtype)
    for preset in PRESETS:
        found = row["presets"][preset]
        assert {found["vllm_on_transformers"], found["transformers_on_vllm"]} <= {"honest", "undecided"}, found
        assert found["cheat_on_vllm"] == "fraud", found
        assert found["residual_median"] < found["cheat_median"] / 2
        assert found["beside_the_scheduler"]["nonces"] > 0
