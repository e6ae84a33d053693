"""Checkpoints in eight or four bits: what a configuration states, where it runs, and how weights
come into a model.

What the configuration says decides how the inputs of such layers are rounded, so a configuration
that says anything but what was tested is refused: a model that runs it in another way is another
build. A layer is quantised where the checkpoint stores its weight so, and nowhere else. Weights in
eight bits stay as they are (:mod:`assay.models.eight_bits`). Weights in four bits are restored when
they are loaded, and the model then multiplies in its own dtype, as the engines that run such
checkpoints do: (q − z) · s, where q and z are whole numbers from 0 to 15, and z and s are those of
a group of columns. The scale is cast to the dtype first, and the product is rounded once.

``quantise`` rounds the weights of a checkpoint that is stored in 16 bits: an honest configuration
that a network may agree on. ``float8`` rounds inputs too, with a scale for every position.

Shapes: R rows, C columns, G groups of columns, P = eight numbers in a whole number of 32 bits.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal, TypedDict, TypeVar, cast

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn import functional

from assay.errors import BackendUnavailable, BadWeights, ModelError, UsageError
from assay.models.checkpoint import EIGHT_BITS, Source, Stored, build, find_file
from assay.models.decoder import backbone
from assay.models.eight_bits import (
    CUDA_BLOCK,
    FLOAT8,
    INT8,
    WIDTHS,
    Arithmetic,
    EightBitExperts,
    EightBitLinear,
    Rounded,
    float8_blocks,
    round_rows,
)
from assay.settings import NUMBER_FORMATS as NUMBER_FORMATS

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class LoadingFormat(TypedDict):
    """Arguments of :func:`assay.models.load_model`."""

    dtype: str | None
    quantise: str | None


def in_format(name: str | None, *, rest: str | None = None) -> LoadingFormat:
    """Return the arguments with which a model is loaded in a number format: a dtype, or one of
    eight or four bits.

    ``rest`` is the dtype of what eight or four bits leave as it is. None stands for the stored one.
    """
    short = name in NUMBER_FORMATS
    return LoadingFormat(dtype=rest if short else name, quantise=name if short else None)


FOUR_BITS = "int4-groups"
"""Name of the number format of weights in four bits, whichever way they are packed."""

_FLOAT8_CAPABILITY = (8, 9)
_TESTED_CAPABILITY = (9, 0)


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
        return (
            float8_blocks(*self.block) if self.block else INT8 if self.name == INT8.name else FLOAT8
        )

    @property
    def dtype(self) -> str:
        """Dtype of the weights, as the header of a safetensors file has it."""
        return {INT8.name: "I8", FOUR_BITS: "I32"}.get(self.name, "F8_E4M3")


_ACCEPTED: dict[str, dict[str, tuple[object, ...]]] = {
    "fp8": {"activation_scheme": ("dynamic", None), "fmt": ("e4m3", None)},
    "compressed-tensors": {
        "format": ("float-quantized", "int-quantized", "naive-quantized", "pack-quantized"),
        "kv_cache_scheme": (None, {}),
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


def read_format(reference: str, published: Mapping[str, Any]) -> StoredFormat | None:
    """Return the format that a configuration states, or refuse the key and the value of one that is
    not read.

    None stands for weights that are not quantised.
    """
    stated = published.get("quantization_config")
    if stated is None:
        return None
    stated = stated if isinstance(stated, dict) else {}
    try:
        method = _require(stated, "quant_method", "fp8", "compressed-tensors", "awq", "gptq")
        _require_all(stated, _ACCEPTED[method])
        if method == "compressed-tensors":
            return _parse_compressed_tensors(stated)
        if method == "fp8":
            block = stated.get("weight_block_size")
            return (
                StoredFormat("float8")
                if block is None
                else StoredFormat("float8-block", _parse_block(block))
            )
        group = _parse_group(stated.get("group_size"))
        return StoredFormat(FOUR_BITS, packing=method, group=group, zeros=method == "awq")
    except ModelError as error:
        raise ModelError(f"{reference!r} {error.seen}", wanted=error.wanted, do=error.do) from None


def _parse_compressed_tensors(stated: Mapping[str, Any]) -> StoredFormat:
    kind = stated["format"]
    groups = stated.get("config_groups")
    group = next(iter(groups.values())) if isinstance(groups, dict) and len(groups) == 1 else None
    if not isinstance(group, dict):
        raise _refusal("config_groups", groups, "one group")
    weights, inputs = (group.get(name) or {} for name in ("weights", "input_activations"))
    if not isinstance(weights, dict) or not isinstance(inputs, dict):
        raise _refusal("config_groups", group, "weights and input_activations")
    _require(group, "output_activations", None)
    if kind == "pack-quantized":
        _require(group, "input_activations", None)
        _require_all(weights, _ACCEPTED[kind])
        size = None if weights["strategy"] == "channel" else _parse_group(weights.get("group_size"))
        return StoredFormat(
            FOUR_BITS, packing="compressed-tensors", group=size, zeros=not weights["symmetric"]
        )
    for part in (weights, inputs):
        _require_all(part, {"num_bits": (8,), "symmetric": (True, None)})
    _require(inputs, "dynamic", True)
    numbers = {"float-quantized": ("float",), "int-quantized": ("int",)}.get(kind, ("float", "int"))
    number = _require(weights, "type", *numbers)
    _require(inputs, "type", number)
    strategies = ("channel", "tensor") if number == "int" else ("channel", "tensor", "block")
    if _require(weights, "strategy", *strategies) == "block":
        _require(inputs, "strategy", "group")
        block = _parse_block(weights.get("block_structure"))
        _require(inputs, "group_size", block[1])
        return StoredFormat("float8-block", block)
    _require(inputs, "strategy", "token")
    return StoredFormat("int8-rows" if number == "int" else "float8")


def _parse_group(value: object) -> int | None:
    if value == -1:
        return None
    if type(value) is not int or value < 1:
        raise _refusal("group_size", value, "-1, or a number of at least 1, such as 128")
    return value


def _parse_block(value: object) -> tuple[int, int]:
    if (
        not isinstance(value, list | tuple)
        or len(value) != 2
        or any(type(n) is not int or n < 1 for n in value)
    ):
        raise _refusal(
            "the size of a block", value, "two numbers of at least 1, such as [128, 128]"
        )
    return value[0], value[1]


def _require(stated: Mapping[str, Any], key: str, *allowed: object) -> Any:
    value = stated.get(key)
    if value not in allowed:
        raise _refusal(key, value, " or ".join(map(str, allowed)))
    return value


def _require_all(stated: Mapping[str, Any], accepted: Mapping[str, tuple[object, ...]]) -> None:
    for key, allowed in accepted.items():
        _require(stated, key, *allowed)


def _refusal(key: str, value: object, wanted: str) -> ModelError:
    do = "use the checkpoint before quantisation, or one in a format of docs/models.md"
    return ModelError(f"is quantised with {key} {value!r:.80}", wanted=wanted, do=do)


def check_device(form: StoredFormat, device: torch.device) -> None:
    """Refuse a format on a kind of device on which it was not tested."""
    if (
        device.type == "cpu" or form.name == FOUR_BITS
    ):  # whose weights are restored, and whose products are the dtype's
        return
    if form.name == FLOAT8.name:
        check_quantisation(form.name, device)
        return
    if form.block is not None and form.block != CUDA_BLOCK:
        seen = "{} with a scale for {} x {} numbers, on {}".format(form.name, *form.block, device)
        do = "pass --device cpu, or use vLLM"
        raise BackendUnavailable(
            seen, wanted="blocks of {} x {} on CUDA".format(*CUDA_BLOCK), do=do
        )
    libraries = find_spec("triton") is not None and hasattr(functional, "scaled_mm")
    if not libraries or torch.cuda.get_device_capability(device) != _TESTED_CAPABILITY:
        wanted = (
            "a CPU, or an H100 or H200 with torch 2.10 or later and triton, on which it was tested"
        )
        raise BackendUnavailable(
            f"{form.name} on {device}", wanted=wanted, do="pass --device cpu, or use vLLM"
        )


OF_A_WORD = 8
"""Numbers of four bits in one of 32."""

CENTRE = 8
"""The zero of weights that are stored without one."""

AWQ_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)
_IN_ORDER = tuple(range(OF_A_WORD))
"""Place of each of eight neighbours in a word of AWQ, from the lowest four bits; other layouts keep
their order.
"""


def unpack_words(words: Tensor, places: Sequence[int] = _IN_ORDER) -> Tensor:
    """Return the numbers [..., 8 P] that are packed along the last axis of words [..., P] int32, by
    their places.
    """
    shifts = torch.tensor([4 * place for place in places], dtype=torch.int32, device=words.device)
    return ((words[..., None] >> shifts) & 15).flatten(-2).to(torch.uint8)


def _restore(
    numbers_RC: Tensor, zeros_RG: Tensor | int, scales_RG: Tensor, dtype: torch.dtype
) -> Tensor:
    """Return the weight [R, C] in a dtype, of numbers from 0 to 15. C is a multiple of G."""
    rows, groups = scales_RG.shape
    numbers_RGS = numbers_RC.view(rows, groups, -1).float()
    zeros = zeros_RG[..., None].float() if isinstance(zeros_RG, Tensor) else float(zeros_RG)
    return ((numbers_RGS - zeros) * scales_RG.to(dtype).float()[..., None]).to(dtype).view(rows, -1)


T = TypeVar("T")
_SCALES = ("weight_scale", "weight_scale_inv")
_PACKED = {"compressed-tensors": "weight_packed", "awq": "qweight", "gptq": "qweight"}


def load_stored(
    source: Source,
    tensors: list[Stored],
    form: StoredFormat,
    dtype: torch.dtype,
    *,
    headers_only: bool = False,
) -> "PreTrainedModel":
    """Return the model of a quantised checkpoint on the CPU, in a dtype but for its weights in
    eight bits.

    Its tensors must be exactly those of the configuration. With headers only the model stays on the
    meta device, and what headers show is checked.
    """
    reader = _Reader(source, tensors, form, dtype, headers_only)
    if not any(tensor.dtype == form.dtype for tensor in tensors):
        raise reader.refusal(
            "", f"stores no tensor as {form.dtype}, and its configuration says that it is quantised"
        )
    with torch.device("meta") if headers_only else nullcontext():
        module = build(source.config, dtype)
        _fill(module, "", reader)
        if module.config.tie_word_embeddings:
            tied: Any = module
            tied.tie_weights()
    if reader.left:
        raise reader.refusal(min(reader.left), f"is surplus, one of {len(reader.left)}")
    return module


class _Reader:
    """Reads the tensors of a checkpoint by name, each once."""

    def __init__(
        self,
        source: Source,
        tensors: list[Stored],
        form: StoredFormat,
        dtype: torch.dtype,
        headers_only: bool,
    ) -> None:
        self.tied = bool(
            source.config.tie_word_embeddings
        )  # the head is the input embedding, and need not be stored
        self.form = form
        self.dtype = dtype
        self.headers_only = headers_only
        self._source = source
        self._tensors = {t.name: t for t in tensors}
        self.left = {t.name for t in tensors}

    def has(self, name: str) -> bool:
        return name in self._tensors

    def is_rounded(self, name: str) -> bool:
        """Return whether a weight is stored in eight bits, which must be those that the
        configuration says.
        """
        stored = self._tensors.get(name)
        if stored is None or stored.dtype not in EIGHT_BITS:
            return False
        if stored.dtype != self.form.dtype:
            raise self.refusal(
                name, f"is stored as {stored.dtype}, and the format is {self.form.name}"
            )
        return True

    def read(self, name: str, shape: torch.Size | None = None) -> Tensor:
        """Return a tensor, which must have the shape where one is given."""
        stored = self._tensors.get(name)
        if stored is None:
            raise self.refusal(name, "is missing")
        if shape is not None and stored.shape != tuple(shape):
            raise self.refusal(name, f"has the shape {list(stored.shape)}, not {list(shape)}")
        self.left.discard(name)
        if self.headers_only:
            return stored.without_numbers()
        with safe_open(stored.file, framework="pt") as file:
            tensor: Tensor = file.get_tensor(stored.name)
            return tensor

    def _holds(self, claim: Callable[[], bool]) -> bool:
        """Return whether a claim about numbers is true; headers have no numbers, so it is believed
        of them.
        """
        return self.headers_only or claim()

    def read_plain(self, name: str, shape: torch.Size) -> Tensor:
        """Return a tensor that is not in eight bits, in the dtype of the model."""
        if self.is_rounded(name):
            raise self.refusal(
                name, "is stored in eight bits, and it is no weight of a linear layer"
            )
        return self.read(name, shape).to(self.dtype)

    def read_rounded(self, name: str, shape: torch.Size) -> Rounded:
        """Return a weight in eight bits with its scales, as its layer takes them."""
        values = self.read(f"{name}.weight", shape)
        names = [f"{name}.{end}" for end in _SCALES if self.has(f"{name}.{end}")]
        if len(names) != 1:
            raise self.refusal(f"{name}.weight", f"has {len(names)} tensors of scales")
        scales = self.read(names[0]).float()
        rows, columns = shape
        if self.form.block is not None:
            wanted: tuple[int, ...] = (
                -(-rows // self.form.block[0]),
                -(-columns // self.form.block[1]),
            )
        else:
            wanted = (rows, 1)
            scales = (
                scales.reshape(-1, 1).expand(rows, 1)
                if scales.numel() == 1
                else scales.reshape(-1, 1)
            )
        if tuple(scales.shape) != wanted or not self._holds(lambda: bool((scales > 0).all())):
            raise self.refusal(
                names[0], f"has the shape {list(scales.shape)}, or scales that are not positive"
            )
        return Rounded(values, scales.contiguous())

    def is_packed(self, place: str) -> bool:
        """Return whether the weight of a layer is stored in four bits."""
        return self.form.packing is not None and self.has(f"{place}.{_PACKED[self.form.packing]}")

    def read_packed(self, place: str, shape: torch.Size) -> Tensor:
        """Return a weight that is stored in four bits, [R, C], in the dtype of the model."""
        (rows, columns), group, packing = shape, self.form.group or shape[1], self.form.packing
        if columns % group or columns % OF_A_WORD or rows % OF_A_WORD:
            raise self.refusal(place, f"has {rows} rows of {columns} columns, in groups of {group}")
        of_rows = rows // OF_A_WORD
        of_columns = columns // OF_A_WORD
        groups = columns // group

        def unpack(end: str, *packed: int, axis: int = 1) -> Tensor:
            """Return the numbers that are packed along an axis of the words of a tensor."""
            words = self.read(f"{place}.{end}", torch.Size(packed))
            if words.dtype != torch.int32:
                raise self.refusal(
                    f"{place}.{end}",
                    f"is stored as {words.dtype}, and four bits are packed in int32",
                )
            places = AWQ_PLACES if packing == "awq" else _IN_ORDER
            return unpack_words(words, places) if axis else unpack_words(words.t(), places).t()

        def check(end: str, holds: Callable[[], bool], fault: str) -> None:
            if not self._holds(holds):
                raise self.refusal(f"{place}.{end}", fault)

        zeros: Tensor | int = CENTRE
        if packing == "compressed-tensors":
            numbers = unpack("weight_packed", rows, of_columns)
            said = self.read(f"{place}.weight_shape")
            check("weight_shape", lambda: said.tolist() == list(shape), f"is not {list(shape)}")
            if self.form.zeros:
                zeros = unpack("weight_zero_point", of_rows, groups, axis=0)
            scales = self.read(f"{place}.weight_scale", torch.Size((rows, groups)))
        else:
            stored = unpack("qzeros", groups, of_rows)
            scales = self.read(f"{place}.scales", torch.Size((groups, rows))).t()
            if packing == "awq":
                numbers = unpack("qweight", columns, of_rows).t()
                zeros = stored.t()
                # engines with symmetric weights, whose zeros are stored less one, read no other
                # zeros and order
            else:
                numbers = unpack("qweight", of_columns, rows, axis=0).t()
                check(
                    "qzeros",
                    lambda: bool((stored == CENTRE - 1).all()),
                    "has other zeros than symmetric weights",
                )
                if self.has(f"{place}.g_idx"):
                    order = self.read(f"{place}.g_idx", torch.Size((columns,)))
                    in_order = [column * groups // columns for column in range(columns)]
                    check("g_idx", lambda: order.tolist() == in_order, "has columns out of order")
        return _restore(numbers.contiguous(), zeros, scales, self.dtype)

    def refusal(self, name: str, fault: str) -> BadWeights:
        """Return the error that names a tensor, or all of them without a name, its file, and what
        is wrong.
        """
        path = self._source.checkpoint
        return BadWeights(
            f"{find_file(path, self._tensors, name)}: {name!r} {fault}"
            if name
            else f"{path} {fault}",
            wanted=f"exactly the tensors of the configuration, with linear layers in "
            f"{self.form.name}",
            do=f"download or save {self._source.reference} again",
        )


def _fill(owner: nn.Module, prefix: str, reader: _Reader) -> None:
    """Give a module and all inside it what the checkpoint stores, with layers in eight bits where
    it has them.
    """
    for name, parameter in owner.named_parameters(recurse=False):
        parameter.data = reader.read_plain(prefix + name, parameter.shape)
    for name, part in list(owner.named_children()):
        place = f"{prefix}{name}"
        if isinstance(part, nn.Linear):
            in_eight = reader.is_rounded(f"{place}.weight")
            in_four = reader.is_packed(place)
            if (in_eight or in_four) and part.bias is not None:
                part.bias.data = reader.read_plain(f"{place}.bias", part.bias.shape)
            if in_eight:
                weight = reader.read_rounded(place, part.weight.shape)
                setattr(owner, name, EightBitLinear(weight, part.bias, reader.form.arithmetic))
            elif in_four:
                part.weight.data = reader.read_packed(place, part.weight.shape)
            elif reader.has(f"{place}.weight") or place != "lm_head" or not reader.tied:
                _fill(part, f"{place}.", reader)
        elif any(weight.dim() > 2 for weight in part.parameters(recurse=False)):
            setattr(owner, name, _make_experts(part, place, reader))
        else:
            _fill(part, f"{place}.", reader)


def _make_experts(part: Any, place: str, reader: _Reader) -> nn.Module:
    """Return experts whose projections are stored one by one, gate and up apart."""
    check_experts(place, part, dict(part.named_parameters(recurse=False)))
    count, double, width = part.gate_up_proj.shape
    shapes = {
        "gate_proj": (double // 2, width),
        "up_proj": (double // 2, width),
        "down_proj": (width, double // 2),
    }

    def each(name: str, read: Callable[[str, torch.Size], T]) -> list[T]:
        return [
            read(f"{place}.{expert}.{name}", torch.Size(shapes[name])) for expert in range(count)
        ]

    if not reader.is_rounded(f"{place}.0.gate_proj.weight"):

        def whole(at: str, shape: torch.Size) -> Tensor:
            return (
                reader.read_packed(at, shape)
                if reader.is_packed(at)
                else reader.read_plain(f"{at}.weight", shape)
            )

        plain = {name: each(name, whole) for name in shapes}
        gates = zip(plain["gate_proj"], plain["up_proj"], strict=True)
        part.gate_up_proj.data = torch.stack([torch.cat(pair) for pair in gates])
        part.down_proj.data = torch.stack(plain["down_proj"])
        return cast("nn.Module", part)
    read = {name: each(name, reader.read_rounded) for name in shapes}
    block = reader.form.block
    if block is not None and (double // 2) % block[0]:
        raise reader.refusal(
            f"{place}.0.gate_proj.weight", f"has {double // 2} rows, in blocks of {block[0]}"
        )
    gate_up = [
        _join(pair, torch.cat) for pair in zip(read["gate_proj"], read["up_proj"], strict=True)
    ]
    stacked, down = (_join(weights, torch.stack) for weights in (gate_up, read["down_proj"]))
    return EightBitExperts(part, stacked, down, reader.form.arithmetic)


def _join(weights: Sequence[Rounded], join: Callable[[list[Tensor]], Tensor]) -> Rounded:
    """Join weights, their eight bits as bytes: not every function takes their dtype."""
    values = join([weight.values.view(torch.uint8) for weight in weights]).view(
        weights[0].values.dtype
    )
    return Rounded(values, join([weight.scales for weight in weights]))


def check_quantisation(name: str | None, device: torch.device) -> None:
    """Refuse a number format that is unknown, or that a device does not have."""
    if name is None:
        return
    if name != FLOAT8.name:
        raise UsageError(f"quantise={name!r}", wanted=FLOAT8.name, do="choose it, or leave it out")
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < _FLOAT8_CAPABILITY:
        seen = f"float8 on {device}"
        do = "use --device cpu, or a device such as an H100"
        raise BackendUnavailable(
            seen, wanted="a CUDA device of compute capability 8.9 or more, or a CPU", do=do
        )


def quantise(module: "PreTrainedModel") -> None:
    """Round the weights of the decoder's linear layers to e4m3; embeddings, norms and the head stay
    as they are.
    """
    _round_to_float8(backbone(module))


def _round_to_float8(owner: nn.Module) -> None:
    for name in [
        name for name, _ in owner.named_children()
    ]:  # names alone, so that what is rounded is freed at once
        part = getattr(owner, name)
        if isinstance(part, nn.Linear):
            _check_widths(name, part.weight)
            setattr(owner, name, EightBitLinear(round_rows(part.weight.detach()), part.bias))
        elif stacks := {
            key: weight for key, weight in part.named_parameters(recurse=False) if weight.dim() > 2
        }:
            check_experts(name, part, stacks)
            gate_up, down = (
                round_rows(stacks[key].detach()) for key in ("gate_up_proj", "down_proj")
            )
            setattr(owner, name, EightBitExperts(part, gate_up, down))
        else:
            _round_to_float8(part)


def _check_widths(name: str, weight: torch.Tensor) -> None:
    rows, columns = weight.shape[-2:]
    if weight.is_cuda and (rows % WIDTHS or columns % WIDTHS):
        wanted = f"multiples of {WIDTHS}, which products in float8 need on CUDA"
        do = "use another --dtype"
        raise ModelError(
            f"{name} has {rows} rows of {columns} numbers, and float8 was asked for",
            wanted=wanted,
            do=do,
        )


def check_experts(name: str, part: Any, stacks: dict[str, Any]) -> None:
    """Refuse experts that are stored or gated in another way than most: they would stay as they
    are.
    """
    plain = getattr(part, "has_gate", False) and getattr(part, "is_concatenated", False)
    other = getattr(part, "has_bias", True) or getattr(part, "is_transposed", True)
    gate = getattr(getattr(part, "_apply_gate", None), "__name__", "")
    if (
        set(stacks) != {"gate_up_proj", "down_proj"}
        or not plain
        or other
        or gate != "_default_apply_gate"
    ):
        wanted = "experts with one gate and no bias, as those of Qwen3"
        do = "use another --dtype"
        raise ModelError(
            f"{name} is a {type(part).__name__}, and eight bits were asked for",
            wanted=wanted,
            do=do,
        )
    for key, weight in stacks.items():
        _check_widths(f"{name}.{key}", weight)
