"""The five checks, each a value, its interval, its nulls and a verdict.

Checks 1 to 3: does cin rank held-out hack samples above clean ones, and do other bases of the same
size do as well? Check 1 ranks over all samples and check 2 within each pair. Check 3 has three
nulls, from the weakest to the strongest:

- *Haar*: axes uniform among all orthonormal ones;
- *clean-clean*: the extraction itself, by the same method, on differences between clean sides of
  different pairs;
- *labels swapped*: the extraction itself, on the same pairs with the labels of whole groups
  swapped.

Check 4: is the gradient of a batch that cheats further along the axes than that of one that does
not? cin here is that of a whole batch: the components and the length of the *summed* gradient of
one side of a held-out group, as if they came from a teacher that cheats and a student that does
not.

Check 5: would other pairs have given the same axes? The groups are divided into two halves at
random, many times, and a basis is fitted to each half. Drawing groups with replacement would put
the same pairs on both sides, and noise would look stable; half samples are the form of the
bootstrap that keeps them apart (McCarthy 1969).

*Do the spaces agree?* The mean squared cosine of the principal angles between the two bases is
compared with that between a basis of one half and a clean-clean basis of the other: directions in
which any two gradients differ are stable too. *Do they agree on which way is hack-ward?* The mean
difference of each half, within the SVD basis of that half, is a direction, and the cosine between
the two is tested by swapping the labels of whole groups. That is exact only in SVD bases, whatever
the method, because labels leave these as they are.

Shapes as in :mod:`assay.vhack.directions.checks.geometry`; N' scored pairs.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any, Unpack

import numpy as np
import torch
from torch import Tensor

from assay.errors import UsageError
from assay.models.device import one_thread
from assay.models.model import AnyModel
from assay.stats.bootstrap import BootstrapInterval
from assay.stats.ranks import auroc
from assay.vhack.detectors.comparison import Comparison, compare_detectors
from assay.vhack.detectors.detector import Detector
from assay.vhack.detectors.evidence import LabelledEvidence, SampleEvidence, collect_evidence
from assay.vhack.directions.basis.axes import draw_frames
from assay.vhack.directions.basis.basis import Basis
from assay.vhack.directions.basis.extract import GradientOptions, PairGradients, pair_gradients
from assay.vhack.directions.checks.check_report import (
    CLEAN_CLEAN,
    HAAR,
    SWAPPED,
    TITLES,
    Check,
    CheckReport,
    CheckSettings,
    bootstrap,
    decide,
    judge,
    p_value,
    undecided_check,
)
from assay.vhack.directions.checks.folds import Design, cross_fit, design_for_basis, draw_swaps
from assay.vhack.directions.checks.geometry import FittedAxes, Geometry, cin_per_module, divisors
from assay.vhack.directions.gradients.batches import find_chat_template
from assay.vhack.pairs.pairs import Pair
from assay.vhack.pairs.selection import check_prompts

_DRAWS = 25  # random frames of one module that are held at a time
_FEWEST_PAIRS = 2  # of a half, for one difference between clean sides
_OVERLAP = "mean squared cosine of the principal angles between bases of two halves of the groups"


def check(
    pairs: Sequence[Pair],
    model: AnyModel,
    *,
    basis: Basis | None = None,
    settings: CheckSettings | None = None,
    **options: Unpack[GradientOptions],
) -> CheckReport:
    """Return five checks of hack directions, on held-out data and each against its nulls.

    With a basis, only pairs of groups that it was not made from are scored, and check 5 uses those
    it was made from. Without one, groups are scored by bases of other groups.

    Args:
        pairs: Pairs to score and, without a basis, to fit bases to.
        model: Model that the basis belongs to.
        basis: Basis to check; None fits bases itself.
        settings: Amount of evidence and strictness of the rules.
        options: Keywords of :class:`assay.vhack.directions.basis.extract.GradientOptions`; a given
            basis says itself rank and factors, and what it covers.

    Raises:
        DataError: A prompt occurs in two groups, the basis was made from pairs that would be scored
            or for another model, or a pair cannot be used.
        UsageError: Too few groups, or no pair of a group that the basis has not seen.
        AssayError: A gradient cannot be computed; :func:`assay.vhack.pair_gradients` lists the
            cases.

    Example:
        >>> from assay.models import load_model
        >>> from assay.vhack.directions.checks import CheckSettings, check
        >>> from assay.vhack.pairs import generate_pairs
        >>> model = load_model("reference:llama", device="cpu")
        >>> settings = CheckSettings(method="svd", n_flips=39, n_null=19, n_splits=4)
        >>> report = check(generate_pairs(6), model, settings=settings)
        >>> [made.name for made in report.checks]
        ['pools', 'heldout', 'random_null', 'sources', 'stability']
    """
    check_prompts(pairs)
    if basis is not None:
        if basis.origin.weights:
            basis.check_model(model)
        basis.check_template(find_chat_template(pairs, model, options.get("tokenizer")))
        # In its coordinates, and of as much of the model as it was made of.
        options |= {
            "rank": basis.origin.rank,
            "factors": basis.origin.factors or None,
            "min_coverage": 0.0,
        }
    gradients = pair_gradients(pairs, model, **options)
    report = check_gradients(gradients, basis=basis, settings=settings)
    sides = {pair.key: pair.samples() for pair in pairs}
    evidence = collect_evidence(
        [sides[key][side] for side in (0, 1) for key in gradients.keys],
        model,
        gradients={name: gradients.both_sides(name) for name in gradients.hack},
        tokenizer=options.get("tokenizer"),
    )
    return replace(report, detectors=compare_sides(evidence, gradients.groups, gradients.groups))


def compare_sides(
    evidence: SampleEvidence,
    hack_groups: Sequence[str],
    clean_groups: Sequence[str],
    detectors: Sequence[Detector] | None = None,
) -> Comparison | None:
    """Return detectors side by side on the samples of both sides, hack first, with their groups.

    None stands for all detectors; with too few groups there is no comparison.
    """
    n = len(hack_groups)
    sides = (evidence.take(range(n)), evidence.take(range(n, n + len(clean_groups))))
    with suppress(UsageError), one_thread():
        return compare_detectors(LabelledEvidence(*sides, hack_groups, clean_groups), detectors)
    return None


def check_gradients(
    gradients: PairGradients, *, basis: Basis | None = None, settings: CheckSettings | None = None
) -> CheckReport:
    """Return the five checks of gradients that were computed before.

    :func:`check` describes the arguments and errors.
    """
    settings = settings or CheckSettings()
    # Checked by its own method, and with no more axes than it has.
    if basis is not None:
        most = max((len(axes_KR) for axes_KR in basis.axes.values()), default=1)
        settings = replace(settings, method=basis.origin.method, k_use=min(settings.k_use, most))
    with one_thread():
        design = (
            cross_fit(gradients, settings)
            if basis is None
            else design_for_basis(basis, gradients, settings)
        )
        pools = check_pools(design)
        assert pools.measured is not None
        checks = (
            pools,
            check_heldout(design),
            check_random_null(design, pools.measured),
            check_sources(design),
            check_stability(design),
        )
    hack_BN, clean_BN = design.held_out
    source = gradients.origin
    origin = {
        **{name: getattr(source, name) for name in ("model", "weights", "dtype")},
        "pairs": len(gradients),
        "groups": len(set(gradients.groups)),
        "pairs_sha256": source.pairs_digest,
        "basis_pairs_sha256": None if basis is None else basis.origin.pairs_digest,
        "skipped": len(source.skipped),
    }
    hack, clean = (tuple(side_BN[0].tolist()) for side_BN in (hack_BN, clean_BN))
    return CheckReport(
        checks, hack, clean, tuple(design.tested_groups), design.text, settings, origin
    )


def check_pools(design: Design) -> Check:
    """Return check 1, from the two sides of held-out pairs taken as two pools."""
    hack_BN, clean_BN = design.held_out
    details = {
        "mean_cin_hack": float(hack_BN[0].mean()),
        "mean_cin_clean": float(clean_BN[0].mean()),
    }
    return _judge_held_out(design, "pools", "AUROC of mean cin over modules", auroc, details)


def _judge_held_out(
    design: Design,
    name: str,
    statistic: str,
    score: Callable[..., float],
    details: Mapping[str, Any],
) -> Check:
    """Return a check of the cin of both sides of held-out pairs, by swaps of whole groups."""
    hack_BN, clean_BN = design.held_out
    measured = bootstrap(
        score, (hack_BN[0], clean_BN[0]), [design.tested_groups] * 2, design.settings
    )
    return judge(
        name,
        statistic,
        measured,
        {SWAPPED: list(map(score, hack_BN[1:], clean_BN[1:]))},
        design.settings,
        design.smallest_p,
        details=details,
    )


def check_heldout(design: Design) -> Check:
    """Return check 2: within a held-out pair the hack side scores higher."""
    return _judge_held_out(
        design,
        "heldout",
        "share of pairs whose hack side has the larger cin",
        lambda hack, clean: auroc(hack - clean, [0.0]),
        {"pairs": len(design.tested)},
    )


def check_sources(design: Design) -> Check:
    """Return check 4 with the sides of every held-out group as two batches."""
    geometry = design.geometry
    settings = design.settings
    signs_BN = draw_swaps(
        design.groups, settings.n_flips, np.random.default_rng([settings.seed, 4])
    )
    hack = {}
    clean = {}
    for fold in design.folds:
        for group in dict.fromkeys(design.groups[index] for index in fold.test.tolist()):
            inside = [design.groups[index] == group for index in fold.test.tolist()]
            pairs = fold.test[torch.tensor(inside)]
            weights_S2 = torch.zeros(2 * geometry.n, 2, dtype=torch.float64)
            weights_S2[pairs, 0] = 1.0
            weights_S2[pairs + geometry.n, 1] = 1.0
            along_MK2, lengths_M2 = geometry.batch(fold.along, weights_S2)
            first_B, second_B = fold.cin(along_MK2, lengths_M2, signs_BN).unbind(dim=1)
            swapped_B = signs_BN[:, pairs[0]] < 0
            hack[group] = torch.where(swapped_B, second_B, first_B).numpy()
            clean[group] = torch.where(swapped_B, first_B, second_B).numpy()
    hack_BG, clean_BG = (np.column_stack(list(side.values())) for side in (hack, clean))
    differences_BG = hack_BG - clean_BG
    return judge(
        "sources",
        "cin of the summed hack gradient of a group minus that of its clean gradient, mean over "
        "groups",
        bootstrap(np.mean, [differences_BG[0]], [list(hack)], settings),
        {SWAPPED: differences_BG[1:].mean(axis=1).tolist()},
        settings,
        design.smallest_p,
        details={
            "mean_cin_hack": float(hack_BG[0].mean()),
            "mean_cin_clean": float(clean_BG[0].mean()),
        },
    )


def check_random_null(design: Design, measured: BootstrapInterval) -> Check:
    """Return check 3 of the AUROC that check 1 measured."""
    settings = design.settings
    generator = torch.Generator().manual_seed(settings.seed)
    hack_BN, clean_BN = design.held_out
    swapped = slice(1, 1 + settings.n_null)
    geometry = design.geometry
    gradients = map(geometry.gradients.both_sides, geometry.names)  # all folds share the frames
    haar_BS = haar_scores(
        gradients, geometry.lengths_MS, settings.k_use, settings.n_null, generator
    )
    return judge(
        "random_null",
        "AUROC of mean cin over modules",
        measured,
        {
            HAAR: _aurocs(design, haar_BS),
            CLEAN_CLEAN: _aurocs(design, _clean_clean(design)),
            SWAPPED: list(map(auroc, hack_BN[swapped], clean_BN[swapped])),
        },
        settings,
        design.smallest_p,
    )


def _aurocs(design: Design, scores_BS: Tensor) -> list[float]:
    tested = design.tested
    n = design.geometry.n
    return list(map(auroc, scores_BS[:, tested].numpy(), scores_BS[:, tested + n].numpy()))


def haar_scores(
    gradients: Iterable[Tensor], lengths_MS: Tensor, k: int, count: int, generator: torch.Generator
) -> Tensor:
    """Return mean cin over modules of samples under ``count`` random frames of k axes, [B, S].

    Gradients are [S, R] per module and lengths infinite instead of 0; a module with fewer
    coordinates has fewer axes.
    """
    total_BS = torch.zeros(count, lengths_MS.shape[1], dtype=torch.float64)
    for lengths_S, samples_SR in zip(lengths_MS, gradients, strict=True):
        r = samples_SR.shape[1]
        for draws in torch.split(torch.arange(count), _DRAWS):
            frames_BRK = draw_frames(
                len(draws), r, min(k, r), generator=generator, dtype=torch.float32
            )
            along_BSK = samples_SR.float() @ frames_BRK
            total_BS[draws] += along_BSK.clamp_min(0).norm(dim=2).double() / lengths_S
    return total_BS / len(lengths_MS)


def _clean_clean(design: Design) -> Tensor:
    """Return mean cin of every sample under bases of differences between clean sides, [B, S]."""
    geometry = design.geometry
    settings = design.settings
    generator = np.random.default_rng([settings.seed, 3])
    scores_BS = torch.zeros(settings.n_null, 2 * geometry.n, dtype=torch.float64)
    for fold in design.folds:
        # A basis from a file may come without its pairs. A null that has seen the samples is harder
        # to beat.
        rows = fold.train if len(fold.train) > 1 else torch.cat([fold.train, fold.test])
        samples = torch.cat([fold.test, fold.test + geometry.n])
        for draw in range(settings.n_null):
            frame = geometry.fit(*geometry.clean_differences(rows, generator), settings)
            cin_MS = cin_per_module(frame.along[:, :, samples], geometry.lengths_MS[:, samples])
            scores_BS[draw, samples] = cin_MS.mean(dim=0)
    return scores_BS


def check_stability(design: Design) -> Check:
    """Return check 5 of the pairs that bases are made from."""
    settings = design.settings
    groups = [design.groups[index] for index in design.sources.tolist()]
    names = list(dict.fromkeys(groups))
    sides = [torch.tensor([group in half for group in groups]) for half in _halves(names, settings)]
    reason = ""
    # Swapping every label at once changes nothing.
    if 0.5 ** (len(names) - 1) > settings.alpha:
        reason = f"which is too few for a p-value below {settings.alpha:g}"
    elif min(min(int(inside.sum()), int((~inside).sum())) for inside in sides) < _FEWEST_PAIRS:
        reason = f"of which a half has fewer than {_FEWEST_PAIRS} pairs"
    if reason:
        reason = f"{len(names)} groups to fit to, {reason}"
        return undecided_check("stability", _OVERLAP, _rule(settings), reason)
    signs_BN = draw_swaps(groups, settings.n_flips, np.random.default_rng([settings.seed, 6]))
    splits = [
        _split(design, inside, signs_BN, np.random.default_rng([settings.seed, 8, index]))
        for index, inside in enumerate(sides)
    ]
    return _judge_stability(splits, settings)


def _rule(settings: CheckSettings) -> str:
    return (
        f"Passes if the lower end of the {settings.confidence:.0%} range over splits is above the "
        f"1 − {settings.alpha:g} quantile of clean-clean bases, and if with the labels of whole "
        f"groups swapped at random at most a share {settings.alpha:g} reaches the agreement on "
        f"which way is hack-ward."
    )


def _halves(names: list[str], settings: CheckSettings) -> list[set[str]]:
    generator = np.random.default_rng([settings.seed, 7])
    return [
        {names[i] for i in generator.permutation(len(names))[: len(names) // 2]}
        for _ in range(settings.n_splits)
    ]


def _split(
    design: Design, inside: Tensor, signs_BN: Tensor, generator: np.random.Generator
) -> dict[str, Tensor]:
    """Return what the sources inside and those outside say of each other."""
    geometry = design.geometry
    settings = design.settings
    halves = [design.sources[inside], design.sources[~inside]]
    first_frame, second_frame = (geometry.fit_pairs(half, settings) for half in halves)
    first_svd_frame, second_svd_frame = (
        geometry.fit_pairs(half, replace(settings, method="svd")) for half in halves
    )
    plain = [
        geometry.fit(*geometry.clean_differences(half, generator), settings) for half in halves
    ]
    generic = [
        _mean_square(geometry, first_frame, plain[1]),
        _mean_square(geometry, second_frame, plain[0]),
    ]
    return {
        "overlap": _mean_square(geometry, first_frame, second_frame),
        "generic_overlap": torch.stack(generic).mean(dim=0),
        "agreement": _agreement(
            geometry, first_svd_frame, second_svd_frame, signs_BN[:, inside], signs_BN[:, ~inside]
        ),
    }


def _mean_square(geometry: Geometry, frame: FittedAxes, other_frame: FittedAxes) -> Tensor:
    """Return the mean squared cosine, [M]: the squared Frobenius norm over the number of angles."""
    overlap_MKJ = geometry.overlaps(frame, other_frame)
    angles_M = geometry.ranks_M.clamp_max(min(overlap_MKJ.shape[1:]))
    return overlap_MKJ.square().sum(dim=(1, 2)) / angles_M


def _agreement(
    geometry: Geometry,
    frame: FittedAxes,
    other_frame: FittedAxes,
    signs_BT: Tensor,
    others_BT: Tensor,
) -> Tensor:
    """Return the cosine of the mean differences of two halves, each in its SVD basis, [B]."""
    between_MKK = geometry.overlaps(frame, other_frame)
    first_BMK = torch.einsum("bt,mkt->bmk", signs_BT, frame.fitted)
    second_BMK = torch.einsum("bt,mkt->bmk", others_BT, other_frame.fitted)
    product_BM = torch.einsum("bmk,mkj,bmj->bm", first_BMK, between_MKK, second_BMK)
    return (product_BM / divisors(first_BMK.norm(dim=2) * second_BMK.norm(dim=2))).mean(dim=1)


def _judge_stability(splits: list[dict[str, Tensor]], settings: CheckSettings) -> Check:
    overlaps = [float(split["overlap"].mean()) for split in splits]
    agreement, *swapped = torch.stack([split["agreement"] for split in splits]).mean(dim=0).tolist()
    tail = (1 - settings.confidence) / 2
    low, high = (float(q) for q in np.quantile(overlaps, [tail, 1 - tail]))
    spaces = {CLEAN_CLEAN: tuple(float(split["generic_overlap"].mean()) for split in splits)}
    p = p_value(agreement, swapped)
    null = f"agreement, {SWAPPED}"
    faults = [f"p = {p:.3g} of the agreement"] if p > settings.alpha else []
    measured = BootstrapInterval(float(np.mean(overlaps)), low, high)
    verdict, reason = decide(faults, "range", measured, spaces, settings)
    return Check(
        "stability",
        TITLES["stability"],
        _OVERLAP,
        _rule(settings),
        measured,
        {**spaces, null: tuple(swapped)},
        {null: p},
        verdict,
        reason,
        {"agreement": agreement, "splits": len(splits)},
    )
