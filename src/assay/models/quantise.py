"""Weights in eight bits: an honest configuration that a network may agree on, never a silent one.

Every row of a weight has a scale of its own. In ``float8`` (:mod:`assay.models.float8`) the inputs of a product are
rounded too, with a scale for every position: a nonce's bits do not depend on its batch mates. ``int8`` is torchao's.
"""

import importlib
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypedDict

import torch
from torch import nn

from assay.errors import BackendUnavailable, ModelError, UsageError, how_to_install
from assay.models.decoder import backbone
from assay.models.eight_bits import EightBitExperts, EightBitLinear
from assay.models.float8 import WIDTHS, round_rows

if TYPE_CHECKING:
    from transformers import PreTrainedModel


CHOSEN_FORMATS = ("int8", "float8")
"""``int8``: weights in int8, products in the model's dtype. ``float8``: e4m3 weights and inputs, products in float8."""

STORED_FORMATS = ("float8", "float8-block", "int8-rows", "int4-groups")
"""Formats in which checkpoints are stored (:mod:`assay.models.formats`)."""

NUMBER_FORMATS = tuple(dict.fromkeys(CHOSEN_FORMATS + STORED_FORMATS))
"""Formats in eight or four bits that the weights of a model may have."""

_FLOAT8_CAPABILITY = (8, 9)


class LoadingFormat(TypedDict):
    """Arguments of :func:`assay.models.load_model`."""

    dtype: str | None
    quantise: str | None


def in_format(name: str | None, *, rest: str | None = None) -> LoadingFormat:
    """Return the arguments with which a model is loaded in a number format: a dtype, or one of eight or four bits.

    Args:
        name: Name of the format; None for the dtype in which the weights are stored.
        rest: Dtype of what eight or four bits leave as it is; None for the one in which it is stored.
    """
    short = name in NUMBER_FORMATS
    return LoadingFormat(dtype=rest if short else name, quantise=name if short else None)


def check_quantisation(name: str | None, device: torch.device) -> None:
    """Refuse a number format that is unknown, or that needs torchao or a device that is not there."""
    if name is None:
        return
    if name not in CHOSEN_FORMATS:
        raise UsageError(f"quantise={name!r}", wanted=" or ".join(CHOSEN_FORMATS), do="choose one, or leave it out")
    if name == "int8":
        _torchao()
    elif device.type == "cuda" and torch.cuda.get_device_capability(device) < _FLOAT8_CAPABILITY:
        raise BackendUnavailable(
            f"float8 on {device}",
            wanted="a CUDA device of compute capability 8.9 or more, or a CPU",
            do="use int8, or a device such as an H100",
        )


def quantise(module: "PreTrainedModel", name: str) -> None:
    """Round the weights of the decoder's linear layers; embeddings, norms and the head stay as they are.

    Raises:
        ModelError: A layer has a width that the device cannot multiply in float8.
    """
    if name == "float8":
        _round_to_float8(backbone(module))
        return
    library = _torchao()
    # Without this, torchao would let Inductor choose kernels by timing, everywhere.
    config = library.Int8WeightOnlyConfig(set_inductor_config=False)
    with _silent():
        library.quantize_(backbone(module), config, filter_fn=lambda part, _: isinstance(part, nn.Linear))


def _round_to_float8(owner: nn.Module) -> None:
    for name in [name for name, _ in owner.named_children()]:  # names alone, so that what is rounded is freed at once
        part = getattr(owner, name)
        if isinstance(part, nn.Linear):
            _check_widths(name, part.weight)
            setattr(owner, name, EightBitLinear(round_rows(part.weight.detach()), part.bias))
        elif stacks := {key: weight for key, weight in part.named_parameters(recurse=False) if weight.dim() > 2}:
            check_experts(name, part, stacks)
            gate_up, down = (round_rows(stacks[key].detach()) for key in ("gate_up_proj", "down_proj"))
            setattr(owner, name, EightBitExperts(part, gate_up, down))
        else:
            _round_to_float8(part)


def _check_widths(name: str, weight: torch.Tensor) -> None:
    rows, columns = weight.shape[-2:]
    if weight.is_cuda and (rows % WIDTHS or columns % WIDTHS):
        raise ModelError(
            f"{name} has {rows} rows of {columns} numbers, and float8 was asked for",
            wanted=f"multiples of {WIDTHS}, which products in float8 need on CUDA",
            do="use another --dtype",
        )


def check_experts(name: str, part: Any, stacks: dict[str, Any]) -> None:
    """Refuse experts that are stored or gated in another way than most: they would stay as they are."""
    plain = getattr(part, "has_gate", False) and getattr(part, "is_concatenated", False)
    other = getattr(part, "has_bias", True) or getattr(part, "is_transposed", True)
    gate = getattr(getattr(part, "_apply_gate", None), "__name__", "")
    if set(stacks) != {"gate_up_proj", "down_proj"} or not plain or other or gate != "_default_apply_gate":
        raise ModelError(
            f"{name} is a {type(part).__name__}, and eight bits were asked for",
            wanted="experts with one gate and no bias, as those of Qwen3",
            do="use another --dtype",
        )
    for key, weight in stacks.items():
        _check_widths(f"{name}.{key}", weight)


def _torchao() -> Any:
    try:
        with _silent():
            library = importlib.import_module("torchao.quantization")
    except ImportError as error:
        raise BackendUnavailable(
            f"eight-bit weights: {error}",
            wanted="torchao, which rounds the weights and multiplies by them",
            do=f"{how_to_install('quant')}; or use --dtype bfloat16",
        ) from None
    return library


@contextmanager
def _silent() -> Iterator[None]:
    """Hide log lines: torchao reports kernels of other devices that it could not load."""
    level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(level)
