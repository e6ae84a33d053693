"""Random weights: the same bits on every machine.

Every parameter ``p`` is ``0.02 · normal(seed32("{block}_{p}"), numel)`` in row-major order,
multiplied in float32 and cast last. The name of a parameter is the one that ``named_parameters()``
gives, so a tied head has no stream of its own: it is the embedding matrix.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from assay import streams
from assay.loading_progress import report_progress
from assay.streams.arrays import as_tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

STD = 0.02

SHAPE_BLOCK = "assay"
"""Block of a ``shape:`` model that is loaded without one."""

_VOLATILE = {
    "_name_or_path",
    "architectures",
    "dtype",
    "torch_dtype",
    "transformers_version",
    "use_cache",
}
"""Facts of a file, not of a model: they must not change the digest of a recipe."""


def randomise(module: nn.Module, block: str, device: torch.device, *, unit_norms: bool) -> None:
    """Replace every parameter by its stream of a block, in its dtype on a device.

    With unit norms the weights of norms are ones.
    """
    parameters = dict(module.named_parameters())
    total = sum(parameter.numel() for parameter in parameters.values())
    drawn = 0
    for name, parameter in parameters.items():
        if unit_norms and _is_norm(name):
            parameter.data = torch.ones(parameter.shape, dtype=parameter.dtype, device=device)
        else:
            _draw(name, parameter, block, device)
        drawn += parameter.numel()
        report_progress("drawing weights", drawn, total)


def randomise_embeddings(module: "PreTrainedModel", block: str) -> None:
    """Replace the input embeddings, and a head that is tied to them, by their stream of a block."""
    weight: Any = module.get_input_embeddings().weight
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    _draw(names[id(weight)], weight, block, weight.device)


def _is_norm(name: str) -> bool:
    owner = name.split(".")[-2]
    return name.endswith(".weight") and ("norm" in owner or owner.startswith("ln_"))


def _draw(name: str, parameter: nn.Parameter, block: str, device: torch.device) -> None:
    backend = streams.get_backend("auto", device.type)
    normals = backend.normals(streams.seeds([f"{block}_{name}"]), parameter.numel(), "float32")
    values = as_tensor(normals)[0].mul_(STD).reshape(parameter.shape)
    parameter.data = values.to(device, parameter.dtype)


def recipe_digest(
    published: Mapping[str, Any], weights: str, block: str, *, others: str = "", unit_norms: bool
) -> str:
    """Return the SHA-256 in hex of what random weights are made from.

    Args:
        published: Configuration as the raw JSON object.
        weights: Weight mode.
        block: Block that weights are drawn for.
        others: Digest of the stored weights that are not drawn, or the block of those that are
            drawn for another one; empty without such weights.
        unit_norms: Whether norms are ones.
    """
    recipe = {
        "block": block,
        "config": {key: value for key, value in published.items() if key not in _VOLATILE},
        "kept": others or None,
        "std": STD,
        "unit_norms": unit_norms,
        "weights": weights,
    }
    return hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()
