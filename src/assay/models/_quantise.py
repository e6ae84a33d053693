"""Weights in eight bits, by torchao: an honest configuration that a network may agree on, never a silent one.

Every row of a weight has a scale of its own. In ``float8`` the inputs of a product are rounded too, with a scale for
every position: a nonce's bits do not depend on its batch mates.
"""

import importlib
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from assay.errors import BackendUnavailable, UsageError
from assay.models.decoder import backbone

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NUMBER_FORMATS = ("int8", "float8")
"""``int8``: weights in int8, products in the model's dtype. ``float8``: e4m3 weights and inputs, products in float8."""

_FLOAT8_CAPABILITY = (8, 9)


def check_quantisation(name: str | None, device: torch.device) -> None:
    """Refuse a number format that is unknown, or that needs torchao or a device that is not there."""
    if name is None:
        return
    if name not in NUMBER_FORMATS:
        raise UsageError(f"quantise={name!r}", wanted=" or ".join(NUMBER_FORMATS), do="choose one, or leave it out")
    _torchao()
    if name == "float8" and (device.type != "cuda" or torch.cuda.get_device_capability(device) < _FLOAT8_CAPABILITY):
        raise BackendUnavailable(
            f"float8 on {device}",
            wanted="a CUDA device of compute capability 8.9 or more",
            do="use int8, or a device such as an H100",
        )


def quantise(module: "PreTrainedModel", name: str) -> None:
    """Round the weights of the decoder's linear layers; embeddings, norms and the head stay as they are."""
    library = _torchao()
    configs = {
        "int8": library.Int8WeightOnlyConfig,
        "float8": partial(library.Float8DynamicActivationFloat8WeightConfig, granularity=library.PerRow()),
    }
    config = configs[name](set_inductor_config=False)  # which would let Inductor choose kernels by timing, everywhere
    with _silent():
        library.quantize_(backbone(module), config, filter_fn=lambda part, _: isinstance(part, nn.Linear))


def _torchao() -> Any:
    try:
        with _silent():
            library = importlib.import_module("torchao.quantization")
    except ImportError as error:
        raise BackendUnavailable(
            f"eight-bit weights: {error}",
            wanted="torchao, which rounds the weights and multiplies by them",
            do="pip install 'assay[quant]', or use --dtype bfloat16",
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
