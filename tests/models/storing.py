"""Checkpoints in eight and four bits, made on the spot in every format that is read."""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional

from assay.models.eight_bits import (
    Arithmetic,
    EightBitExperts,
    EightBitLinear,
    Rounded,
    float8_blocks,
)
from assay.models.four_bits import AWQ_PLACES, NUMBERS_OF_A_WORD

FORMATS = ("tensor", "channel", "channel-tensors", "block", "block-tensors", "int8")
FOUR_BITS = ("packed", "packed-zeros", "awq", "gptq")


def configure(directory: Path, **settings: object) -> None:
    """Change settings of a checkpoint in its configuration."""
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def rewrite(directory: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Change the tensors of a checkpoint in their file."""
    tensors = load_file(directory / "model.safetensors")
    edit(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def store(source: Path, target: Path, form: str, *, block: int = 32) -> Path:
    """Write a checkpoint with linear layers in one of :data:`FORMATS` or :data:`FOUR_BITS`, as
    tools of the field do.

    ``block`` rows and columns share a scale, or columns in four bits.
    """
    target.mkdir()
    for path in source.iterdir():
        if path.suffix != ".safetensors":
            shutil.copy(path, target / path.name)
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(source / "model.safetensors").items():
        if not name.endswith("_proj.weight"):
            tensors[name] = tensor.to(torch.bfloat16)
        elif form in FOUR_BITS:
            tensors |= _four_bits(name.removesuffix(".weight"), tensor.float(), form, block)
        else:
            scales = f"{name}_scale_inv" if form == "block" else f"{name}_scale"
            tensors[name], tensors[scales] = _rounded(tensor.float(), form, block)
    save_file(tensors, target / "model.safetensors")
    routers = [name.removesuffix(".weight") for name in tensors if name.endswith(".gate.weight")]
    configure(target, quantization_config=described(form, block, whole=["lm_head", *routers]))
    return target


def make_mixture(kind: str, target: Path, **sizes: int) -> Path:
    """Write a mixture of random weights, ``qwen3-moe`` or ``mixtral``, with eight experts of which
    four are asked.
    """
    from transformers import MixtralConfig, MixtralForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if kind == "mixtral":
            own = {
                "num_local_experts": MIXTURE["num_experts"],
                "intermediate_size": MIXTURE["moe_intermediate_size"],
            }
            model: Any = MixtralForCausalLM(MixtralConfig(**MIXTURE | own | sizes))
        else:
            model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**MIXTURE | sizes))
        model.save_pretrained(target)
    return target


def make_hybrid(kind: str, target: Path, **sizes: int) -> Path:
    """Write a model of random weights whose layers keep a state from position to position, or
    attend.

    The kinds are those of transformers: ``falcon_h1``, ``granitemoehybrid``, ``nemotron_h``,
    ``qwen3_next``, ``lfm2`` and ``jamba``. ``sizes`` replace those of :data:`DECODER`.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    mamba = {
        "mamba_n_heads": 8,
        "mamba_d_head": 32,
        "mamba_n_groups": 1,
        "mamba_d_state": 32,
        "mamba_chunk_size": 64,
    }
    linear = {"linear_key_head_dim": 64, "linear_value_head_dim": 64, "linear_num_key_heads": 2}
    own: dict[str, dict[str, Any]] = {
        "falcon_h1": {**mamba, "mamba_d_ssm": 256},
        "granitemoehybrid": {
            **mamba,
            "layer_types": ["mamba", "attention"] * 2,
            "num_local_experts": 0,
            "num_experts_per_tok": 0,
            "shared_intermediate_size": 256,
        },
        "nemotron_h": {
            "layers_block_type": ["mamba", "attention", "mlp", "mamba"],
            "mamba_num_heads": 8,
            "mamba_head_dim": 32,
            "n_groups": 1,
            "ssm_state_size": 32,
            "chunk_size": 64,
        },
        "qwen3_next": {
            **linear,
            "linear_num_value_heads": 4,
            "layer_types": ["linear_attention", "full_attention"] * 2,
            "num_experts": 8,
            "num_experts_per_tok": 4,
            "moe_intermediate_size": 128,
            "shared_expert_intermediate_size": 128,
        },
        # vLLM reads the names of published files, which transformers does not write.
        "lfm2": {
            "layer_types": ["conv", "full_attention"] * 2,
            "block_auto_adjust_ff_dim": False,
            "conv_dim": 128,
            "block_dim": 128,
        },
        "jamba": {
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "num_experts": 1,
            "num_experts_per_tok": 1,
        },
    }
    return _write(
        AutoModelForCausalLM, AutoConfig.for_model(kind, **DECODER | sizes, **own[kind]), target
    )


def make_wrapper(kind: str, target: Path, **sizes: int) -> Path:
    """Write a model of random weights that reads images too: ``idefics3``, ``smolvlm`` or
    ``qwen2_5_vl``.
    """
    from transformers import AutoConfig, AutoModelForImageTextToText

    vision = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    vision |= {"image_size": 32, "patch_size": 16}
    ids = {"image_token_id": 511}
    decoder = DECODER | sizes
    if kind == "qwen2_5_vl":
        of_time = decoder["head_dim"] // 8
        of_space = 3 * decoder["head_dim"] // 16
        rotation = {
            "rope_type": "default",
            "rope_theta": 1e6,
            "mrope_section": [of_time, of_space, of_space],
        }
        vision = {
            "depth": 1,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 2,
            "out_hidden_size": 128,
        }
        vision |= {"fullatt_block_indexes": [0]}
        text = decoder | {"rope_parameters": rotation}
        settings = ids | {
            "video_token_id": 510,
            "vision_start_token_id": 509,
            "vision_end_token_id": 508,
        }
    else:
        text = decoder | {"model_type": "llama"}
        settings = ids | {"scale_factor": 2, "pad_token_id": 0}
    config = AutoConfig.for_model(kind, vision_config=vision, text_config=text, **settings)
    return _write(AutoModelForImageTextToText, config, target)


DECODER: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 512,
    "max_position_embeddings": 256,
    "initializer_range": 0.1,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
"""The sizes of the decoders that :func:`make_hybrid` and :func:`make_wrapper` write."""

MIXTURE = {name: size for name, size in DECODER.items() if not name.endswith("_token_id")} | {
    "moe_intermediate_size": 128,
    "num_experts": 8,
    "num_experts_per_tok": 4,
    "norm_topk_prob": True,
}
"""The sizes of the mixtures that :func:`make_mixture` writes."""


def _write(factory: Any, config: Any, target: Path) -> Path:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        factory.from_config(config).to(torch.bfloat16).save_pretrained(target)
    return target


def in_eight_bits(owner: nn.Module, by: Arithmetic) -> None:
    """Round the linear layers and experts inside a module, as a checkpoint has them that is stored
    so.
    """
    for name, part in list(owner.named_children()):
        if isinstance(part, nn.Linear):
            setattr(
                owner, name, EightBitLinear(rounded_weight(part.weight.detach(), by), part.bias, by)
            )
        elif hasattr(part, "gate_up_proj") and part.gate_up_proj.dim() > 2:
            weights = (
                rounded_weight(weight.detach(), by)
                for weight in (part.gate_up_proj, part.down_proj)
            )
            setattr(owner, name, EightBitExperts(part, *weights, by))
        else:
            in_eight_bits(part, by)


def rounded_weight(weight: torch.Tensor, by: Arithmetic) -> Rounded:
    """A weight [..., R, C] in the format of its arithmetic."""
    if by.block is None:
        return by.round(weight)
    (rows, columns), shape = by.block, weight.shape
    whole = functional.pad(weight.float(), (0, -shape[-1] % columns, 0, -shape[-2] % rows))
    blocks = whole.unflatten(-1, (-1, columns)).unflatten(-3, (-1, rows))
    scales = blocks.abs().amax(dim=(-3, -1)).clamp_min(1e-12) / 448
    values = (blocks / scales[..., :, None, :, None]).flatten(-2).flatten(-3, -2)
    return Rounded(
        values[..., : shape[-2], : shape[-1]].to(torch.float8_e4m3fn).contiguous(), scales
    )


def described(form: str, block: int = 32, whole: Sequence[str] = ("lm_head",)) -> dict[str, Any]:
    """The ``quantization_config`` of a format; ``whole`` names the layers that are not
    quantised.
    """
    if form in ("tensor", "channel", "block"):
        own = {"weight_block_size": [block, block]} if form == "block" else {}
        own["modules_to_not_convert"] = list(whole)
        return {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", **own}
    if form in ("awq", "gptq"):
        own = (
            {"zero_point": True, "version": "gemm"}
            if form == "awq"
            else {"desc_act": False, "sym": True}
        )
        return {"quant_method": form, "bits": 4, "group_size": block, **own}
    if form in FOUR_BITS:
        weights = {
            "num_bits": 4,
            "type": "int",
            "symmetric": form == "packed",
            "strategy": "group",
            "dynamic": False,
        }
        return _compressed("pack-quantized", weights | {"group_size": block}, None, whole)
    kind = "int" if form == "int8" else "float"
    shared = {"num_bits": 8, "type": kind, "symmetric": True}
    weights = shared | {"strategy": "channel", "dynamic": False}
    inputs = shared | {"strategy": "token", "dynamic": True}
    if form == "block-tensors":
        weights |= {"strategy": "block", "block_structure": [block, block]}
        inputs |= {"strategy": "group", "group_size": block}
    return _compressed(f"{kind}-quantized", weights, inputs, whole)


def _compressed(
    kind: str, weights: dict[str, Any], inputs: dict[str, Any] | None, whole: Sequence[str]
) -> dict[str, Any]:
    group = {
        "targets": ["Linear"],
        "weights": weights,
        "input_activations": inputs,
        "output_activations": None,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": kind,
        "config_groups": {"group_0": group},
        "ignore": list(whole),
        "kv_cache_scheme": None,
    }


def packed(
    numbers: torch.Tensor, places: tuple[int, ...] = tuple(range(NUMBERS_OF_A_WORD))
) -> torch.Tensor:
    """The words [..., P] int32 of numbers [..., 8 P] from 0 to 15; the inverse of ``unpacked``."""
    shifts = torch.tensor([4 * place for place in places], device=numbers.device)
    words = (numbers.long().reshape(*numbers.shape[:-1], -1, NUMBERS_OF_A_WORD) << shifts).sum(
        dim=-1
    )
    return torch.where(words < 2**31, words, words - 2**32).to(torch.int32)


def _four_bits(place: str, weight: torch.Tensor, form: str, group: int) -> dict[str, torch.Tensor]:
    """The tensors of a weight [R, C] with a scale for every group of so many columns."""
    groups = weight.unflatten(-1, (-1, group))
    low, high = torch.aminmax(groups, dim=-1)
    own = torch.float16 if form in ("awq", "gptq") else torch.bfloat16
    if form in ("packed", "gptq"):
        scales = (groups.abs().amax(dim=-1) / 7).clamp_min(1e-6).to(own)
        zeros = torch.full_like(scales, 8.0)
    else:
        scales = ((high - low) / 15).clamp_min(1e-6).to(own)
        zeros = (-low / scales).round().clamp(0, 15)
    numbers = ((groups / scales[..., None]).round() + zeros[..., None]).clamp(0, 15).flatten(-2)
    if form == "awq":
        found = {
            "qweight": packed(numbers.t(), AWQ_PLACES),
            "qzeros": packed(zeros.t(), AWQ_PLACES),
        }
        found["scales"] = scales.t()
    elif form == "gptq":
        found = {
            "qweight": packed(numbers).t(),
            "qzeros": packed(zeros.t() - 1),
            "scales": scales.t(),
        }
        found["g_idx"] = torch.arange(weight.shape[1], dtype=torch.int32) // group
    else:
        found = {
            "weight_packed": packed(numbers),
            "weight_shape": torch.tensor(weight.shape),
            "weight_scale": scales,
        }
        if form == "packed-zeros":
            found["weight_zero_point"] = packed(zeros.t()).t()
    return {f"{place}.{name}": tensor.contiguous() for name, tensor in found.items()}


def _rounded(weight: torch.Tensor, form: str, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    if form.startswith("block"):
        return rounded_weight(weight, float8_blocks(block, block))
    largest = (
        weight.abs().amax().reshape(1)
        if form == "tensor"
        else weight.abs().amax(dim=1, keepdim=True)
    )
    if form == "int8":
        return (weight / (largest / 127)).round().to(torch.int8), largest / 127
    values = (weight / (largest / 448)).to(torch.float8_e4m3fn)
    return values, (largest / 448).to(torch.bfloat16 if form == "channel" else torch.float32)


def restored(checkpoint: Path, name: str, block: int = 32) -> torch.Tensor:
    """The weight that a stored tensor stands for, in float64."""
    tensors = load_file(checkpoint / "model.safetensors")
    values = tensors[f"{name}.weight"].double()
    scales = tensors.get(f"{name}.weight_scale", tensors.get(f"{name}.weight_scale_inv")).double()
    if scales.dim() == 2 and scales.shape[1] > 1:
        spread = scales.repeat_interleave(block, 0).repeat_interleave(block, 1)
        return values * spread[: values.shape[0], : values.shape[1]]
    return values * scales.reshape(-1, 1)
