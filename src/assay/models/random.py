"""Random weights from the streams of assay: the same bits on every machine, made one parameter at a time.

Every parameter ``p`` is ``0.02 · normal(seed32("{block}_{p}"), numel)`` in row-major order, multiplied in float32 and
cast last. The name of a parameter is the one ``named_parameters()`` gives, so a tied head has no stream of its own: it
is the embedding matrix.
"""

import hashlib
import json
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers.initialization import no_init_weights

from assay import streams
from assay.errors import ModelError, is_out_of_memory
from assay.models.resolve import auto_class, silence_transformers
from assay.streams.backends import as_tensor

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from assay.models.resolve import Source


STD = 0.02
SHAPE_BLOCK = "assay"
"""The block of a ``shape:`` model that was asked for without one."""

# Facts of a file, not of a model: they must not change the digest of a recipe.
_VOLATILE = {"_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version", "use_cache"}


def build(config: "PreTrainedConfig", dtype: torch.dtype) -> "PreTrainedModel":
    """Return a model with its buffers computed and its parameters allocated but never written.

    Untouched memory costs nothing, so the largest shapes are built on the CPU in milliseconds.

    Raises:
        ModelError: No model can be built from the configuration.
    """
    module: PreTrainedModel
    try:
        with silence_transformers(), no_init_weights():
            module = auto_class(config).from_config(config, dtype=dtype, attn_implementation=choose_attention(config))
    except Exception as error:  # a configuration of impossible numbers fails in many ways
        if is_out_of_memory(error):
            raise
        raise ModelError(
            f"no model can be built from this configuration: {error}",
            wanted="sizes that fit together",
            do="compare its config.json with the published one (--model, or REFERENCE)",
        ) from error
    module.tie_weights()
    return module


def choose_attention(config: "PreTrainedConfig") -> str:
    """Return ``sdpa``, or ``eager`` for an architecture without it: GPT-OSS, whose softmax has a sink."""
    architecture: Any = auto_class(config)._model_mapping.get(type(config), None)
    return "sdpa" if getattr(architecture, "_supports_sdpa", True) else "eager"


def randomise(module: nn.Module, block: str, device: torch.device, *, unit_norms: bool) -> None:
    """Replace every parameter by its stream of a block, in its dtype, and put it on a device; unit norms are one."""
    for name, parameter in module.named_parameters():
        if unit_norms and _is_norm(name):
            parameter.data = torch.ones(parameter.shape, dtype=parameter.dtype, device=device)
        else:
            _draw(name, parameter, block, device)


def randomise_embeddings(module: "PreTrainedModel", block: str) -> None:
    """Replace the input embeddings only. A head that is tied to them changes with them, for it is the same matrix."""
    weight = module.get_input_embeddings().weight
    name, parameter = next(pair for pair in module.named_parameters() if pair[1] is weight)
    _draw(name, parameter, block, parameter.device)


def _is_norm(name: str) -> bool:
    owner = name.split(".")[-2]
    return name.endswith(".weight") and ("norm" in owner or owner.startswith("ln_"))


def _draw(name: str, parameter: nn.Parameter, block: str, device: torch.device) -> None:
    backend = streams.get_backend("auto", device.type)
    normals = backend.normals(streams.seeds([f"{block}_{name}"]), parameter.numel(), "float32")
    values = as_tensor(normals)[0].mul_(STD).reshape(parameter.shape)
    held = parameter.data
    if isinstance(held, DTensor):  # this process holds a part
        part = distribute_tensor(values.to(held.dtype), held.device_mesh, held.placements, src_data_rank=None)
        held.to_local().copy_(part.to_local())
    else:
        parameter.data = values.to(device, parameter.dtype)


def recipe_digest(source: "Source", weights: str, block: str, kept: str) -> str:
    """Return the SHA-256 in hex of what random weights were made from: configuration, mode, block, and the rest.

    The rest is the digest or the block of the weights that were not drawn for this block; empty if all were.
    """
    recipe = {
        "block": block,
        "config": {key: value for key, value in source.published.items() if key not in _VOLATILE},
        "kept": kept or None,
        "std": STD,
        "unit_norms": source.directory is None,
        "weights": weights,
    }
    return hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()
