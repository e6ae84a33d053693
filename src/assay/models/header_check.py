"""The check that a checkpoint has exactly the tensors of its configuration, before it is read.

Only headers are used: reading and hashing a large checkpoint takes minutes, so what cannot be
loaded is refused before.
"""

import re
from collections.abc import Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from torch import Tensor

from assay.errors import BadWeights
from assay.files.weights import bad_weights
from assay.models.checkpoint import EIGHT_BITS, StoredTensor, find_file
from assay.models.configuration import build_empty
from assay.models.resolve import ModelSource

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_FAULTS = {
    "mismatched_keys": "of another shape",
    "missing_keys": "missing",
    "unexpected_keys": "surplus",
}
"""Faults by the key under which transformers reports them."""

_SKIPPED = re.compile(r"rotary_emb\.inv_freq$|(^|\.)position_ids$")
"""Buffers in old files, which transformers skips."""


def check_headers(source: ModelSource, tensors: list[StoredTensor]) -> None:
    """Refuse tensors that are not those of the configuration, or are in eight bits without reason.

    Where tensors are both missing and surplus, names may be of an older layout that transformers
    converts: that is left to the load.
    """
    for tensor in tensors:
        if tensor.dtype in EIGHT_BITS:
            raise bad_weights(
                f"{tensor.file} stores {tensor.name!r} as {tensor.dtype}, and config.json has no "
                f"quantization_config",
                "a configuration that says how they are used",
            )
    module = build_empty(source.config)
    shapes = _shapes_in_files(module)
    stored = {tensor.name: tensor for tensor in tensors}
    names = {name for name, _ in module.named_parameters()}
    # A tied matrix has two names, and need not be stored under the second.
    tied = {name for name, _ in module.named_parameters(remove_duplicate=False)} - names
    ignored = [_SKIPPED, *map(re.compile, module._keys_to_ignore_on_load_unexpected or ())]
    shaped = sorted(
        name for name in stored.keys() & shapes.keys() if stored[name].shape != shapes[name]
    )
    missing = sorted(shapes.keys() - stored.keys() - tied)
    surplus = [
        name
        for name in sorted(stored.keys() - shapes.keys() - tied)
        if not any(pattern.search(name) for pattern in ignored)
    ]
    if shaped:
        name = shaped[0]
        difference = f": {list(stored[name].shape)}, not {list(shapes[name])}"
        raise _misfit(str(stored[name].file), "mismatched_keys", shaped, difference)
    if missing and not surplus:
        file = find_file(source.checkpoint, stored, missing[0])
        raise _misfit(str(file), "missing_keys", missing)
    if surplus and not missing:
        raise _misfit(str(stored[surplus[0]].file), "unexpected_keys", surplus)


def check_report(reference: str, report: Mapping[str, Any]) -> None:
    """Refuse the misfits that transformers reports of a load, which headers did not show."""
    for key in _FAULTS:
        entries = report.get(key) or ()
        names = sorted(str(entry[0] if isinstance(entry, tuple) else entry) for entry in entries)
        if names:
            raise _misfit(repr(reference), key, names)


def _shapes_in_files(module: "PreTrainedModel") -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor by its name in a file, as transformers writes it today."""
    inside: dict[str, Tensor] = {
        name: tensor.to("meta") for name, tensor in module.state_dict().items()
    }
    # Another version of transformers, or experts that it cannot take apart.
    with suppress(Exception):
        from transformers.core_model_loading import revert_weight_conversion

        inside = revert_weight_conversion(module, inside)
    return {name: tuple(tensor.shape) for name, tensor in inside.items()}


def _misfit(where: str, key: str, names: list[str], difference: str = "") -> BadWeights:
    tensors = f"{len(names)} tensors are" if len(names) > 1 else "a tensor is"
    return BadWeights(
        f"{where}: {tensors} {_FAULTS[key]}, the first is {names[0]!r}{difference}",
        wanted="exactly the tensors of the configuration",
        do="download or save the checkpoint again; a fused or quantised layout is not read",
    )
