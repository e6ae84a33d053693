"""Number formats in eight or four bits: what a configuration states, and where they run.

What the configuration says decides how the inputs of such layers are rounded, so a configuration
that says anything but what was tested is refused: a model that runs it in another way is another
build.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch.nn import functional

from assay.errors import BackendUnavailable, ModelError, UsageError
from assay.models.eight_bits import CUDA_BLOCK, FLOAT8, INT8, Arithmetic, float8_blocks
from assay.settings import NUMBER_FORMATS as NUMBER_FORMATS

FOUR_BITS = "int4-groups"
"""Name of the number format of weights in four bits, whichever way they are packed."""

_FLOAT8_CAPABILITY = (8, 9)
_TESTED_CAPABILITY = (9, 0)

_ACCEPTED: dict[str, dict[str, tuple[object, ...]]] = {
    "fp8": {"activation_scheme": ("dynamic", None), "fmt": ("e4m3", None)},
    "compressed-tensors": {
        "format": ("float-quantized", "int-quantized", "naive-quantized", "pack-quantized"),
        "kv_cache_scheme": (None, {}),
        "transform_config": (None, {}),  # rotations that other engines take around products
    },
    "awq": {"bits": (4,), "version": ("gemm", "GEMM", None), "zero_point": (True,)},
    "gptq": {
        "bits": (4,),
        "desc_act": (False,),
        "sym": (True,),
        "checkpoint_format": ("gptq", None),
    },
    "pack-quantized": {
        "num_bits": (4,),
        "type": ("int",),
        "actorder": (None,),
        "dynamic": (False, None),
        "symmetric": (True, False),
        "strategy": ("group", "channel"),
    },
}
"""Values that keys may have, by ``quant_method``; for weights of compressed-tensors in four bits by
their format.
"""


@dataclass(frozen=True)
class StoredFormat:
    """How the linear layers of a checkpoint are stored.

    Args:
        name: Name of the number format: ``float8`` has a scale for a row or the whole weight,
            ``float8-block`` one for a block of rows and columns, ``int8-rows`` one for a row or the
            whole weight, ``int4-groups`` one for a group of columns of a row.
        block: Rows and columns of a weight that share a scale; None where a row or the whole weight
            has one.
        packing: How weights in four bits are packed; None for eight bits.
        group: Columns that share a scale in four bits; None for all of a row.
        zeros: Whether groups in four bits have a stored zero.
    """

    name: str
    block: tuple[int, int] | None = None
    packing: Literal["compressed-tensors", "awq", "gptq"] | None = None
    group: int | None = None
    zeros: bool = False

    @property
    def arithmetic(self) -> Arithmetic:
        """How its layers in eight bits are computed."""
        if self.block:
            return float8_blocks(*self.block)
        return INT8 if self.name == INT8.name else FLOAT8

    @property
    def dtype(self) -> str:
        """Dtype of the weights, as the header of a safetensors file has it."""
        return {INT8.name: "I8", FOUR_BITS: "I32"}.get(self.name, "F8_E4M3")


def read_format(reference: str, published: Mapping[str, Any]) -> StoredFormat | None:
    """Return the format that a configuration states; None where weights are not quantised.

    Raises:
        ModelError: A format that is not read; names the key and the value.
    """
    if (stated := published.get("quantization_config")) is None:
        return None
    stated = stated if isinstance(stated, dict) else {}
    try:
        return _parse_format(stated)
    except ModelError as error:
        raise ModelError(f"{reference!r} {error.seen}", wanted=error.wanted, do=error.do) from None


def _parse_format(stated: Mapping[str, Any]) -> StoredFormat:
    method = _require(stated, "quant_method", "fp8", "compressed-tensors", "awq", "gptq")
    _require_all(stated, _ACCEPTED[method])
    if method == "compressed-tensors":
        return _parse_compressed_tensors(stated)
    if method == "fp8":
        block = stated.get("weight_block_size")
        if block is None:
            return StoredFormat("float8")
        return StoredFormat("float8-block", _parse_block(block))
    group = _parse_group(stated.get("group_size"))
    return StoredFormat(FOUR_BITS, packing=method, group=group, zeros=method == "awq")


def _parse_compressed_tensors(stated: Mapping[str, Any]) -> StoredFormat:
    groups = stated.get("config_groups")
    group = next(iter(groups.values())) if isinstance(groups, dict) and len(groups) == 1 else None
    if not isinstance(group, dict):
        raise _refusal("config_groups", groups, "one group")
    weights = group.get("weights") or {}
    inputs = group.get("input_activations") or {}
    if not isinstance(weights, dict) or not isinstance(inputs, dict):
        raise _refusal("config_groups", group, "weights and input_activations")
    _require(group, "output_activations", None)
    if stated["format"] == "pack-quantized":
        _require(group, "input_activations", None)
        return _parse_packed(weights)
    # Products here have eight bits on both sides.
    for part in (weights, inputs):
        _require_all(part, {"num_bits": (8,), "symmetric": (True, None)})
    _require(inputs, "dynamic", True)
    kinds = {"float-quantized": ("float",), "int-quantized": ("int",)}
    kind = _require(weights, "type", *kinds.get(stated["format"], ("float", "int")))
    _require(inputs, "type", kind)
    strategies = ("channel", "tensor") if kind == "int" else ("channel", "tensor", "block")
    if _require(weights, "strategy", *strategies) == "block":
        _require(inputs, "strategy", "group")
        block = _parse_block(weights.get("block_structure"))
        _require(inputs, "group_size", block[1])
        return StoredFormat("float8-block", block)
    _require(inputs, "strategy", "token")
    return StoredFormat("int8-rows" if kind == "int" else "float8")


def _parse_packed(weights: Mapping[str, Any]) -> StoredFormat:
    _require_all(weights, _ACCEPTED["pack-quantized"])
    by_row = weights["strategy"] == "channel"
    group = None if by_row else _parse_group(weights.get("group_size"))
    return StoredFormat(
        FOUR_BITS, packing="compressed-tensors", group=group, zeros=not weights["symmetric"]
    )


def _parse_group(value: object) -> int | None:
    if value == -1:
        return None
    if type(value) is not int or value < 1:
        raise _refusal("group_size", value, "-1, or a number of at least 1, such as 128")
    return value


def _parse_block(value: object) -> tuple[int, int]:
    is_pair = isinstance(value, list | tuple) and len(value) == 2
    if not is_pair or any(type(size) is not int or size < 1 for size in value):  # type: ignore[attr-defined]
        raise _refusal(
            "the size of a block", value, "two numbers of at least 1, such as [128, 128]"
        )
    return value[0], value[1]  # type: ignore[index]


def _require(stated: Mapping[str, Any], key: str, *allowed: object) -> Any:
    value = stated.get(key)
    if value not in allowed:
        raise _refusal(key, value, " or ".join(map(str, allowed)))
    return value


def _require_all(stated: Mapping[str, Any], accepted: Mapping[str, tuple[object, ...]]) -> None:
    for key, allowed in accepted.items():
        _require(stated, key, *allowed)


def _refusal(key: str, value: object, wanted: str) -> ModelError:
    return ModelError(
        f"is quantised with {key} {value!r:.80}",
        wanted=wanted,
        do="use the checkpoint before quantisation, or one in a format of docs/models.md",
    )


def check_format(form: StoredFormat, device: torch.device) -> None:
    """Refuse a stored format on a kind of device on which it was not tested."""
    # Weights in four bits are restored when they are loaded: their products are the dtype's.
    if device.type == "cpu" or form.name == FOUR_BITS:
        return
    if form.name == FLOAT8.name:
        check_rounding(form.name, device)
        return
    if form.block is not None and form.block != CUDA_BLOCK:
        raise BackendUnavailable(
            "{} with a scale for {} x {} numbers, on {}".format(form.name, *form.block, device),
            wanted="blocks of {} x {} on CUDA".format(*CUDA_BLOCK),
            do="pass --device cpu, or use vLLM",
        )
    libraries = find_spec("triton") is not None and hasattr(functional, "scaled_mm")
    if not libraries or torch.cuda.get_device_capability(device) != _TESTED_CAPABILITY:
        raise BackendUnavailable(
            f"{form.name} on {device}",
            wanted="a CPU, or an H100 or H200 with torch 2.10 or later and triton, on which it was "
            "tested",
            do="pass --device cpu, or use vLLM",
        )


def check_rounding(name: str | None, device: torch.device) -> None:
    """Refuse a number format to round weights to that is unknown, or that a device lacks."""
    if name is None:
        return
    if name != FLOAT8.name:
        raise UsageError(
            f"quantise={name!r}",
            wanted=FLOAT8.name,
            do="choose it, or leave it out",
            field="quantise",
        )
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < _FLOAT8_CAPABILITY:
        raise BackendUnavailable(
            f"float8 on {device}",
            wanted="a CUDA device of compute capability 8.9 or more, or a CPU",
            do="use --device cpu, or a device such as an H100",
        )
