"""Which vLLM this was written for: every name of it that is used, and the settings under which nonces run.

vLLM's internals change with every release. What is missing is refused here in words when an engine starts, instead of
failing in a request at night.
"""

import importlib
from collections.abc import Mapping, Sequence
from operator import attrgetter
from typing import Any

from assay.errors import BackendUnavailable, UsageError
from assay.poc.engines.vllm._checkpoints import check_checkpoint
from assay.poc.engines.vllm._settings import (
    refusals,
    refusals_of_device,
    refusals_of_executor,
    refusals_of_own_forward,
)
from assay.poc.engines.vllm._versions import NEWER, check_since, older_version, tested_version

USED: Mapping[str, tuple[str, ...]] = {
    "vllm.v1.engine.async_llm:AsyncLLM": ("generate", "collective_rpc", "from_vllm_config", "shutdown"),
    "vllm.v1.engine.output_processor:OutputProcessor": (
        "get_num_unfinished_requests",
        "add_request",
        "process_outputs",
    ),
    "vllm.v1.engine:EngineCoreOutput": ("request_id", "new_token_ids"),
    "vllm.v1.worker.worker_base:WorkerBase": ("execute_model",),
    "vllm.v1.core.sched.output:NewRequestData": (
        "req_id",
        "prompt_token_ids",
        "prompt_embeds",
        "prompt_is_token_ids",
        "sampling_params",
    ),
    "vllm.v1.engine:EngineCoreRequest": (
        "request_id",
        "external_req_id",
        "sampling_params",
        "prompt_token_ids",
        "prompt_embeds",
        "mm_features",
        "lora_request",
        "resumable",
    ),
    "vllm:SamplingParams": ("max_tokens", "temperature", "detokenize", "output_kind", "skip_reading_prefix_cache"),
}
BOTH = ("device", "execute_model", "execute_model_state", "sample_tokens")
RUNNER: Mapping[str, tuple[str, ...]] = {
    "v1": (*BOTH, "input_batch.num_computed_tokens_cpu", "input_batch.num_prompt_tokens", "input_batch.req_ids"),
    "v2": BOTH,
}
OF_RUNNER: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "v1": {"vllm.v1.worker.gpu_model_runner:ExecuteModelState": ("scheduler_output", "hidden_states")},
    "v2": {
        "vllm.v1.worker.gpu.model_runner:ExecuteModelState": ("input_batch", "hidden_states"),
        "vllm.v1.worker.gpu.input_batch:InputBatch": (
            "req_ids",
            "num_reqs",
            "query_start_loc_np",
            "num_computed_tokens_np",
            "prefill_len_np",
            "positions",
        ),
    },
}

SEVERAL: Mapping[str, tuple[str, ...]] = {
    "vllm.v1.engine.core_client:DPLBAsyncMPClient": ("call_utility_all_async",),
    "vllm.config:ParallelConfig": ("data_parallel_index",),
}
"""Names that are used where there are several data-parallel engines."""


STEPPING_TOGETHER: tuple[str, ...] = ("cuda",)
"""Kinds of device on which data-parallel engines of a mixture were run: their steps wait for each other's experts."""


def check_installed() -> str:
    """Return the version of vLLM.

    Raises:
        BackendUnavailable: vLLM is not installed, was not tested in this version, or lacks a name that is used.
    """
    version = tested_version()
    refuse_missing(f"vLLM {version}", _missing(USED))
    return version


def refuse_missing(owner: str, names: Sequence[str]) -> None:
    """Refuse a vLLM that lacks names that are used; the refusal lists them."""
    if names:
        raise BackendUnavailable(
            f"{owner} without {', '.join(names)}",
            wanted="every name of vLLM that is used",
            do="install a released version that was tested",
        )


def runner_kind(runner: Any) -> str:
    """Return ``v2`` for the model runner of ``vllm/v1/worker/gpu``, ``v1`` for the older one."""
    modules = {base.__module__ for base in type(runner).__mro__}
    return "v2" if any(module.startswith("vllm.v1.worker.gpu.") for module in modules) else "v1"


def missing_in_runner(runner: Any) -> list[str]:
    """Return the names that a worker's model runner lacks; called inside the worker, before anything is wrapped."""
    kind = runner_kind(runner)
    lacking = _missing(OF_RUNNER[kind])
    for path in RUNNER[kind]:
        try:
            attrgetter(path)(runner)
        except AttributeError:
            lacking.append(f"{type(runner).__name__}.{path}")
    return lacking


def check_config(config: Any, *, forward: str = "vllm") -> None:
    """Refuse settings of a vLLM engine under which nonces could not run, or would prove another computation.

    Args:
        config: vLLM's ``VllmConfig``.
        forward: Whose forward pass is to compute nonces, of ``ThrottleSettings.forward``.

    Raises:
        UsageError: Names the first such setting.
        ModelError: The checkpoint is quantised in a way that is not read.
    """
    _check_engines(config)
    parallel = config.parallel_config
    if parallel.distributed_executor_backend == "ray":
        check_since("Ray", "leave --distributed-executor-backend out")
    if getattr(parallel, "nnodes", 1) > 1:
        check_since("workers on several hosts", "leave --nnodes out")
    for refused, seen, wanted, do in (*refusals(config), *refusals_of_device(config), *refusals_of_executor(config)):
        if refused:
            raise UsageError(f"vLLM with {seen}", wanted=wanted, do=do)
    check_checkpoint(config)
    if forward == "assay":
        _check_own_forward(config)


def check_several_servers() -> None:
    """Refuse several API servers of one engine on a vLLM that is older than the one on which they were run.

    Raises:
        UsageError: It is older.
    """
    check_since("several API servers", "pass --api-server-count 1")


def _check_own_forward(config: Any) -> None:
    """Refuse an engine over whose weights assay's own decoder cannot run; of the rest the worker says it."""
    if found := older_version():
        raise own_forward_refused(f"vLLM {found}", NEWER)
    for refused, seen, wanted in refusals_of_own_forward(config):
        if refused:
            raise own_forward_refused(seen, wanted)


def own_forward_refused(seen: str, wanted: str) -> UsageError:
    """Return the refusal of ``ASSAY_VLLM_FORWARD=assay``, which is never left silently for the other way."""
    return UsageError(
        f"ASSAY_VLLM_FORWARD=assay with {seen}",
        wanted=wanted,
        do="leave it out: vLLM's own forward pass computes the nonces then",
    )


def _check_engines(config: Any) -> None:
    """Refuse data-parallel engines that do not run by themselves behind one API server."""
    parallel, device = config.parallel_config, str(config.device_config.device_type)
    if parallel.data_parallel_size == 1:
        return
    missing = _missing(SEVERAL)
    balanced = parallel.data_parallel_external_lb or parallel.data_parallel_hybrid_lb
    local = parallel.data_parallel_size_local == parallel.data_parallel_size and parallel.data_parallel_backend == "mp"
    for refused, seen in (
        (missing, f"and without {', '.join(missing)}"),
        (
            config.model_config.is_moe and device not in STEPPING_TOGETHER,
            f"of a mixture on {device}, which step together",
        ),
        (balanced, "behind another load balancer"),
        (not local, "that it does not start on this host by itself"),
    ):
        if refused:
            raise UsageError(
                f"vLLM with {parallel.data_parallel_size} data-parallel engines {seen}",
                wanted="engines on one host behind one server, of a dense model unless on a GPU, with vLLM 0.32",
                do="start one server per engine, each with its own node_id and data directory",
            )


def _missing(wanted: Mapping[str, tuple[str, ...]]) -> list[str]:
    found: list[str] = []
    for target, names in wanted.items():
        module, _, name = target.partition(":")
        try:
            owner = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError):
            found.append(target.replace(":", "."))
            continue
        fields = getattr(owner, "__annotations__", {})
        found += [f"{name}.{field}" for field in names if field not in fields and not hasattr(owner, field)]
    return found
