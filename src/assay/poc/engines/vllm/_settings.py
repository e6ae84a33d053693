"""Settings of a vLLM engine under which nonces could not run, or would prove another computation."""

from typing import Any

from assay.models.families import FAMILIES
from assay.poc.protocol import CACHES
from assay.streams import dtype_name

EXTENSION = "assay.poc.engines.vllm.WorkerExtension"
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
    from vllm import envs  # type: ignore[import-not-found]
    from vllm.platforms import current_platform  # type: ignore[import-not-found]

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
