"""Checkpoints that are stored in eight or four bits: how their weights come into a model.

A layer is quantised where the checkpoint stores its weight so, and nowhere else. Its scales stand beside it. Weights in
eight bits stay as they are, and those in four bits are restored (:mod:`assay.models.four_bits`).
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from safetensors import safe_open
from torch import Tensor, nn

from assay.errors import BadWeights
from assay.models.checkpoint import EIGHT_BITS, Stored, file_of
from assay.models.eight_bits import EightBitExperts, EightBitLinear
from assay.models.float8 import Rounded
from assay.models.formats import StoredFormat
from assay.models.four_bits import AWQ_PLACES, CENTRE, OF_A_WORD, restored, unpacked
from assay.models.quantise import check_experts
from assay.models.random import build
from assay.models.resolve import Source

if TYPE_CHECKING:
    from transformers import PreTrainedModel


T = TypeVar("T")
_SCALES = ("weight_scale", "weight_scale_inv")
_PACKED = {"compressed-tensors": "weight_packed", "awq": "qweight", "gptq": "qweight"}


def load_stored(source: Source, tensors: list[Stored], form: StoredFormat, dtype: torch.dtype) -> "PreTrainedModel":
    """Return the model of a quantised checkpoint, on the CPU.

    Args:
        source: Where the model comes from.
        tensors: All tensors of the checkpoint.
        form: Format that the configuration states.
        dtype: Dtype of everything that is not in eight bits, weights in four bits included.

    Raises:
        BadWeights: A tensor is missing, surplus, or of another shape or dtype than the configuration says.
        ModelError: Experts are stored in another way than those of Qwen3.
    """
    return _loaded(source, _Reader(source, tensors, form, dtype))


def check_stored(source: Source, tensors: list[Stored], form: StoredFormat) -> None:
    """Refuse what :func:`load_stored` refuses of the same checkpoint, as far as headers show it.

    Raises:
        BadWeights: As there.
        ModelError: As there.
    """
    with torch.device("meta"):
        _loaded(source, _HeaderReader(source, tensors, form, torch.bfloat16))


def _loaded(source: Source, reader: "_Reader") -> "PreTrainedModel":
    reader.check_any_rounded()
    module = build(source.config, reader.dtype)
    _fill(module, "", reader)
    if module.config.tie_word_embeddings:
        tied: Any = module
        tied.tie_weights()
    reader.check_all_taken()
    return module


class _Reader:
    """Reads the tensors of a checkpoint by name, each once."""

    def __init__(self, source: Source, tensors: list[Stored], form: StoredFormat, dtype: torch.dtype) -> None:
        self.tied = bool(source.config.tie_word_embeddings)  # the head is the input embedding, and need not be stored
        self.form, self.dtype = form, dtype
        self._source, self._tensors, self._left = source, {t.name: t for t in tensors}, {t.name for t in tensors}

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
            raise self.bad(name, f"is stored as {stored.dtype}, and the format is {self.form.name}")
        return True

    def read(self, name: str, shape: torch.Size | None = None) -> Tensor:
        """Return a tensor, which must have the shape where one is given."""
        stored = self._tensors.get(name)
        if stored is None:
            raise self.bad(name, "is missing")
        if shape is not None and stored.shape != tuple(shape):
            raise self.bad(name, f"has the shape {list(stored.shape)}, not {list(shape)}")
        self._left.discard(name)
        return self._content(stored)

    def _content(self, stored: Stored) -> Tensor:
        with safe_open(stored.file, framework="pt") as file:
            tensor: Tensor = file.get_tensor(stored.name)
            return tensor

    def _holds(self, claim: Callable[[], bool]) -> bool:
        """Return whether a claim about numbers is true."""
        return claim()

    def plain(self, name: str, shape: torch.Size) -> Tensor:
        """Return a tensor that is not in eight bits, in the dtype of the model."""
        if self.is_rounded(name):
            raise self.bad(name, "is stored in eight bits, and it is no weight of a linear layer")
        return self.read(name, shape).to(self.dtype)

    def rounded(self, name: str, shape: torch.Size) -> Rounded:
        """Return a weight in eight bits with its scales, as its layer takes them."""
        values = self.read(f"{name}.weight", shape)
        names = [f"{name}.{end}" for end in _SCALES if self.has(f"{name}.{end}")]
        if len(names) != 1:
            raise self.bad(f"{name}.weight", f"has {len(names)} tensors of scales")
        scales = self.read(names[0]).float()
        rows, columns = shape
        if self.form.block is not None:
            wanted: tuple[int, ...] = (-(-rows // self.form.block[0]), -(-columns // self.form.block[1]))
        else:
            wanted = (rows, 1)
            scales = scales.reshape(-1, 1).expand(rows, 1) if scales.numel() == 1 else scales.reshape(-1, 1)
        if tuple(scales.shape) != wanted or not self._holds(lambda: bool((scales > 0).all())):
            raise self.bad(names[0], f"has the shape {list(scales.shape)}, or scales that are not positive")
        return Rounded(values, scales.contiguous())

    def is_packed(self, place: str) -> bool:
        """Return whether the weight of a layer is stored in four bits."""
        return self.form.packing is not None and self.has(f"{place}.{_PACKED[self.form.packing]}")

    def restored(self, place: str, shape: torch.Size) -> Tensor:
        """Return a weight that is stored in four bits, [R, C], in the dtype of the model."""
        (rows, columns), group = shape, self.form.group or shape[1]
        if columns % group or columns % OF_A_WORD or rows % OF_A_WORD:
            raise self.bad(place, f"has {rows} rows of {columns} columns, in groups of {group}")
        of_rows, groups = rows // OF_A_WORD, columns // group
        zeros: Tensor | int = CENTRE
        if self.form.packing == "compressed-tensors":
            numbers = unpacked(self._words(f"{place}.weight_packed", rows, columns // OF_A_WORD))
            said = self.read(f"{place}.weight_shape")
            if not self._holds(lambda: said.tolist() == list(shape)):
                raise self.bad(f"{place}.weight_shape", f"is not {list(shape)}")
            if self.form.zeros:
                zeros = unpacked(self._words(f"{place}.weight_zero_point", of_rows, groups).t()).t()
            scales = self.read(f"{place}.weight_scale", torch.Size((rows, groups)))
        elif self.form.packing == "awq":
            numbers = unpacked(self._words(f"{place}.qweight", columns, of_rows), AWQ_PLACES).t()
            zeros = unpacked(self._words(f"{place}.qzeros", groups, of_rows), AWQ_PLACES).t()
            scales = self.read(f"{place}.scales", torch.Size((groups, rows))).t()
        else:
            numbers = unpacked(self._words(f"{place}.qweight", columns // OF_A_WORD, rows).t())
            self._check_gptq(place, groups, of_rows, columns)
            scales = self.read(f"{place}.scales", torch.Size((groups, rows))).t()
        return restored(numbers.contiguous(), zeros, scales, self.dtype)

    def _words(self, name: str, *shape: int) -> Tensor:
        words = self.read(name, torch.Size(shape))
        if words.dtype != torch.int32:
            raise self.bad(name, f"is stored as {words.dtype}, and four bits are packed in int32")
        return words

    def _check_gptq(self, place: str, groups: int, of_rows: int, columns: int) -> None:
        """Refuse zeros and an order of columns that engines with symmetric weights in order do not read."""
        zeros = unpacked(self._words(f"{place}.qzeros", groups, of_rows))
        if not self._holds(lambda: bool((zeros == CENTRE - 1).all())):  # stored less one
            raise self.bad(f"{place}.qzeros", "has other zeros than symmetric weights")
        if self.has(f"{place}.g_idx"):
            order = self.read(f"{place}.g_idx", torch.Size((columns,)))
            in_order = [column * groups // columns for column in range(columns)]
            if not self._holds(lambda: order.tolist() == in_order):
                raise self.bad(f"{place}.g_idx", "has columns out of order")

    def bad(self, name: str, fault: str) -> BadWeights:
        """Return the error that names a tensor, what is wrong with it, and its file."""
        return BadWeights(
            f"{file_of(self._source.checkpoint, self._tensors, name)}: {name!r} {fault}",
            wanted=f"exactly the tensors of the configuration, with linear layers in {self.form.name}",
            do=f"download or save {self._source.reference} again",
        )

    def check_any_rounded(self) -> None:
        if not any(tensor.dtype == self.form.dtype for tensor in self._tensors.values()):
            raise BadWeights(
                f"{self._source.checkpoint} stores no tensor as {self.form.dtype}, and its configuration says that it "
                "is quantised",
                wanted=f"linear layers in {self.form.name}",
                do=f"download or save {self._source.reference} again",
            )

    def check_all_taken(self) -> None:
        if self._left:
            raise self.bad(min(self._left), f"is surplus, one of {len(self._left)}")


class _HeaderReader(_Reader):
    """Gives tensors without numbers, and believes what is said of numbers."""

    def _content(self, stored: Stored) -> Tensor:
        return stored.without_numbers()

    def _holds(self, claim: Callable[[], bool]) -> bool:
        return True


def _fill(owner: nn.Module, prefix: str, reader: _Reader) -> None:
    """Give a module and all inside it what the checkpoint stores, with layers in eight bits where it has them."""
    for name, parameter in owner.named_parameters(recurse=False):
        parameter.data = reader.plain(prefix + name, parameter.shape)
    for name, part in list(owner.named_children()):
        place = f"{prefix}{name}"
        if isinstance(part, nn.Linear):
            if reader.is_rounded(f"{place}.weight"):
                setattr(owner, name, _layer(part, place, reader))
            elif reader.is_packed(place):
                part.weight.data = reader.restored(place, part.weight.shape)
                if part.bias is not None:
                    part.bias.data = reader.plain(f"{place}.bias", part.bias.shape)
            elif reader.has(f"{place}.weight") or place != "lm_head" or not reader.tied:
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

        def whole(at: str, shape: torch.Size) -> Tensor:
            return reader.restored(at, shape) if reader.is_packed(at) else reader.plain(f"{at}.weight", shape)

        plain = {name: each(name, whole) for name in shapes}
        gates = zip(plain["gate_proj"], plain["up_proj"], strict=True)
        part.gate_up_proj.data = torch.stack([torch.cat(pair) for pair in gates])
        part.down_proj.data = torch.stack(plain["down_proj"])
        return cast("nn.Module", part)
    read = {name: each(name, reader.rounded) for name in shapes}
    block = reader.form.block
    if block is not None and (double // 2) % block[0]:
        raise reader.bad(f"{place}.0.gate_proj.weight", f"has {double // 2} rows, in blocks of {block[0]}")
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
