"""Which checkpoints run on vLLM: formats, layers with state and caches, each where it was run."""

from collections.abc import Mapping
from typing import Any

import torch

from assay.errors import UsageError
from assay.models import StoredFormat, stored_format
from assay.models.device import processor
from assay.poc.engines.vllm._settings import rounded_cache, stated
from assay.poc.engines.vllm._versions import check_since
from assay.streams import dtype_name

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
