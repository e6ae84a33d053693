"""From a model and pairs to a basis: choose the pairs, compute their gradients, find the axes.

Gradients of pairs are kept together with their Gram matrices, so that a basis of any subset costs
no new pass.

Shapes: N pairs, R coordinates of δS in a module.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypedDict, Unpack

import torch
from torch import Tensor

from assay.errors import DataError, UsageError
from assay.files.storage import check_new_file
from assay.models.model import AnyModel, AnyTokenizer, Model
from assay.streams.arrays import dtype_name
from assay.vhack.directions.basis.axes import check_axis_settings, find_axes, gram, zero_weak_axes
from assay.vhack.directions.basis.basis import Basis, Origin
from assay.vhack.directions.gradients.batches import Progress, find_chat_template, stage_progress
from assay.vhack.directions.gradients.per_sample import encode_samples, per_sample_gradients
from assay.vhack.directions.gradients.svd import (
    Factors,
    SVDCache,
    check_rank,
    factor_dtype,
    kept_rank,
    weight_svd,
)
from assay.vhack.directions.gradients.targets import (
    MIN_COVERAGE,
    coverage,
    module_of,
    target_modules,
    weights_digest,
)
from assay.vhack.pairs.pairs import Pair, pair_names
from assay.vhack.pairs.selection import check_method, select_pairs

# Parts of the model whose full factors exist one after the other where truncated ones are wanted.
_PARTS = 8


class PairGradients:
    """Gradients of the hack and the clean side of N pairs, per module.

    Args:
        hack: Gradients of the hack sides, [N, R] per module name.
        clean: Gradients of the clean sides, likewise.
        groups: Group of each pair; None puts every pair into a group of its own.
        keys: Name of each pair; None numbers them.
        tokens: Number of tokens of both sides of each pair that came to each expert, [N, E] per
            module of experts.
        origin: Model and settings they come from; its pairs and groups are replaced by these.

    Raises:
        UsageError: The two sides differ in modules or shapes, or a list has another length.
        DataError: A gradient is not finite; the message names module and pair.
    """

    def __init__(
        self,
        hack: Mapping[str, Tensor],
        clean: Mapping[str, Tensor],
        *,
        groups: Sequence[str] | None = None,
        keys: Sequence[str] | None = None,
        tokens: Mapping[str, Tensor] | None = None,
        origin: Origin | None = None,
    ) -> None:
        n = _check_shapes(hack, clean)
        self.hack = dict(hack)
        self.clean = dict(clean)
        self.tokens = dict(tokens or {})
        self.keys = tuple(str(index) for index in range(n)) if keys is None else tuple(keys)
        self.groups = self.keys if groups is None else tuple(groups)
        if not len(self.keys) == len(self.groups) == n:
            raise UsageError(
                f"{len(self.keys)} keys and {len(self.groups)} groups for {n} pairs",
                wanted="one of each per pair",
                do="pass lists as long as the gradients",
            )
        self.origin = replace(origin or Origin(), pairs=self.keys, groups=self.groups)
        for side, gradients in (("hack", self.hack), ("clean", self.clean)):
            for name, rows_NR in gradients.items():
                bad_N = ~torch.isfinite(rows_NR).all(dim=1)
                if bad_N.any():
                    raise DataError(
                        f"the gradient of pair {self.keys[int(bad_N.nonzero()[0])]}, {side} side, "
                        f"is not finite in {name}",
                        wanted="finite gradients",
                        do="leave the pair out, or run the model in float32",
                    )

    def __len__(self) -> int:
        return len(self.keys)

    def differences(self, module: str) -> Tensor:
        """Return hack minus clean of one module, [N, R]."""
        return self.hack[module] - self.clean[module]

    def both_sides(self, module: str) -> Tensor:
        """Return the gradients of one module, of hack sides and then of clean ones, [2N, R]."""
        return torch.cat([self.hack[module], self.clean[module]])

    @cached_property
    def _grams(self) -> dict[str, Tensor]:
        return {name: gram(self.differences(name)) for name in self.hack}

    @cached_property
    def _clean_grams(self) -> dict[str, Tensor]:
        return {name: gram(rows_NR) for name, rows_NR in self.clean.items()}

    def basis(
        self,
        *,
        top_k: int = 12,
        tau_axis: float = 0.0,
        method: str = "lda",
        keep: Sequence[int] | None = None,
    ) -> Basis:
        """Return the basis of these pairs, or of some of them.

        Args:
            top_k: Number of axes per module; fewer where there are fewer pairs.
            tau_axis: Share of the first singular value below which an axis becomes zero.
            method: Name of the method. ``"svd"`` takes the right singular vectors of the
                differences, ``"lda"`` those after whitening by the covariance of the clean
                gradients.
            keep: Indices of the pairs to use; None uses all.

        Raises:
            UsageError: A setting is out of range, or there are too few pairs.
            DataError: The two sides do not differ in any module.
        """
        check_axis_settings(top_k, tau_axis)
        rows = list(range(len(self))) if keep is None else list(keep)
        check_method(method, len(rows))
        index = torch.tensor(rows)
        square = (index[:, None], index[None, :])
        axes = {}
        values = {}
        votes = {}
        for name, gram_NN in self._grams.items():
            clean = (
                (self.clean[name][index], self._clean_grams[name][square])
                if method == "lda"
                else None
            )
            axes_KR, values[name], votes[name] = find_axes(
                self.differences(name)[index], gram_NN[square], top_k=top_k, clean=clean
            )
            axes[name] = zero_weak_axes(axes_KR, values[name], tau_axis)
        if not any(values_K.any() for values_K in values.values()):
            raise DataError(
                "hack and clean have the same gradients in every module",
                wanted="pairs whose two sides differ",
                do="check the pairs: the two completions must not be the same",
            )
        origin = replace(
            self.origin,
            top_k=top_k,
            tau_axis=tau_axis,
            method=method,
            pairs=tuple(self.keys[row] for row in rows),
            groups=tuple(self.groups[row] for row in rows),
            tokens={
                name: tuple(tokens_NE[index].sum(dim=0).tolist())
                for name, tokens_NE in self.tokens.items()
            },
        )
        return Basis(axes, values, votes, origin)


def _check_shapes(hack: Mapping[str, Tensor], clean: Mapping[str, Tensor]) -> int:
    shapes = {name: tuple(rows.shape) for name, rows in hack.items()}
    counts = {shape[0] for shape in shapes.values()}
    if (
        shapes != {name: tuple(rows.shape) for name, rows in clean.items()}
        or len(counts) != 1
        or any(len(shape) != 2 for shape in shapes.values())
        or 0 in counts
    ):
        raise UsageError(
            "hack and clean gradients of different modules, numbers or shapes",
            wanted="the same modules on both sides, each [N, R] with one N of at least 1",
            do="compute both sides from the same pairs with the same model",
        )
    return counts.pop()


class GradientOptions(TypedDict, total=False):
    """Keywords of :func:`pair_gradients` and :func:`extract`."""

    # None takes the one that was loaded with an assay.models.Model
    tokenizer: AnyTokenizer
    svd: SVDCache | None  # factors of all weights; None computes them
    # Number of singular directions to keep per matrix, the strongest first; None keeps all. The
    # share of the gradient that they hold is measured on the first pair, over all modules, and kept
    # as origin.captured, which stays 1 where svd is truncated already. Unless factors are given,
    # full ones never exist of more than an eighth of the modules.
    rank: int | None
    factors: str | None  # dtype of the factors, as in weight_svd
    cache: str | Path | None  # directory of factors on disk; None keeps nothing there
    min_coverage: float  # share of the model's weights that targets must be, as in weight_svd
    max_tokens: int | None  # most tokens per batch, as in per_sample_gradients
    checkpointing: bool  # whether to recompute layers in the backward pass to save memory
    # Called with the number of steps done and of all: matrices decomposed, then samples.
    progress: Progress | None


def pair_gradients(
    pairs: Sequence[Pair],
    model: AnyModel,
    *,
    names: Sequence[str] | None = None,
    **options: Unpack[GradientOptions],
) -> PairGradients:
    """Return the gradients of both sides of every pair.

    A pair whose sides are the same text, or have the same gradient, carries no information: it is
    left out, and its key is in ``origin.skipped``.

    Args:
        pairs: Pairs of a hack and a clean completion.
        model: Model in float32 or bfloat16.
        names: Names of the pairs in error messages; None numbers them.
        options: Keywords of :class:`GradientOptions`.

    Raises:
        DataError: A pair occurs twice, cannot be used (:func:`per_sample_gradients` says why), or
            no pair is left; the message names the pair.
        AssayError: As :func:`per_sample_gradients` and :func:`weight_svd` raise it.
    """
    svd = options.get("svd")
    rank = options.get("rank")
    progress = options.get("progress")
    check_rank(rank)
    labels = {pair.key: name for pair, name in zip(pairs, pair_names(pairs, names), strict=True)}
    if not (differing := [pair for pair in pairs if pair.hack != pair.clean]):
        raise _nothing_left(len(pairs))
    samples = [pair.samples()[side] for side in (0, 1) for pair in differing]
    side_names = [
        f"{labels[pair.key]}, {side} side" for side in ("hack", "clean") for pair in differing
    ]
    # Refuses before the first decomposition.
    encode_samples(samples, model, side_names, options.get("tokenizer"))
    matrices = 0 if svd is not None else len(target_modules(model))
    stages = [stage_progress(progress, before, matrices + len(samples)) for before in (0, matrices)]
    decompose = partial(
        weight_svd,
        model,
        dtype=options.get("factors"),
        cache=options.get("cache"),
        min_coverage=options.get("min_coverage", MIN_COVERAGE),
    )
    gradients_of = partial(
        per_sample_gradients,
        tokenizer=options.get("tokenizer"),
        max_tokens=options.get("max_tokens"),
        checkpointing=options.get("checkpointing", False),
    )
    captured = 1.0
    if rank is not None:
        first_pair = slice(None, None, len(differing))  # both sides of the first pair
        svd, captured = _truncated(
            list(target_modules(model)),
            rank,
            svd,
            decompose,
            partial(gradients_of, samples[first_pair], model, names=side_names[first_pair]),
            stages[0],
        )
    elif svd is None:
        svd = decompose(progress=stages[0])
    gradients = gradients_of(samples, model, svd=svd, names=side_names, progress=stages[1])
    hack, clean = (
        {name: part.chunk(2)[side] for name, part in gradients.items()} for side in (0, 1)
    )
    rows = [
        row
        for row in range(len(differing))
        if any(not torch.equal(hack[name][row], clean[name][row]) for name in hack)
    ]
    if not rows:
        raise _nothing_left(len(pairs))
    groups_of_keys = {differing[row].key: differing[row].group for row in rows}
    module = module_of(model)
    origin = Origin(
        model=model.reference if isinstance(model, Model) else type(module).__name__,
        weights=weights_digest(module),
        dtype=dtype_name(module.dtype),
        rank=svd.rank,
        factors=dtype_name(svd.dtype),
        skipped=tuple(pair.key for pair in pairs if pair.key not in groups_of_keys),
        captured=captured,
        coverage=coverage(module),
        chat_template=find_chat_template(samples, model, options.get("tokenizer")),
    )
    return PairGradients(
        {name: part[rows] for name, part in hack.items()},
        {name: part[rows] for name, part in clean.items()},
        groups=list(groups_of_keys.values()),
        keys=list(groups_of_keys),
        tokens={name: torch.add(*part.chunk(2))[rows] for name, part in gradients.tokens.items()},
        origin=origin,
    )


def extract(
    pairs: Sequence[Pair],
    model: AnyModel,
    *,
    path: str | Path | None = None,
    n_heldout: int | None = None,
    heldout_groups: Sequence[str] | None = None,
    top_k: int = Origin.top_k,
    tau_axis: float = Origin.tau_axis,
    method: str = Origin.method,
    **options: Unpack[GradientOptions],
) -> Basis:
    """Return the hack directions of a model, from the pairs that are not held out.

    ``basis.origin.pairs`` lists the pairs that were used.

    Args:
        pairs: Pairs of a hack and a clean completion.
        model: Model in float32 or bfloat16.
        path: File of the basis. Where it exists, the basis is read from it and nothing is
            extracted; otherwise the extracted basis is written there. None reads and writes
            nothing.
        n_heldout: Number of pairs at the end to hold out, as in :func:`split_pairs`.
        heldout_groups: Groups to hold out, as in :func:`split_pairs`.
        top_k: Number of axes per module, as in :meth:`PairGradients.basis`.
        tau_axis: Share of the first singular value below which an axis becomes zero.
        method: Name of the method: ``"lda"`` or ``"svd"``.
        options: Keywords of :class:`GradientOptions`.

    Raises:
        DataError: The file at ``path`` was made for other weights, pairs or settings; the message
            names which.
        AssayError: As :func:`split_pairs`, :func:`pair_gradients`, :meth:`PairGradients.basis` and
            :meth:`Basis.save` raise them.

    Example:
        >>> from assay.models import load_model
        >>> from assay.vhack import extract
        >>> from assay.vhack.pairs import generate_pairs
        >>> model = load_model("reference:llama", device="cpu")
        >>> basis = extract(generate_pairs(6), model, n_heldout=2, top_k=3)
        >>> len(basis.origin.pairs), basis.axes["model.layers.0.self_attn.q_proj"].shape
        (4, torch.Size([3, 256]))
    """
    axes: dict[str, Any] = {"top_k": top_k, "tau_axis": tau_axis, "method": method}
    svd = options.get("svd")
    rank = options.get("rank")
    check_axis_settings(top_k, tau_axis)
    check_rank(rank)
    used = select_pairs(pairs, n_heldout=n_heldout, heldout_groups=heldout_groups, method=method)
    if path is not None and Path(path).exists():
        weight = next(iter(target_modules(model).values())).weight
        expected: dict[str, object] = {
            "dtype": dtype_name(weight.dtype),
            "rank": kept_rank(rank, svd),
            "factors": dtype_name(
                svd.dtype if svd is not None else factor_dtype(options.get("factors"), weight)
            ),
            "given": tuple(sorted(pair.key for pair in used.values())),
            "chat_template": find_chat_template(used.values(), model, options.get("tokenizer")),
        }
        return Basis.load(path, model, expect=expected | axes)
    if path is not None:
        check_new_file(path)
    basis = pair_gradients(list(used.values()), model, names=list(used), **options).basis(**axes)
    if path is not None:
        basis.save(path)
    return basis


def _nothing_left(count: int) -> DataError:
    return DataError(
        f"none of {count} pairs has two sides that differ",
        wanted="pairs of a hack and a clean completion",
        do="check the pairs; if the completions do differ, check that the model is the right one",
    )


def _truncated(
    names: Sequence[str],
    rank: int,
    full: SVDCache | None,
    decompose: Callable[..., SVDCache],
    gradients_of: Callable[..., dict[str, torch.Tensor]],
    progress: Progress | None,
) -> tuple[SVDCache, float]:
    """Return all factors cut to ``rank``, and the share of the gradients' energy they hold.

    The share needs the full factors. Where these are to be made, those of one part of the modules
    exist at a time, and each part takes a pass.
    """
    factors: dict[str, Factors] = {}
    energy = energy_held = 0.0
    size = -(-len(names) // (1 if full else _PARTS))
    for start in range(0, len(names), size):
        part = names[start : start + size]
        svd = full or decompose(modules=part, progress=stage_progress(progress, len(factors), 0))
        for rows in gradients_of(svd=svd, modules=part).values():
            energy += float(rows.square().sum())
            energy_held += float(rows[:, :rank].square().sum())
        factors |= {name: svd[name].truncated(rank) for name in part if name in svd}
        dtype = svd.dtype
        # Before those of the next part are made.
        del svd
    cut = SVDCache(factors, rank=kept_rank(rank, full), dtype=dtype)
    return cut, energy_held / energy if energy else 1.0
