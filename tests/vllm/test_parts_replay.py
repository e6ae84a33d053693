"""The start of a vLLM that replays, and what any start of vLLM shares, with a stand-in for the engine."""

import os
from types import SimpleNamespace
from typing import Any

import pytest

from assay.errors import BackendUnavailable, ModelError, UsageError
from assay.poc.vllm import prefill as _vllm_prefill
from assay.poc.vllm import starting as _starting
from assay.poc.vllm.prefill import VLLMPrefill
from assay.poc.vllm.starting import explained_start, fit_machine


class Engine:
    """What stands in for vLLM's ``LLM``: its workers reply as they are told, and it notes that it was ended."""

    def __init__(self, reply: Any) -> None:
        self.reply, self.ended = reply, 0
        self.llm_engine = SimpleNamespace(engine_core=self)

    def collective_rpc(self, name: str, args: tuple) -> Any:
        if isinstance(self.reply, Exception):
            raise self.reply
        return self.reply

    def shutdown(self) -> None:
        self.ended += 1


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The options with which an engine was started, and the engine that a test puts there, on a machine without it."""
    found: dict[str, Any] = {}

    def start(self: VLLMPrefill, directory: str, options: dict[str, Any]) -> Any:
        found["options"] = options
        return found["engine"]

    monkeypatch.setattr(VLLMPrefill, "_started", start)
    monkeypatch.setattr(_vllm_prefill, "check_installed", lambda: "0.32.0")
    monkeypatch.setattr(_starting, "runs_on_cpu", lambda: True)
    return found


@pytest.mark.parametrize("name", _vllm_prefill._OWN)
def test_an_option_that_says_what_a_replay_computes_is_refused_by_its_flag(name: str, started: dict[str, Any]):
    with pytest.raises(UsageError) as refusal:
        VLLMPrefill("reference:qwen3", dtype="float32", **{name: "other"})
    assert started == {}
    flag = "--" + name.replace("_", "-")
    assert refusal.value.seen.startswith(f"{flag} ")
    assert f"leave {flag} out of ASSAY_VLLM_ARGS" in refusal.value.do


def test_an_engine_that_replays_may_be_given_its_memory(started: dict[str, Any]):
    for options in ({}, {"gpu_memory_utilization": 0.2}, {"kv_cache_memory_bytes": 5, "max_num_seqs": 2}):
        started["engine"] = Engine([[]])
        with VLLMPrefill("reference:qwen3", dtype="float32", **options):
            assert started["engine"].ended == 0
        assert started["engine"].ended == 1
        wanted = {} if "gpu_memory_utilization" in options else {"kv_cache_memory_bytes": _starting.CPU_KV_BYTES}
        assert started["options"] == wanted | options


@pytest.mark.parametrize(
    ("reply", "error", "words"),
    [
        ([["gather"], []], BackendUnavailable, "workers of vLLM without gather"),
        (RuntimeError("gone"), ModelError, "vLLM does not start: RuntimeError: gone"),
    ],
)
def test_an_engine_whose_workers_are_not_as_they_must_be_is_ended(
    reply: Any, error: type[Exception], words: str, started: dict[str, Any]
):
    started["engine"] = Engine(reply)
    with pytest.raises(error, match=words):
        VLLMPrefill("reference:qwen3", dtype="float32")
    assert started["engine"].ended == 1


def test_a_share_of_the_memory_is_not_overruled_on_a_cpu(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(_starting, "runs_on_cpu", lambda: True)
    assert fit_machine("float32", {"max_num_seqs": 1}) == {"kv_cache_memory_bytes": _starting.CPU_KV_BYTES}
    assert fit_machine("float32", {"gpu_memory_utilization": 0.3}) == {}


@pytest.mark.parametrize("chosen", [None, "fork"])
def test_a_replay_on_a_gpu_starts_its_processes_anew_unless_the_user_chose_another_way(
    chosen: str | None, started: dict[str, Any], monkeypatch: pytest.MonkeyPatch
):
    for name in ("VLLM_WORKER_MULTIPROC_METHOD", "TRITON_F32_DEFAULT"):
        monkeypatch.setenv(name, "")  # has what the start sets undone
        monkeypatch.delenv(name)
    if chosen:
        monkeypatch.setenv("VLLM_WORKER_MULTIPROC_METHOD", chosen)
    monkeypatch.setattr(_starting, "runs_on_cpu", lambda: False)
    started["engine"] = Engine([[]])
    with VLLMPrefill("reference:qwen3", dtype="float32", max_num_seqs=2):
        assert os.environ["VLLM_WORKER_MULTIPROC_METHOD"] == (chosen or "spawn")
    assert os.environ["TRITON_F32_DEFAULT"] == "ieee"
    assert started["options"] == {"max_num_seqs": 2}


@pytest.mark.parametrize(
    ("raised", "error", "words"),
    [
        (TypeError("no option x"), UsageError, "options of vLLM: no option x"),
        (ValueError("of 3"), UsageError, "options of vLLM: of 3"),
        (OSError("no file"), ModelError, "vLLM does not start: OSError: no file"),
        (BackendUnavailable("as it is", wanted="w", do="d"), BackendUnavailable, "as it is"),
    ],
)
def test_what_stops_a_start_is_said_in_words(raised: Exception, error: type[Exception], words: str):
    with pytest.raises(error, match=words), explained_start():
        raise raised
