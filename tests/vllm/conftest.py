"""Real engines and servers, skipped by name where vLLM is not installed, and what tests without it
share.
"""

import asyncio
import importlib.util
import inspect
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from assay.poc import Round

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "research" / folder) for folder in ("benchmarks", "src")]

SEQ_LEN = 64
ON_GPU = torch.cuda.is_available()
ONE_GPU = torch.cuda.device_count() == 1
SMALL = {"--gpu-memory-utilization": "0.1", "--kv-cache-memory-bytes": str(2**28)} if ON_GPU else {}
"""Options of a server that leaves most of a GPU to others; a CPU build is told the size of its
cache elsewhere.

The size is given because vLLM otherwise measures it, and fails where another process frees memory
meanwhile.
"""
SMALL_ENGINE: dict[str, Any] = (
    {"gpu_memory_utilization": 0.1, "kv_cache_memory_bytes": 2**28} if ON_GPU else {}
)
"""Options of an engine of this process that do so."""
RUNNER = "v2" if ON_GPU and os.environ.get("VLLM_USE_V2_MODEL_RUNNER") != "0" else "v1"
"""The model runner that vLLM chooses here."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    absent = importlib.util.find_spec("vllm") is None
    for item in items:
        if item.path.parent == Path(__file__).parent and not item.path.name.startswith(
            "test_parts"
        ):
            item.add_marker(
                pytest.mark.timeout(1200)
            )  # the start of a server, on a machine with other work
            if absent:
                item.add_marker(
                    pytest.mark.skip(reason="vLLM is not installed: run make test-vllm")
                )


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Run a test that is a coroutine in an event loop of its own."""
    if not inspect.iscoroutinefunction(pyfuncitem.obj):
        return None
    given = inspect.signature(pyfuncitem.obj).parameters
    asyncio.run(pyfuncitem.obj(**{name: pyfuncitem.funcargs[name] for name in given}))
    return True


@pytest.fixture(scope="session", autouse=True)
def quiet_vllm() -> None:
    """Settings of vLLM that every process of a test shares; a GPU machine has no use for those of
    the CPU.
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault(
        "VLLM_CPU_OMP_THREADS_BIND", "nobind"
    )  # else the engines of two workers share one core


@pytest.fixture(scope="session")
def forked_engines(quiet_vllm: None) -> Iterator[None]:
    """Engines of this process start as forks of one that has imported vLLM; on a GPU they start as
    vLLM has it.
    """
    from tests.vllm.forked import fork_engines

    with pytest.MonkeyPatch.context() as patch:
        if not ON_GPU:
            fork_engines(patch)
        yield


@pytest.fixture
def with_avx512(monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor with AVX-512 for the checks of checkpoints, whatever this machine has."""
    monkeypatch.setattr("assay.models.device.processor", lambda device: "x86_64 AVX512")


@pytest.fixture(scope="session")
def honest():
    """The bundled Qwen3 on transformers, in float32."""
    from assay.models import load_model

    return load_model("reference:qwen3", dtype="float32", device="cpu")


@pytest.fixture(scope="session")
def int4_checkpoint(honest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of that model, rounded to four bits."""
    from assay.poc.cheats import rounded

    path = tmp_path_factory.mktemp("int4") / "qwen3"
    rounded(honest, 4).module.save_pretrained(path)
    honest.tokenizer.save_pretrained(path)
    return path


def settings_of_vllm(values: dict[str, Any]) -> SimpleNamespace:
    """A stand-in for a ``VllmConfig``: values by section and name, as ``model.dtype``, and some
    without a section.
    """
    config = SimpleNamespace()
    for path, value in values.items():
        section, _, name = path.rpartition(".")
        owner = (
            vars(config).setdefault(f"{section}_config", SimpleNamespace()) if section else config
        )
        setattr(owner, name, value)
    return config


class State(NamedTuple):
    """What both model runners keep between ``execute_model`` and ``sample_tokens``."""

    scheduler_output: Any
    logits: torch.Tensor | None
    hidden_states: torch.Tensor
    input_batch: Any


def lay_out(
    runner: Any,
    states: torch.Tensor,
    spans: dict[str, tuple[int, int]],
    prompt: int = 0,
    **of_batch: Any,
) -> None:
    """Put the requests of a step where both model runners have them: how much was computed before,
    and is now.
    """
    lengths = [length for _, length in spans.values()]
    computed = np.array([at for at, _ in spans.values()])
    prompts = np.full(len(spans), prompt)
    of_v1 = {
        "req_ids": list(spans),
        "num_computed_tokens_cpu": computed,
        "num_prompt_tokens": prompts,
    }
    of_v2 = {"req_ids": list(spans), "num_computed_tokens_np": computed, "prefill_len_np": prompts}
    of_v2 |= {"num_reqs": len(spans), "query_start_loc_np": np.cumsum([0, *lengths])} | of_batch
    scheduled = SimpleNamespace(num_scheduled_tokens=dict(zip(spans, lengths, strict=True)))
    runner.input_batch = SimpleNamespace(**of_v1)
    runner.execute_model_state = State(scheduled, None, states, SimpleNamespace(**of_v2))


def make_round(preset: str = "poc-2.0", *, key: str = "node", seq_len: int = SEQ_LEN) -> Round:
    return Round(block_hash="block", public_key=key, seq_len=seq_len, preset=preset, model="qwen3")


def break_passes(patch: pytest.MonkeyPatch, engine: Any) -> None:
    """Have the workers of an engine cut calls into passes of no nonces, which fail."""
    call = engine.client.direct.call

    async def of_no_nonces(method: str, *args: Any) -> Any:
        return await call(method, *((*args[:3], -1, *args[4:]) if method == "assay_pass" else args))

    patch.setattr(engine.client.direct, "call", of_no_nonces)


def check_idle(server: Any) -> dict:
    """Check that the workers of an idle server hold nothing; return what the route of its engine
    says.
    """
    held = server.idle_counts()
    assert not any(
        worker[name]
        for worker in held["workers"]
        for name in ("rows", "filled", "streams", "errors")
    )
    assert held["nonces"] == 0
    return dict(held)


def values_of(hooks, key, nonces):
    """Collect what the hooks of a worker hold of a request; nothing of it may be at fault."""
    reply = hooks.collect(key, list(nonces))
    assert (reply["failed"], reply["nonces"], hooks.errors) == ({}, list(nonces), 0)
    return np.frombuffer(reply["values"], reply["dtype"]).reshape(len(nonces), reply["width"])
