"""Checkpoints that are stored in eight or four bits: what a configuration states, and where it can be run.

What the configuration says decides how the inputs of such layers are rounded, so a configuration that says anything but
what was tested is refused: a model that runs it in another way is another build.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch.nn import functional

from assay.errors import BackendUnavailable, ModelError
from assay.models.eight_bits import CUDA_BLOCK, FLOAT8, INT8, Arithmetic, float8_blocks
from assay.models.quantise import check_quantisation

_TESTED_CAPABILITY = (9, 0)
_DO = "use the checkpoint before quantisation, or one in a format of docs/models.md"

FOUR_BITS = "int4-groups"
"""Name of the number format of weights in four bits, whichever way they are packed."""

Packing = Literal["compressed-tensors", "awq", "gptq"]


@dataclass(frozen=True)
class StoredFormat:
    """How the linear layers of a checkpoint are stored.

    Args:
        name: Name of the number format: ``float8`` has a scale for a row or the whole weight, ``float8-block`` one for
            a block of rows and columns, ``int8-rows`` one for a row or the whole weight, ``int4-groups`` one for a
            group of columns of a row.
        block: Rows and columns of a weight that share a scale; None where a row or the whole weight has one.
        packing: How weights in four bits are packed; None for eight bits.
        group: Columns that share a scale in four bits; None for all of a row.
        zeros: Whether groups in four bits have a stored zero.
    """

    name: str
    block: tuple[int, int] | None = None
    packing: Packing | None = None
    group: int | None = None
    zeros: bool = False

    @property
    def arithmetic(self) -> Arithmetic:
        """How its layers in eight bits are computed."""
        return float8_blocks(*self.block) if self.block else INT8 if self.name == INT8.name else FLOAT8

    @property
    def dtype(self) -> str:
        """Dtype of the weights, as the header of a safetensors file has it."""
        return {INT8.name: "I8", FOUR_BITS: "I32"}.get(self.name, "F8_E4M3")


def stored_format(reference: str, published: Mapping[str, Any]) -> StoredFormat | None:
    """Return the format that a configuration states; None for weights that are not quantised.

    Raises:
        ModelError: It is not one that is read; names the key and its value.
    """
    stated = published.get("quantization_config")
    if stated is None:
        return None
    readers: dict[str, Callable[[Mapping[str, Any]], StoredFormat]] = {
        "fp8": _float8,
        "compressed-tensors": _compressed_tensors,
        "awq": _awq,
        "gptq": _gptq,
    }
    method = stated.get("quant_method") if isinstance(stated, dict) else None
    try:
        if not isinstance(method, str) or method not in readers:
            raise _Unread("quant_method", method, " or ".join(readers))
        return readers[method](stated)
    except _Unread as error:
        raise ModelError(
            f"{reference!r} is quantised with {error.key} {error.value!r:.80}", wanted=error.wanted, do=_DO
        ) from None


class _Unread(Exception):
    def __init__(self, key: str, value: object, wanted: str) -> None:
        super().__init__(key)
        self.key, self.value, self.wanted = key, value, wanted


def _require(stated: Mapping[str, Any], key: str, *allowed: object) -> Any:
    value = stated.get(key)
    if value not in allowed:
        raise _Unread(key, value, " or ".join(map(str, allowed)))
    return value


def _float8(stated: Mapping[str, Any]) -> StoredFormat:
    _require(stated, "activation_scheme", "dynamic", None)
    _require(stated, "fmt", "e4m3", None)
    block = stated.get("weight_block_size")
    return StoredFormat("float8") if block is None else StoredFormat("float8-block", _block(block))


def _compressed_tensors(stated: Mapping[str, Any]) -> StoredFormat:
    kind = _require(stated, "format", "float-quantized", "int-quantized", "naive-quantized", "pack-quantized")
    _require(stated, "kv_cache_scheme", None, {})
    groups = stated.get("config_groups")
    group = next(iter(groups.values())) if isinstance(groups, dict) and len(groups) == 1 else None
    if not isinstance(group, dict):
        raise _Unread("config_groups", groups, "one group")
    weights, inputs = (group.get(name) or {} for name in ("weights", "input_activations"))
    if not isinstance(weights, dict) or not isinstance(inputs, dict):
        raise _Unread("config_groups", group, "weights and input_activations")
    _require(group, "output_activations", None)
    if kind == "pack-quantized":
        _require(group, "input_activations", None)
        return _packed(weights)
    _require(weights, "num_bits", 8)
    _require(weights, "symmetric", True, None)
    _require(inputs, "num_bits", 8)
    _require(inputs, "dynamic", True)
    _require(inputs, "symmetric", True, None)
    wanted = {"float-quantized": "float", "int-quantized": "int"}.get(kind)
    number = _require(weights, "type", *(("float", "int") if wanted is None else (wanted,)))
    _require(inputs, "type", number)
    if number == "int":
        _require(weights, "strategy", "channel", "tensor")
        _require(inputs, "strategy", "token")
        return StoredFormat("int8-rows")
    if _require(weights, "strategy", "channel", "tensor", "block") == "block":
        _require(inputs, "strategy", "group")
        block = _block(weights.get("block_structure"))
        _require(inputs, "group_size", block[1])
        return StoredFormat("float8-block", block)
    _require(inputs, "strategy", "token")
    return StoredFormat("float8")


def _packed(weights: Mapping[str, Any]) -> StoredFormat:
    _require(weights, "num_bits", 4)
    _require(weights, "type", "int")
    _require(weights, "actorder", None)
    _require(weights, "dynamic", False, None)
    zeros = not _require(weights, "symmetric", True, False)
    whole = _require(weights, "strategy", "group", "channel") == "channel"
    group = None if whole else _group(weights.get("group_size"))
    return StoredFormat(FOUR_BITS, packing="compressed-tensors", group=group, zeros=zeros)


def _awq(stated: Mapping[str, Any]) -> StoredFormat:
    _require(stated, "bits", 4)
    _require(stated, "version", "gemm", "GEMM", None)
    _require(stated, "zero_point", True)
    return StoredFormat(FOUR_BITS, packing="awq", group=_group(stated.get("group_size")), zeros=True)


def _gptq(stated: Mapping[str, Any]) -> StoredFormat:
    _require(stated, "bits", 4)
    _require(stated, "desc_act", False)
    _require(stated, "sym", True)
    _require(stated, "checkpoint_format", "gptq", None)
    return StoredFormat(FOUR_BITS, packing="gptq", group=_group(stated.get("group_size")))


def _group(value: object) -> int | None:
    if value == -1:
        return None
    if type(value) is not int or value < 1:
        raise _Unread("group_size", value, "-1, or a number of at least 1, such as 128")
    return value


def _block(value: object) -> tuple[int, int]:
    if not isinstance(value, list | tuple) or len(value) != 2 or any(type(n) is not int or n < 1 for n in value):
        raise _Unread("the size of a block", value, "two numbers of at least 1, such as [128, 128]")
    return value[0], value[1]


def check_device(form: StoredFormat, device: torch.device) -> None:
    """Refuse a format on a kind of device on which it was not tested.

    Raises:
        BackendUnavailable: The device is neither a CPU nor a CUDA device whose products in the format were tested.
    """
    if device.type == "cpu" or form.name == FOUR_BITS:  # whose weights are restored, and whose products are the dtype's
        return
    if form.name == FLOAT8.name:
        check_quantisation(form.name, device)
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
            wanted="a CPU, or an H100 or H200 with torch 2.10 or later and triton, on which it was tested",
            do="pass --device cpu, or use vLLM",
        )
