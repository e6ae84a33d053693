"""Checkpoints in eight or four bits: their tensors come into a model as they are stored.

A layer is quantised where the checkpoint stores its weight so, and nowhere else. Weights in eight
bits stay as they are (:mod:`assay.models.eight_bits`); weights in four bits are restored
(:mod:`assay.models.four_bits`).

Shapes: R rows, C columns, G groups of columns that share a scale.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from safetensors import safe_open
from torch import Tensor, nn

from assay.errors import BadWeights
from assay.models.checkpoint import EIGHT_BITS, StoredTensor, find_file
from assay.models.configuration import build
from assay.models.eight_bits import (
    EightBitExperts,
    EightBitLinear,
    Rounded,
    check_experts,
    expert_weights,
)
from assay.models.four_bits import (
    AWQ_PLACES,
    CENTRE,
    IN_ORDER,
    NUMBERS_OF_A_WORD,
    restore,
    unpack_words,
)
from assay.models.number_formats import StoredFormat
from assay.models.resolve import ModelSource

if TYPE_CHECKING:
    from transformers import PreTrainedModel

T = TypeVar("T")

_SCALES = ("weight_scale", "weight_scale_inv")
_PACKED = {"compressed-tensors": "weight_packed", "awq": "qweight", "gptq": "qweight"}


def load_stored(
    source: ModelSource,
    tensors: list[StoredTensor],
    form: StoredFormat,
    dtype: torch.dtype,
    *,
    headers_only: bool = False,
) -> "PreTrainedModel":
    """Return the module of a quantised checkpoint on the CPU; its plain weights are in a dtype.

    Its tensors must be exactly those of the configuration. With headers only the model stays on the
    meta device, and what headers show is checked.
    """
    reader = _TensorReader(source, tensors, form, dtype, headers_only)
    if not any(tensor.dtype == form.dtype for tensor in tensors):
        raise reader.refusal(
            "", f"stores no tensor as {form.dtype}, and its configuration says that it is quantised"
        )
    with torch.device("meta") if headers_only else nullcontext():
        module = build(source.config, dtype)
        _fill(module, "", reader)
    if reader.unread:
        raise reader.refusal(min(reader.unread), f"is surplus, one of {len(reader.unread)}")
    return module


class _TensorReader:
    """Reads the tensors of a checkpoint by name, each once."""

    def __init__(
        self,
        source: ModelSource,
        tensors: list[StoredTensor],
        form: StoredFormat,
        dtype: torch.dtype,
        headers_only: bool,
    ) -> None:
        # A tied head is the input embedding, and need not be stored.
        self.is_tied = bool(source.config.tie_word_embeddings)
        self.form = form
        self.dtype = dtype
        self.headers_only = headers_only
        self._source = source
        self._tensors = {tensor.name: tensor for tensor in tensors}
        self.unread = set(self._tensors)

    def has(self, name: str) -> bool:
        return name in self._tensors

    def is_rounded(self, name: str) -> bool:
        """Return whether a weight is stored in eight bits; refuse others than the stated ones."""
        stored = self._tensors.get(name)
        if stored is None or stored.dtype not in EIGHT_BITS:
            return False
        if stored.dtype != self.form.dtype:
            raise self.refusal(
                name, f"is stored as {stored.dtype}, and the format is {self.form.name}"
            )
        return True

    def is_packed(self, layer: str) -> bool:
        """Return whether the weight of a layer is stored in four bits."""
        return self.form.packing is not None and self.has(f"{layer}.{_PACKED[self.form.packing]}")

    def read(self, name: str, shape: Sequence[int] | None = None) -> Tensor:
        """Return a tensor, which must have the shape where one is given."""
        if (stored := self._tensors.get(name)) is None:
            raise self.refusal(name, "is missing")
        if shape is not None and stored.shape != tuple(shape):
            raise self.refusal(name, f"has the shape {list(stored.shape)}, not {list(shape)}")
        self.unread.discard(name)
        if self.headers_only:
            return stored.to_meta()
        with safe_open(stored.file, framework="pt") as file:
            tensor: Tensor = file.get_tensor(stored.name)
            return tensor

    def check(self, name: str, holds: Callable[[], bool], fault: str) -> None:
        """Refuse a tensor whose numbers are wrong; headers have none, and are believed."""
        if not self.headers_only and not holds():
            raise self.refusal(name, fault)

    def read_plain(self, name: str, shape: Sequence[int]) -> Tensor:
        """Return a tensor that is not in eight bits, in the dtype of the model."""
        if self.is_rounded(name):
            raise self.refusal(
                name, "is stored in eight bits, and it is no weight of a linear layer"
            )
        return self.read(name, shape).to(self.dtype)

    def read_rounded(self, layer: str, shape: Sequence[int]) -> Rounded:
        """Return a weight in eight bits with its scales, as its layer takes them."""
        values = self.read(f"{layer}.weight", shape)
        if not self.is_rounded(f"{layer}.weight"):
            raise self.refusal(f"{layer}.weight", "is not in eight bits, as other experts are")
        names = [f"{layer}.{end}" for end in _SCALES if self.has(f"{layer}.{end}")]
        if len(names) != 1:
            raise self.refusal(f"{layer}.weight", f"has {len(names)} tensors of scales")
        scales = self.read(names[0]).float()
        rows, columns = shape
        expected = (rows, 1)
        if self.form.block is not None:
            block_rows, block_columns = self.form.block
            expected = (-(-rows // block_rows), -(-columns // block_columns))
        else:
            scales = scales.reshape(-1, 1)
            if len(scales) == 1:  # one scale of the whole weight
                scales = scales.expand(rows, 1)
        fault = f"has the shape {list(scales.shape)}, or scales that are not positive"
        if tuple(scales.shape) != expected:
            raise self.refusal(names[0], fault)
        self.check(names[0], lambda: bool((scales > 0).all()), fault)
        return Rounded(values, scales.contiguous())

    def read_unrounded(self, layer: str, shape: Sequence[int]) -> Tensor:
        """Return a weight that is plain or in four bits, [R, C], in the dtype of the model."""
        if not self.is_packed(layer):
            return self.read_plain(f"{layer}.weight", shape)
        rows, columns = shape
        group = self.form.group or columns
        if columns % group or columns % NUMBERS_OF_A_WORD or rows % NUMBERS_OF_A_WORD:
            raise self.refusal(layer, f"has {rows} rows of {columns} columns, in groups of {group}")
        readers = {"compressed-tensors": self._compressed_tensors, "awq": self._awq}
        read = readers.get(str(self.form.packing), self._gptq)
        numbers, zeros, scales = read(layer, rows, columns, columns // group)
        return restore(numbers.contiguous(), zeros, scales, self.dtype)

    def _compressed_tensors(
        self, layer: str, rows: int, columns: int, groups: int
    ) -> tuple[Tensor, Tensor | int, Tensor]:
        """Return numbers [R, C], zeros [R, G] or one for all, and scales [R, G]."""
        numbers = self._unpack(f"{layer}.weight_packed", (rows, columns))
        name = f"{layer}.weight_shape"
        stated = self.read(name)
        self.check(name, lambda: stated.tolist() == [rows, columns], f"is not {[rows, columns]}")
        zeros: Tensor | int = CENTRE
        if self.form.zeros:
            zeros = self._unpack(f"{layer}.weight_zero_point", (rows, groups), axis=0)
        return numbers, zeros, self.read(f"{layer}.weight_scale", (rows, groups))

    def _awq(
        self, layer: str, rows: int, columns: int, groups: int
    ) -> tuple[Tensor, Tensor | int, Tensor]:
        """Return numbers [R, C], zeros [R, G] and scales [R, G]; AWQ stores all transposed."""
        numbers = self._unpack(f"{layer}.qweight", (columns, rows), AWQ_PLACES)
        zeros = self._unpack(f"{layer}.qzeros", (groups, rows), AWQ_PLACES)
        return numbers.t(), zeros.t(), self.read(f"{layer}.scales", (groups, rows)).t()

    def _gptq(
        self, layer: str, rows: int, columns: int, groups: int
    ) -> tuple[Tensor, Tensor | int, Tensor]:
        """Return numbers [R, C], the one zero, and scales [R, G] of symmetric weights in order."""
        numbers = self._unpack(f"{layer}.qweight", (columns, rows), axis=0)
        # Zeros are stored less one; engines of symmetric weights read no others.
        zeros = self._unpack(f"{layer}.qzeros", (groups, rows))
        self.check(
            f"{layer}.qzeros",
            lambda: bool((zeros == CENTRE - 1).all()),
            "has other zeros than symmetric weights",
        )
        if self.has(f"{layer}.g_idx"):
            order = self.read(f"{layer}.g_idx", (columns,))
            in_order = [column * groups // columns for column in range(columns)]
            self.check(
                f"{layer}.g_idx", lambda: order.tolist() == in_order, "has columns out of order"
            )
        return numbers.t(), CENTRE, self.read(f"{layer}.scales", (groups, rows)).t()

    def _unpack(
        self,
        name: str,
        shape: tuple[int, int],
        places: Sequence[int] = IN_ORDER,
        *,
        axis: int = 1,
    ) -> Tensor:
        """Return the matrix that a tensor of words holds, packed along an axis."""
        sizes = list(shape)
        sizes[axis] //= NUMBERS_OF_A_WORD
        words = self.read(name, sizes)
        if words.dtype != torch.int32:
            raise self.refusal(
                name, f"is stored as {words.dtype}, and four bits are packed in int32"
            )
        return unpack_words(words, places) if axis else unpack_words(words.t(), places).t()

    def refusal(self, name: str, fault: str) -> BadWeights:
        """Return the error that names a tensor and its file, or the folder without a tensor."""
        folder = self._source.checkpoint
        seen = f"{folder} {fault}"
        if name:
            seen = f"{find_file(folder, self._tensors, name)}: {name!r} {fault}"
        return BadWeights(
            seen,
            wanted=f"exactly the tensors of the configuration, with linear layers in "
            f"{self.form.name}",
            do=f"download or save {self._source.reference} again",
        )


def _fill(owner: nn.Module, prefix: str, reader: _TensorReader) -> None:
    """Fill a module and its submodules from a checkpoint; replace layers stored in eight bits."""
    for name, parameter in owner.named_parameters(recurse=False):
        parameter.data = reader.read_plain(prefix + name, parameter.shape)
    for name, part in list(owner.named_children()):
        path = f"{prefix}{name}"
        if isinstance(part, nn.Linear):
            setattr(owner, name, _fill_linear(part, path, reader))
        elif expert_weights(part):
            setattr(owner, name, _fill_experts(part, path, reader))
        else:
            _fill(part, f"{path}.", reader)


def _fill_linear(part: nn.Linear, path: str, reader: _TensorReader) -> nn.Module:
    if path == "lm_head" and reader.is_tied:
        if not (reader.is_packed(path) or reader.has(f"{path}.weight")):
            return part
        # A head that is stored is not the input embedding; transformers loads it so as well.
        part.weight = nn.Parameter(torch.empty_like(part.weight))
    if part.bias is not None:
        part.bias.data = reader.read_plain(f"{path}.bias", part.bias.shape)
    if reader.is_rounded(f"{path}.weight"):
        weight = reader.read_rounded(path, part.weight.shape)
        return EightBitLinear(weight, part.bias, reader.form.arithmetic)
    part.weight.data = reader.read_unrounded(path, part.weight.shape)
    return part


def _fill_experts(part: Any, path: str, reader: _TensorReader) -> nn.Module:
    """Return experts whose projections are stored one by one, gate and up apart."""
    check_experts(path, part, dict(part.named_parameters(recurse=False)))
    count, double, width = part.gate_up_proj.shape
    rows = double // 2
    shapes = {"gate_proj": (rows, width), "up_proj": (rows, width), "down_proj": (width, rows)}

    def read_all(read: Callable[[str, Sequence[int]], T]) -> list[list[T]]:
        """Return the weights of all experts, for each of the three projections."""
        return [
            [read(f"{path}.{expert}.{name}", shape) for expert in range(count)]
            for name, shape in shapes.items()
        ]

    # The first expert says how all are stored; the readers refuse one that is not.
    if not reader.is_rounded(f"{path}.0.gate_proj.weight"):
        gates, ups, downs = read_all(reader.read_unrounded)
        pairs = zip(gates, ups, strict=True)
        part.gate_up_proj.data = torch.stack([torch.cat(pair) for pair in pairs])
        part.down_proj.data = torch.stack(downs)
        return cast("nn.Module", part)
    rounded_gates, rounded_ups, rounded_downs = read_all(reader.read_rounded)
    block = reader.form.block
    if block is not None and rows % block[0]:
        raise reader.refusal(
            f"{path}.0.gate_proj.weight", f"has {rows} rows, in blocks of {block[0]}"
        )
    rounded_pairs = zip(rounded_gates, rounded_ups, strict=True)
    gate_ups = [_join(pair, torch.cat) for pair in rounded_pairs]
    gate_up = _join(gate_ups, torch.stack)
    return EightBitExperts(part, gate_up, _join(rounded_downs, torch.stack), reader.form.arithmetic)


def _join(weights: Sequence[Rounded], join: Callable[[list[Tensor]], Tensor]) -> Rounded:
    """Join weights, their eight bits as bytes: not every function takes their dtype."""
    values = join([weight.values.view(torch.uint8) for weight in weights])
    scales = join([weight.scales for weight in weights])
    return Rounded(values.view(weights[0].values.dtype), scales)
