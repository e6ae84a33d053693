"""The five checks in one call, from a model and pairs or from gradients at hand."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from assay.errors import DataError
from assay.models.device import one_thread
from assay.stats.rates import auroc
from assay.vhack.basis.basis import Basis
from assay.vhack.basis.extract import PairGradients, pair_gradients
from assay.vhack.checks.five_checks import (
    SourceCin,
    Stability,
    check_heldout,
    check_pools,
    check_random_null,
    check_source_log,
    check_sources,
    check_stability,
)
from assay.vhack.checks.folds import Design, cin_per_module, cross_fit, design_for_basis
from assay.vhack.checks.judge import CheckReport, CheckSettings, FloatArray, ModuleResult
from assay.vhack.gradients.batches import Progress
from assay.vhack.gradients.svd import SVDCache
from assay.vhack.gradients.targets import MIN_COVERAGE
from assay.vhack.pairs.pairs import Pair

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from assay.models.load import Model


_SPECTRUM = 12  # singular values that are kept
_SPECTRUM_DRAWS = 3


def check(
    pairs: Sequence[Pair],
    model: "Model | PreTrainedModel",
    *,
    basis: Basis | None = None,
    settings: CheckSettings | None = None,
    log: Sequence[SourceCin] | None = None,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    svd: SVDCache | None = None,
    min_coverage: float = MIN_COVERAGE,
    max_tokens: int | None = None,
    checkpointing: bool = False,
    progress: Progress | None = None,
) -> CheckReport:
    """Return five checks whether hack directions are real, on held-out data and each against its nulls.

    With a basis, only pairs of groups that it was not made from are scored, and check 5 uses those it was made from.
    Without one, groups are scored by bases of other groups.

    Args:
        pairs: Pairs to score and, without a basis, to fit bases to.
        model: Model that the basis belongs to.
        basis: Basis to check; None fits bases itself.
        settings: Amount of evidence and strictness of the rules.
        log: Measurements of a training run from `read_source_log`, for check 4.
        tokenizer: Tokenizer of the model; None takes the one that was loaded with a :class:`assay.models.Model`.
        svd: Factors of all weights from :func:`assay.vhack.weight_svd`, perhaps truncated; None computes them.
        min_coverage: Share of the model's weights, embeddings and head aside, that the target matrices must be; a
            given basis says itself what it covers.
        max_tokens: Largest number of tokens per batch; None chooses from the free memory.
        checkpointing: Whether to recompute layers in the backward pass to save memory.
        progress: Function called with the number of steps done and of all, as in :func:`assay.vhack.pair_gradients`.

    Raises:
        DataError: A prompt occurs in two groups, the basis was made from pairs that would be scored or for another
            model, or a pair cannot be used.
        UsageError: Too few groups, or no pair of a group that the basis has not seen.
        AssayError: A gradient cannot be computed; :func:`assay.vhack.pair_gradients` lists the cases.

    Example:
        >>> from assay.models import load_model
        >>> from assay.vhack.checks import CheckSettings, check
        >>> from assay.vhack.pairs import generate_pairs
        >>> model = load_model("reference:llama", device="cpu")
        >>> settings = CheckSettings(method="svd", n_flips=39, n_null=19, n_splits=4)
        >>> report = check(generate_pairs(6), model, settings=settings)
        >>> [made.name for made in report.checks]
        ['pools', 'heldout', 'random_null', 'sources', 'stability']
    """
    _refuse_shared_prompts(pairs)
    asked: dict[str, Any] = {"min_coverage": min_coverage}
    if basis is not None:
        if basis.origin.weights:
            basis.check_model(model)
        # In its coordinates, and of as much of the model as it was made of.
        asked = {"rank": basis.origin.rank, "factors": basis.origin.factors or None, "min_coverage": 0.0}
    gradients = pair_gradients(
        pairs,
        model,
        tokenizer=tokenizer,
        svd=svd,
        **asked,
        max_tokens=max_tokens,
        checkpointing=checkpointing,
        progress=progress,
    )
    return check_gradients(gradients, basis=basis, settings=settings, log=log)


def _refuse_shared_prompts(pairs: Sequence[Pair]) -> None:
    groups: dict[str, tuple[int, str]] = {}
    for index, pair in enumerate(pairs):
        other, group = groups.setdefault(pair.prompt, (index, pair.group))
        if group != pair.group:
            raise DataError(
                f"pairs {other} and {index} have the same prompt, in groups {group} and {pair.group}",
                wanted="every prompt in one group, so that it is held out whole",
                do="give them the same group",
            )


def check_gradients(
    gradients: PairGradients,
    *,
    basis: Basis | None = None,
    settings: CheckSettings | None = None,
    log: Sequence[SourceCin] | None = None,
) -> CheckReport:
    """Return the five checks of gradients that are at hand; :func:`check` describes the arguments and errors."""
    settings = settings or CheckSettings()
    if basis is not None:  # checked by its own method, and with no more axes than it has
        most = max((len(axes_KR) for axes_KR in basis.axes.values()), default=1)
        settings = replace(settings, method=basis.origin.method, k_use=min(settings.k_use, most))
    with one_thread():
        design = cross_fit(gradients, settings) if basis is None else design_for_basis(basis, gradients, settings)
        pools = check_pools(design)
        assert pools.measured is not None
        stability = check_stability(design)
        checks = (
            pools,
            check_heldout(design),
            check_random_null(design, pools.measured),
            check_sources(design) if log is None else check_source_log(log, settings),
            stability.check,
        )
        modules = _modules(design, stability)
    hack_BN, clean_BN = design.held_out
    source = gradients.origin
    return CheckReport(
        checks=checks,
        modules=modules,
        hack=tuple(hack_BN[0].tolist()),
        clean=tuple(clean_BN[0].tolist()),
        groups=tuple(design.tested_groups),
        design=design.text,
        settings=settings,
        origin={
            "model": source.model,
            "weights": source.weights,
            "dtype": source.dtype,
            "pairs": len(gradients),
            "groups": len(set(gradients.groups)),
            "pairs_sha256": source.pairs_digest,
            "basis_pairs_sha256": None if basis is None else basis.origin.pairs_digest,
            "skipped": len(source.skipped),
            "cosines": list(stability.cosines),
            "generic_cosines": list(stability.generic_cosines),
        },
    )


def _modules(design: Design, stability: Stability) -> tuple[ModuleResult, ...]:
    hack_MN, clean_MN = (_cin_per_module(design, offset) for offset in (0, design.geometry.n))
    generator = torch.Generator().manual_seed(0)
    found = []
    for index, name in enumerate(design.geometry.names):
        spectrum, noise = _spectrum(design.geometry.gradients.differences(name), generator)
        found.append(
            ModuleResult(
                name=name,
                auroc=auroc(hack_MN[index], clean_MN[index]),
                cin_hack=float(hack_MN[index].mean()),
                cin_clean=float(clean_MN[index].mean()),
                overlap=stability.overlap[index] if stability.overlap else None,
                spectrum=spectrum,
                noise=noise,
            )
        )
    return tuple(found)


def _cin_per_module(design: Design, offset: int) -> FloatArray:
    parts = []
    for fold in design.folds:
        samples = fold.test + offset
        parts.append(cin_per_module(fold.along[:, :, samples], design.geometry.lengths_MS[:, samples]))
    return torch.cat(parts, dim=1).numpy()


def _spectrum(difference_NR: Tensor, generator: torch.Generator) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return singular values as shares of their root sum of squares, and their noise level.

    The level is the mean over draws of the same matrix with random signs on all entries: their sizes stay, what rows
    have in common goes (Hong, Sheng and Dobriban 2020).
    """
    rows_NR = difference_NR.double()
    total = float(rows_NR.norm()) or 1.0
    noise = []
    for _ in range(_SPECTRUM_DRAWS):
        signs_NR = torch.randint(0, 2, rows_NR.shape, generator=generator, dtype=torch.float64) * 2 - 1
        noise.append(_leading(rows_NR * signs_NR))
    level = torch.stack(noise).mean(dim=0) / total
    return tuple((_leading(rows_NR) / total).tolist()), tuple(level.tolist())


def _leading(rows_NR: Tensor) -> Tensor:
    short_NR = rows_NR if len(rows_NR) <= rows_NR.shape[1] else rows_NR.T
    squares_N: Tensor = torch.linalg.eigvalsh(short_NR @ short_NR.T)
    return squares_N.flip(0)[:_SPECTRUM].clamp_min(0).sqrt()
