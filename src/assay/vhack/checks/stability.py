"""Check 5: would other pairs have given the same axes?

The groups are divided into two halves at random, many times, and a basis is fitted to each half. Drawing groups with
replacement would put the same pairs on both sides, and noise would look stable; half samples are the form of the
bootstrap that keeps them apart (McCarthy 1969).

*Do the spaces agree?* The mean squared cosine of the principal angles between the two bases is compared with that of
random frames, and with that between a basis of one half and a clean-clean basis of the other: directions in which any
two gradients differ are stable too. *Do they agree on which way is hack-ward?* The mean difference of each half, within
the SVD basis of that half, is a direction, and the cosine between the two is tested by swapping the labels of whole
groups. That is exact only in SVD bases, whatever the method, because labels leave these as they are.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import sqrt

import numpy as np
import torch
from torch import Tensor

from assay.vhack.checks.folds import Design, swaps
from assay.vhack.checks.geometry import Frame, Geometry
from assay.vhack.checks.judge import (
    CLEAN_CLEAN,
    HAAR,
    SWAPPED,
    Check,
    CheckSettings,
    CheckVerdict,
    Interval,
    p_value,
    undecided,
)

_FEWEST_PAIRS = 2  # of a half, for one difference between clean sides
_TITLE = "Stability under a group bootstrap"
_STATISTIC = "mean squared cosine of the principal angles between bases of two halves of the groups"


@dataclass(frozen=True, eq=False)
class Stability:
    """Result of check 5 with the series that a report draws.

    Attributes:
        check: Value, nulls and verdict.
        overlap: Mean squared cosine per module; empty where it was not measured.
        cosines: Mean cosine of each principal angle, largest first.
        generic_cosines: Mean cosine of each principal angle between a hack basis and a clean-clean basis.
    """

    check: Check
    overlap: Sequence[float] = ()
    cosines: Sequence[float] = ()
    generic_cosines: Sequence[float] = ()


def check_stability(design: Design) -> Stability:
    """Return check 5 of the pairs that bases are made from."""
    settings = design.settings
    groups = [design.groups[index] for index in design.sources.tolist()]
    names = list(dict.fromkeys(groups))
    smallest_p = 0.5 ** (len(names) - 1)  # swapping every label at once changes nothing
    if smallest_p > settings.alpha:
        reason = f"{len(names)} groups to fit to, which is too few for a p-value below {settings.alpha:g}"
        return Stability(undecided("stability", _TITLE, _STATISTIC, _rule(settings), reason))
    sides = [torch.tensor([group in half for group in groups]) for half in _halves(names, settings)]
    if min(min(int(inside.sum()), int((~inside).sum())) for inside in sides) < _FEWEST_PAIRS:
        reason = f"{len(names)} groups to fit to, of which a half has fewer than {_FEWEST_PAIRS} pairs"
        return Stability(undecided("stability", _TITLE, _STATISTIC, _rule(settings), reason))
    signs_BN = swaps(groups, settings.n_flips, np.random.default_rng([settings.seed, 6]))
    splits = []
    for index, inside in enumerate(sides):
        generator = np.random.default_rng([settings.seed, 8, index])
        splits.append(_split(design, inside, signs_BN, generator))
    return _judged(design.geometry, splits, settings)


def _rule(settings: CheckSettings) -> str:
    return (
        f"Passes if the lower end of the {settings.confidence:.0%} range over splits is above the "
        f"1 − {settings.alpha:g} quantile of random frames and of clean-clean bases, and if with the labels of whole "
        f"groups swapped at random at most a share {settings.alpha:g} reaches the agreement on which way is hack-ward."
    )


def _halves(names: list[str], settings: CheckSettings) -> list[set[str]]:
    generator = np.random.default_rng([settings.seed, 7])
    orders = (generator.permutation(len(names)) for _ in range(settings.n_splits))
    return [{names[i] for i in order[: len(names) // 2]} for order in orders]


@dataclass(frozen=True, eq=False)
class _Split:
    overlap: Tensor
    generic_overlap: Tensor
    cosines: Tensor
    generic_cosines: Tensor
    agreement: Tensor


def _split(design: Design, inside: Tensor, signs_BN: Tensor, generator: np.random.Generator) -> _Split:
    """Return what the sources inside and those outside say of each other."""
    geometry, settings = design.geometry, design.settings
    halves = [design.sources[inside], design.sources[~inside]]
    one, other = (geometry.fit_pairs(half, settings) for half in halves)
    first, second = (geometry.fit_pairs(half, replace(settings, method="svd")) for half in halves)
    plain = [geometry.fit(*geometry.clean_differences(half, generator), settings) for half in halves]
    between_MKK = geometry.overlaps(one, other)
    generic = [geometry.overlaps(one, plain[1]), geometry.overlaps(other, plain[0])]
    return _Split(
        overlap=_mean_square(between_MKK),
        generic_overlap=torch.stack([_mean_square(g) for g in generic]).mean(dim=0),
        cosines=_mean_cosines(between_MKK),
        generic_cosines=_common_mean([_mean_cosines(g) for g in generic]),
        agreement=_agreement(geometry, first, second, signs_BN[:, inside], signs_BN[:, ~inside]),
    )


def _mean_square(overlap_MKJ: Tensor) -> Tensor:
    """Return the mean squared cosine: the squared Frobenius norm over the number of angles."""
    return overlap_MKJ.square().sum(dim=(1, 2)) / min(overlap_MKJ.shape[1:])


def _mean_cosines(overlap_MKJ: Tensor) -> Tensor:
    """Return the cosine of each principal angle, mean over modules."""
    cosines_K: Tensor = torch.linalg.svdvals(overlap_MKJ).mean(dim=0)
    return cosines_K


def _common_mean(rows: list[Tensor]) -> Tensor:
    """Return the mean of rows over the places that all of them have; a small half gives fewer axes than others."""
    shortest = min(map(len, rows))
    return torch.stack([row_K[:shortest] for row_K in rows]).mean(dim=0)


def _agreement(geometry: Geometry, one: Frame, other: Frame, signs_BT: Tensor, others_BT: Tensor) -> Tensor:
    """Return the cosine between the mean differences of two halves, each within its own SVD basis, [B]."""
    between_MKK = geometry.overlaps(one, other)
    first_BMK = torch.einsum("bt,mkt->bmk", signs_BT, one.fitted)
    second_BMK = torch.einsum("bt,mkt->bmk", others_BT, other.fitted)
    product_BM = torch.einsum("bmk,mkj,bmj->bm", first_BMK, between_MKK, second_BMK)
    lengths_BM = first_BMK.norm(dim=2) * second_BMK.norm(dim=2)
    return (product_BM / torch.where(lengths_BM > 0, lengths_BM, torch.inf)).mean(dim=1)


def _judged(geometry: Geometry, splits: list[_Split], settings: CheckSettings) -> Stability:
    overlaps = [float(split.overlap.mean()) for split in splits]
    agreement, *swapped = torch.stack([split.agreement for split in splits]).mean(dim=0).tolist()
    tail = (1 - settings.confidence) / 2
    low, high = (float(q) for q in np.quantile(overlaps, [tail, 1 - tail]))
    spaces = {
        HAAR: tuple(_random_overlaps(geometry, settings)),
        CLEAN_CLEAN: tuple(float(split.generic_overlap.mean()) for split in splits),
    }
    p = p_value(agreement, swapped)
    faults = [f"p = {p:.3g} of the agreement"] if p > settings.alpha else []
    for name, draws in spaces.items():
        level = float(np.quantile(draws, 1 - settings.alpha))
        if low <= level:
            faults.append(f"the range reaches down to {low:.3g}, not above {level:.3g} of {name}")
    verdict: CheckVerdict = "fail" if faults else "pass"
    check = Check(
        name="stability",
        title=_TITLE,
        statistic=_STATISTIC,
        rule=_rule(settings),
        measured=Interval(float(np.mean(overlaps)), low, high),
        nulls={**spaces, f"agreement, {SWAPPED}": tuple(swapped)},
        p_values={f"agreement, {SWAPPED}": p},
        verdict=verdict,
        reason="; ".join(faults) or "every part of the rule holds",
        details={"agreement": agreement, "splits": len(splits)},
    )
    return Stability(
        check,
        overlap=_common_mean([split.overlap for split in splits]).tolist(),
        cosines=_common_mean([split.cosines for split in splits]).tolist(),
        generic_cosines=_common_mean([split.generic_cosines for split in splits]).tolist(),
    )


def _random_overlaps(geometry: Geometry, settings: CheckSettings) -> list[float]:
    """Return draws of the mean over modules of the overlap of two random frames, by its first two moments.

    The mean squared cosine between independent uniform K-frames of R coordinates has mean K/R and variance
    ``2 (R − K)² / (R² (R − 1) (R + 2))`` (moments of the matrix beta law); a mean over modules is close to normal.
    """
    generator = np.random.default_rng([settings.seed, 9])
    ranks = [geometry.gradients.hack[name].shape[1] for name in geometry.names]
    sizes = [min(settings.axes, r) for r in ranks]
    mean = float(np.mean([k / r for k, r in zip(sizes, ranks, strict=True)]))
    variances = [2 * (r - k) ** 2 / (r**2 * (r - 1) * (r + 2)) for k, r in zip(sizes, ranks, strict=True) if r > 1]
    draws: list[float] = generator.normal(mean, sqrt(sum(variances)) / len(ranks), settings.n_null).tolist()
    return draws
