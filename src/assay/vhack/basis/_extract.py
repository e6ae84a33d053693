"""From a model and pairs to a basis: choose the pairs, compute their gradients, find the axes."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict, Unpack, cast

import torch

from assay.errors import DataError
from assay.models import Model
from assay.vhack.basis._basis import Basis, check_axis_settings
from assay.vhack.basis._origin import Origin
from assay.vhack.basis._paired import PairGradients, check_method
from assay.vhack.basis._split import check_duplicates, pair_names, split_pairs
from assay.vhack.gradients import (
    SVDCache,
    check_rank,
    factor_dtype,
    module_of,
    per_sample_gradients,
    target_modules,
    weight_svd,
    weights_digest,
)
from assay.vhack.pairs import Pair

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["extract", "load_or_extract", "pair_gradients"]

Progress = Callable[[int, int], None]


class Running(TypedDict, total=False):
    """How gradients are computed; every one may be left out.

    Attributes:
        svd: factors of the weights, all of them; left out, they are computed.
        rank: keep only the strongest singular directions. How much of the gradient they hold is measured on the first
            pair, over all modules, and kept as ``origin.captured``.
        factors: dtype of the factors, as in :func:`weight_svd`.
        cache: directory of factors on disk; left out, nothing is kept there.
        max_tokens, checkpointing, progress: as in :func:`per_sample_gradients`.
    """

    svd: SVDCache | None
    rank: int | None
    factors: str | None
    cache: Path | None
    max_tokens: int | None
    checkpointing: bool
    progress: Progress | None


class Choices(Running, total=False):
    """Which pairs and axes; every one may be left out.

    Attributes:
        n_heldout, heldout_groups: pairs not to use, as in :func:`split_pairs`.
        top_k, tau_axis, method: as in :meth:`PairGradients.basis`.
    """

    n_heldout: int | None
    heldout_groups: Sequence[str] | None
    top_k: int
    tau_axis: float
    method: str


def pair_gradients(
    model: "Model | PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase | None",
    pairs: Sequence[Pair],
    *,
    names: Sequence[str] | None = None,
    **running: Unpack[Running],
) -> PairGradients:
    """The gradients of both sides of every pair.

    A pair whose sides are the same text, or have the same gradient, says nothing: it is left out, and its key is in
    ``origin.skipped``.

    Args:
        model: the model.
        tokenizer: its tokenizer; None takes the one that was loaded with a :class:`assay.models.Model`.
        pairs: the pairs.
        names: what to call each pair in an error; None numbers them.
        running: see :class:`Running`.

    Raises:
        DataError: a pair occurs twice, cannot be used (:func:`per_sample_gradients` says why), or no pair is left; the
            message names the pair.
        UsageError, ModelError, BadWeights, OutOfMemory, StorageError: as :func:`per_sample_gradients` and
            :func:`weight_svd` raise them.
    """
    if tokenizer is None and isinstance(model, Model):
        tokenizer = model.tokenizer
    check_rank(running.get("rank"))
    labels = list(names) if names is not None else pair_names(pairs)
    check_duplicates(pairs, labels)
    kept = [index for index, pair in enumerate(pairs) if pair.hack != pair.clean]
    if not kept:
        raise _nothing_left(len(pairs))
    svd, captured = _factors(model, tokenizer, pairs[kept[0]], labels[kept[0]], running)
    sides = [[pairs[index].samples()[side] for index in kept] for side in (0, 1)]
    found = per_sample_gradients(
        model,
        tokenizer,
        sides[0] + sides[1],
        svd=svd,
        names=[f"{labels[index]}, {side} side" for side in ("hack", "clean") for index in kept],
        max_tokens=running.get("max_tokens"),
        checkpointing=running.get("checkpointing", False),
        progress=running.get("progress"),
    )
    hack, clean = ({name: part.chunk(2)[side] for name, part in found.items()} for side in (0, 1))
    rows = [row for row in range(len(kept)) if any(not torch.equal(hack[name][row], clean[name][row]) for name in hack)]
    if not rows:
        raise _nothing_left(len(pairs))
    used = [pairs[kept[row]] for row in rows]
    keys = tuple(pair.key for pair in used)
    return PairGradients(
        {name: part[rows] for name, part in hack.items()},
        {name: part[rows] for name, part in clean.items()},
        groups=[pair.group for pair in used],
        keys=keys,
        origin=replace(
            _source_of(model, svd),
            captured=captured,
            skipped=tuple(pair.key for pair in pairs if pair.key not in keys),
        ),
    )


def extract(
    model: "Model | PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase | None",
    pairs: Sequence[Pair],
    **choices: Unpack[Choices],
) -> Basis:
    """The hack directions of a model, from those pairs that are not held out; ``basis.origin.pairs`` says which.

    Args:
        model: the model.
        tokenizer: its tokenizer, or None as in :func:`pair_gradients`.
        pairs: the pairs.
        choices: see :class:`Choices` and :class:`Running`.

    Raises:
        AssayError: as :func:`split_pairs`, :func:`pair_gradients` and :meth:`PairGradients.basis` raise them.
    """
    used, names, wanted = _chosen(pairs, choices)
    gradients = pair_gradients(model, tokenizer, used, names=names, **_running(choices))
    return gradients.basis(top_k=wanted.top_k, tau_axis=wanted.tau_axis, method=wanted.method)


def load_or_extract(
    path: str | Path,
    model: "Model | PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase | None",
    pairs: Sequence[Pair],
    *,
    k_use: int | None = 5,
    **choices: Unpack[Choices],
) -> Basis:
    """The basis in a file, or, where there is no such file, the one that is extracted now and saved there.

    Args:
        path: the file.
        model: the model.
        tokenizer: its tokenizer, or None as in :func:`pair_gradients`.
        pairs: the pairs.
        k_use: how many axes per module to return; None for all. The file has all.
        choices: as in :func:`extract`.

    Raises:
        DataError: the file was made for other weights, pairs or settings than these; the message names which.
        AssayError: as :func:`extract` and :meth:`Basis.save` raise them.
    """
    if not Path(path).exists():
        basis = extract(model, tokenizer, pairs, **choices)
        basis.save(path)
        return basis if k_use is None else basis.slice(k_use)
    used, _, wanted = _chosen(pairs, choices)
    svd = choices.get("svd")
    weight = next(iter(target_modules(model).values())).weight
    expected: dict[str, object] = {
        "dtype": _dtype_name(weight.dtype),
        "rank": choices.get("rank") or (svd.rank if svd is not None else None),
        "factors": _dtype_name(svd.dtype if svd is not None else factor_dtype(choices.get("factors"), weight)),
        "top_k": wanted.top_k,
        "tau_axis": wanted.tau_axis,
        "method": wanted.method,
        "given": tuple(sorted(pair.key for pair in used)),
    }
    return Basis.load(path, model, k_use, expect=expected)


def _chosen(pairs: Sequence[Pair], choices: Choices) -> tuple[list[Pair], list[str], Origin]:
    """The pairs to use, what to call them, and the settings of the axes, all checked before any work."""
    names = pair_names(pairs)
    check_duplicates(pairs, names)
    used, _ = split_pairs(pairs, n_heldout=choices.get("n_heldout"), heldout_groups=choices.get("heldout_groups"))
    settings = Origin(
        top_k=choices.get("top_k", Origin.top_k),
        tau_axis=choices.get("tau_axis", Origin.tau_axis),
        method=choices.get("method", Origin.method),
    )
    check_axis_settings(settings.top_k, settings.tau_axis)
    check_method(settings.method, len(used))
    by_key = {pair.key: name for pair, name in zip(pairs, names, strict=True)}
    return used, [by_key[pair.key] for pair in used], settings


def _running(choices: Choices) -> Running:
    return cast("Running", {name: value for name, value in choices.items() if name in Running.__annotations__})


def _nothing_left(count: int) -> DataError:
    return DataError(
        f"none of {count} pairs has two sides that differ",
        wanted="pairs of a hack and a clean completion",
        do="check the pairs; if the completions do differ, check that the model is the right one",
    )


def _factors(
    model: "Model | PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase | None",
    first: Pair,
    name: str,
    running: Running,
) -> tuple[SVDCache, float]:
    """The factors, truncated if wanted, and the share of the first pair's gradient energy that is left."""
    full = running.get("svd") or weight_svd(model, dtype=running.get("factors"), cache=running.get("cache"))
    rank = running.get("rank")
    if rank is None:
        return full, 1.0
    truncated = full.truncated(rank)
    found = per_sample_gradients(
        model, tokenizer, first.samples(), svd=full, names=[f"{name}, hack side", f"{name}, clean side"]
    )
    total = sum(float(rows.square().sum()) for rows in found.values())
    kept = sum(float(rows[:, :rank].square().sum()) for rows in found.values())
    return truncated, kept / total if total else 1.0


def _source_of(model: "Model | PreTrainedModel", svd: SVDCache) -> Origin:
    module = module_of(model)
    return Origin(
        model=model.reference if isinstance(model, Model) else type(module).__name__,
        weights=weights_digest(module),
        dtype=_dtype_name(module.dtype),
        rank=svd.rank,
        factors=_dtype_name(svd.dtype),
    )


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
