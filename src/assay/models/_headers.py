"""Whether the tensors of a checkpoint fit its configuration, told by the headers of its files alone.

Reading and hashing a large checkpoint takes minutes, so what cannot be loaded is refused before. Where names and shapes
are not simply those of the configuration, the loader of transformers is asked itself, over tensors without numbers: it
knows older names, tied weights, and experts that are stored one by one.
"""

from collections.abc import Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.initialization import no_init_weights

from assay.errors import BadWeights
from assay.models._checkpoint import Stored, file_of
from assay.models._random import attention_of, build
from assay.models._resolve import Source, auto_class
from assay.models.quiet import quiet

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Shape = tuple[int, ...]
_SHAPED, _MISSING, _SURPLUS = "of another shape", "missing", "surplus"
_KINDS = {"mismatched_keys": _SHAPED, "missing_keys": _MISSING, "unexpected_keys": _SURPLUS}


class _Header(Tensor):
    """A tensor without numbers that passes for one on every device."""

    def to(self, *_: Any, dtype: torch.dtype | None = None, **__: Any) -> Tensor:
        return self if dtype is None else super().to(dtype=dtype)


def check_fits(source: Source, tensors: list[Stored]) -> None:
    """Refuse a checkpoint whose tensors are not those of its configuration; only headers are used.

    What the loader cannot tell without numbers is left to the load.

    Args:
        source: Where the model comes from; its checkpoint is not quantised.
        tensors: All tensors of the checkpoint.

    Raises:
        BadWeights: A tensor is missing, surplus or of another shape; names the first one and its file.
        ModelError: No model can be built from the configuration.
    """
    with torch.device("meta"):
        module = build(source.config, torch.float32)
    stored, wanted = {t.name: t.shape for t in tensors}, _layout(module)
    named = _compared(stored, wanted, _tied(module))
    if not any(named.values()):
        return
    try:
        found = _asked(source, tensors)
    except Exception:  # it stacks experts of two shapes, or what it does needs numbers: names decide
        found = None
    if found is None:  # a surplus tensor may be one that the loader passes over
        found = {**named, _SURPLUS: []} if _is_certain(named) else {}
    faults = named if any(found.values()) and _is_certain(named) else found
    for kind, names in faults.items():
        if names:
            raise _refusal(source, tensors, kind, names, wanted)


def _asked(source: Source, tensors: list[Stored]) -> dict[str, list[str]]:
    """Return the names of the tensors that the loader finds at fault, by kind."""
    heads = {t.name: _header(t) for t in tensors}
    architecture = auto_class(source.config)._model_mapping[type(source.config)]
    with quiet(), no_init_weights():
        _, report = architecture.from_pretrained(
            None,
            config=source.config,
            state_dict=heads,
            dtype=torch.float32,
            attn_implementation=attention_of(source.config),
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    return faults_of(report)


def _header(stored: Stored) -> Tensor:
    header: Tensor = _Header._make_subclass(_Header, stored.without_numbers())
    return header


def faults_of(report: Mapping[str, Any]) -> dict[str, list[str]]:
    """Return the sorted names of tensors at fault by kind, in words, of a loading report of transformers."""
    return {
        kind: sorted(str(key[0] if isinstance(key, tuple) else key) for key in report.get(fault) or ())
        for fault, kind in _KINDS.items()
    }


def _layout(module: "PreTrainedModel") -> dict[str, Shape]:
    """Return the shape of every tensor by its name in a file; names of older layouts are not among them."""
    inside: dict[str, Tensor] = {name: tensor.to("meta") for name, tensor in module.state_dict().items()}
    with suppress(Exception):  # another version of transformers, or experts that it cannot take apart
        from transformers.core_model_loading import revert_weight_conversion

        inside = revert_weight_conversion(module, inside)
    return {name: tuple(tensor.shape) for name, tensor in inside.items()}


def _tied(module: "PreTrainedModel") -> set[str]:
    """Return the names of the tensors that are another one too, and need not be stored."""
    kept = {name for name, _ in module.named_parameters()}
    return {name for name, _ in module.named_parameters(remove_duplicate=False)} - kept


def _compared(stored: dict[str, Shape], wanted: dict[str, Shape], tied: set[str]) -> dict[str, list[str]]:
    return {
        _SHAPED: sorted(name for name in stored.keys() & wanted.keys() if stored[name] != wanted[name]),
        _MISSING: sorted(wanted.keys() - stored.keys() - tied),
        _SURPLUS: sorted(stored.keys() - wanted.keys() - tied),
    }


def _is_certain(faults: dict[str, list[str]]) -> bool:
    """Return whether names say what is wrong: where tensors are both missing and surplus, names may be older ones."""
    return bool(faults[_SHAPED]) or bool(faults[_MISSING]) != bool(faults[_SURPLUS])


def _refusal(
    source: Source, tensors: list[Stored], kind: str, names: list[str], wanted: dict[str, Shape]
) -> BadWeights:
    name = names[0]
    at = {t.name: t for t in tensors}
    shapes = f": {list(at[name].shape)}, not {list(wanted[name])}" if name in at and name in wanted else ""
    many = f"{len(names)} tensors are" if len(names) > 1 else "a tensor is"
    return BadWeights(
        f"{file_of(source.checkpoint, at, name)}: {many} {kind}, the first is {name!r}{shapes}",
        wanted="exactly the tensors of the configuration",
        do=f"download or save {source.reference} again; a fused or quantised layout is not read",
    )
