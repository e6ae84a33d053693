"""Checkpoints that are stored in eight bits: which there are, and how their weights come into a model as they are.

A layer is in eight bits where the checkpoint stores its weight so, and nowhere else. Its scales stand beside it. What
the configuration says decides how the inputs of such layers are rounded, so a configuration that says anything but what
was tested is refused: a model that runs it in another way is another build.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn import functional

from assay.errors import BackendUnavailable, BadWeights, ModelError
from assay.models._checkpoint import EIGHT_BITS, Stored
from assay.models._quantise import check_experts, check_quantisation
from assay.models._random import build
from assay.models._resolve import Source
from assay.models.eight_bits import (
    CUDA_BLOCK,
    FLOAT8,
    INT8,
    Arithmetic,
    EightBitExperts,
    EightBitLinear,
    float8_blocks,
)
from assay.models.float8 import Rounded

if TYPE_CHECKING:
    from transformers import PreTrainedModel

T = TypeVar("T")
_SCALES = ("weight_scale", "weight_scale_inv")
_TESTED_CAPABILITY = (9, 0)
_DO = "use the checkpoint before quantisation, or one in eight bits with dynamic inputs"


@dataclass(frozen=True)
class StoredFormat:
    """How the linear layers of a checkpoint are stored.

    Args:
        name: Name of the number format: ``float8`` has a scale for a row or the whole weight, ``float8-block`` one for
            a block of rows and columns, ``int8-rows`` one for a row or the whole weight.
        block: Rows and columns of a weight that share a scale; None where a row or the whole weight has one.
    """

    name: str
    block: tuple[int, int] | None = None

    @property
    def arithmetic(self) -> Arithmetic:
        """How its layers are computed."""
        return float8_blocks(*self.block) if self.block else INT8 if self.name == INT8.name else FLOAT8

    @property
    def dtype(self) -> str:
        """Dtype of the weights, as the header of a safetensors file has it."""
        return "I8" if self.name == INT8.name else "F8_E4M3"


def stored_format(reference: str, published: Mapping[str, Any]) -> StoredFormat | None:
    """Return the format that a configuration states; None for weights that are not quantised.

    Raises:
        ModelError: It is not one that is read; names the key and its value.
    """
    stated = published.get("quantization_config")
    if stated is None:
        return None
    readers: dict[Any, Callable[[Mapping[str, Any]], StoredFormat]] = {
        "fp8": _float8,
        "compressed-tensors": _compressed_tensors,
    }
    method = stated.get("quant_method") if isinstance(stated, dict) else None
    try:
        if method not in readers:
            raise _Unread("quant_method", method, "fp8 or compressed-tensors")
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
    kind = _require(stated, "format", "float-quantized", "int-quantized", "naive-quantized")
    _require(stated, "kv_cache_scheme", None, {})
    groups = stated.get("config_groups")
    group = next(iter(groups.values())) if isinstance(groups, dict) and len(groups) == 1 else None
    if not isinstance(group, dict):
        raise _Unread("config_groups", groups, "one group")
    weights, inputs = (group.get(name) or {} for name in ("weights", "input_activations"))
    if not isinstance(weights, dict) or not isinstance(inputs, dict):
        raise _Unread("config_groups", group, "weights and input_activations")
    _require(group, "output_activations", None)
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


def _block(value: object) -> tuple[int, int]:
    if not isinstance(value, list | tuple) or len(value) != 2 or any(type(n) is not int or n < 1 for n in value):
        raise _Unread("the size of a block", value, "two numbers of at least 1, such as [128, 128]")
    return value[0], value[1]


def check_device(form: StoredFormat, device: torch.device) -> None:
    """Refuse a format on a kind of device on which it was not tested.

    Raises:
        BackendUnavailable: The device is neither a CPU nor a CUDA device whose products in the format were tested.
    """
    if device.type == "cpu":
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


def load_stored(source: Source, tensors: list[Stored], form: StoredFormat, dtype: torch.dtype) -> "PreTrainedModel":
    """Return the model of a checkpoint in eight bits, on the CPU.

    Args:
        source: Where the model comes from.
        tensors: All tensors of the checkpoint.
        form: Format that the configuration states.
        dtype: Dtype of everything that is not in eight bits.

    Raises:
        BadWeights: A tensor is missing, surplus, or of another shape or dtype than the configuration says.
        ModelError: Experts are stored in another way than those of Qwen3.
    """
    reader = _Reader(source.reference, tensors, form, dtype)
    if not any(tensor.dtype == form.dtype for tensor in tensors):
        raise reader.bad(f"its configuration says that it is quantised, and no tensor is stored as {form.dtype}")
    module = build(source.config, dtype)
    _fill(module, "", reader)
    if module.config.tie_word_embeddings:
        tied: Any = module
        tied.tie_weights()
    reader.check_all_taken()
    return module


class _Reader:
    """Reads the tensors of a checkpoint by name, each once."""

    def __init__(self, reference: str, tensors: list[Stored], form: StoredFormat, dtype: torch.dtype) -> None:
        self.form, self.dtype = form, dtype
        self._reference, self._tensors, self._left = reference, {t.name: t for t in tensors}, {t.name for t in tensors}

    def has(self, name: str) -> bool:
        return name in self._tensors

    def is_rounded(self, name: str) -> bool:
        """Return whether a weight is stored in eight bits.

        Raises:
            BadWeights: It is in other eight bits than the configuration says.
        """
        stored = self._tensors.get(name)
        if stored is None or stored.dtype not in EIGHT_BITS:
            return False
        if stored.dtype != self.form.dtype:
            raise self.bad(f"{name!r} is stored as {stored.dtype}, and the format is {self.form.name}")
        return True

    def read(self, name: str, shape: torch.Size | None = None) -> Tensor:
        """Return a tensor, which must have the shape where one is given."""
        stored = self._tensors.get(name)
        if stored is None:
            raise self.bad(f"{name!r} is missing")
        if shape is not None and stored.shape != tuple(shape):
            raise self.bad(f"{name!r} has the shape {list(stored.shape)}, not {list(shape)}")
        self._left.discard(name)
        with safe_open(stored.file, framework="pt") as file:
            tensor: Tensor = file.get_tensor(name)
            return tensor

    def plain(self, name: str, shape: torch.Size) -> Tensor:
        """Return a tensor that is not in eight bits, in the dtype of the model."""
        if self.is_rounded(name):
            raise self.bad(f"{name!r} is stored in eight bits, and it is no weight of a linear layer")
        return self.read(name, shape).to(self.dtype)

    def rounded(self, name: str, shape: torch.Size) -> Rounded:
        """Return a weight in eight bits with its scales, as its layer takes them."""
        values = self.read(f"{name}.weight", shape)
        names = [f"{name}.{end}" for end in _SCALES if self.has(f"{name}.{end}")]
        if len(names) != 1:
            raise self.bad(f"{name!r} has {len(names)} tensors of scales")
        scales = self.read(names[0]).float()
        rows, columns = shape
        if self.form.block is not None:
            wanted: tuple[int, ...] = (-(-rows // self.form.block[0]), -(-columns // self.form.block[1]))
        else:
            wanted = (rows, 1)
            scales = scales.reshape(-1, 1).expand(rows, 1) if scales.numel() == 1 else scales.reshape(-1, 1)
        if tuple(scales.shape) != wanted or not bool((scales > 0).all()):
            raise self.bad(f"{names[0]!r} has the shape {list(scales.shape)}, or scales that are not positive")
        return Rounded(values, scales.contiguous())

    def bad(self, seen: str) -> BadWeights:
        return BadWeights(
            f"{self._reference!r}: {seen}",
            wanted=f"exactly the tensors of the configuration, with linear layers in {self.form.name}",
            do="download or save the checkpoint again",
        )

    def check_all_taken(self) -> None:
        if self._left:
            raise self.bad(f"{len(self._left)} tensors are surplus, the first is {min(self._left)!r}")


def _fill(owner: nn.Module, prefix: str, reader: _Reader) -> None:
    """Give a module and all inside it what the checkpoint stores, and put layers in eight bits where it has them."""
    for name, parameter in owner.named_parameters(recurse=False):
        parameter.data = reader.plain(prefix + name, parameter.shape)
    for name, part in list(owner.named_children()):
        place = f"{prefix}{name}"
        if isinstance(part, nn.Linear):
            if reader.is_rounded(f"{place}.weight"):
                setattr(owner, name, _layer(part, place, reader))
            elif reader.has(f"{place}.weight") or place != "lm_head":
                _fill(part, f"{place}.", reader)
        elif any(weight.dim() > 2 for weight in part.parameters(recurse=False)):
            setattr(owner, name, _experts(part, place, reader))
        else:
            _fill(part, f"{place}.", reader)


def _layer(linear: nn.Linear, place: str, reader: _Reader) -> EightBitLinear:
    weight = reader.rounded(place, linear.weight.shape)
    bias = None if linear.bias is None else nn.Parameter(reader.plain(f"{place}.bias", linear.bias.shape), False)
    return EightBitLinear(weight, bias, reader.form.arithmetic)


def _experts(part: Any, place: str, reader: _Reader) -> nn.Module:
    """Return experts whose projections are stored one by one, gate and up apart."""
    check_experts(place, part, dict(part.named_parameters(recurse=False)))
    count, double, width = part.gate_up_proj.shape
    shapes = {"gate_proj": (double // 2, width), "up_proj": (double // 2, width), "down_proj": (width, double // 2)}

    def each(name: str, read: Callable[[str, torch.Size], T]) -> list[T]:
        return [read(f"{place}.{expert}.{name}", torch.Size(shapes[name])) for expert in range(count)]

    if not reader.is_rounded(f"{place}.0.gate_proj.weight"):
        plain = {name: each(name, lambda at, shape: reader.plain(f"{at}.weight", shape)) for name in shapes}
        gates = zip(plain["gate_proj"], plain["up_proj"], strict=True)
        part.gate_up_proj.data = torch.stack([torch.cat(pair) for pair in gates])
        part.down_proj.data = torch.stack(plain["down_proj"])
        return cast("nn.Module", part)
    read = {name: each(name, reader.rounded) for name in shapes}
    block = reader.form.block
    if block is not None and (double // 2) % block[0]:
        raise reader.bad(f"experts of {double // 2} rows, in blocks of {block[0]}")
    gate_up = [_below(*pair) for pair in zip(read["gate_proj"], read["up_proj"], strict=True)]
    return EightBitExperts(part, _stacked(gate_up), _stacked(read["down_proj"]), reader.form.arithmetic)


def _below(one: Rounded, other: Rounded) -> Rounded:
    """Return the rows of two weights as those of one."""
    return Rounded(*(_joined([a, b], torch.cat) for a, b in zip(one, other, strict=True)))


def _stacked(weights: list[Rounded]) -> Rounded:
    return Rounded(*(_joined(list(parts), torch.stack) for parts in zip(*weights, strict=True)))


def _joined(parts: list[Tensor], join: Callable[[list[Tensor]], Tensor]) -> Tensor:
    """Join tensors, those of eight bits as bytes: not every function takes their dtype."""
    dtype = parts[0].dtype
    return join([part.view(torch.uint8) for part in parts]).view(dtype) if dtype.itemsize == 1 else join(parts)
