"""Check 5: would other pairs have given the same axes?

The groups are divided into two halves at random, many times, and a basis is fitted to each half.
Drawing groups with replacement would put the same pairs on both sides, and noise would look stable;
half samples are the form of the bootstrap that keeps them apart (McCarthy 1969).

*Do the spaces agree?* The mean squared cosine of the principal angles between the two bases is
compared with that between a basis of one half and a clean-clean basis of the other: directions in
which any two gradients differ are stable too. *Do they agree on which way is hack-ward?* The mean
difference of each half, within the SVD basis of that half, is a direction, and the cosine between
the two is tested by swapping the labels of whole groups. That is exact only in SVD bases, whatever
the method, because labels leave these as they are.

Shapes as in :mod:`assay.vhack.directions.checks.geometry`.
"""

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from assay.stats.bootstrap import BootstrapInterval
from assay.vhack.directions.checks.check_report import (
    CLEAN_CLEAN,
    SWAPPED,
    TITLES,
    Check,
    CheckSettings,
)
from assay.vhack.directions.checks.check_rules import (
    decide,
    p_value,
    reached_levels,
    undecided_check,
)
from assay.vhack.directions.checks.folds import Design, draw_swaps
from assay.vhack.directions.checks.geometry import FittedAxes, Geometry

if TYPE_CHECKING:
    pass

_FEWEST_PAIRS = 2  # of a half, for one difference between clean sides

_OVERLAP = "mean squared cosine of the principal angles between bases of two halves of the groups"


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
    orders = (generator.permutation(len(names)) for _ in range(settings.n_splits))
    return [{names[i] for i in order[: len(names) // 2]} for order in orders]


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
    between_MKK = geometry.overlaps(first_frame, second_frame)
    generic = [geometry.overlaps(first_frame, plain[1]), geometry.overlaps(second_frame, plain[0])]
    return {
        "overlap": _mean_square(between_MKK),
        "generic_overlap": torch.stack([_mean_square(g) for g in generic]).mean(dim=0),
        "agreement": _agreement(
            geometry, first_svd_frame, second_svd_frame, signs_BN[:, inside], signs_BN[:, ~inside]
        ),
    }


def _mean_square(overlap_MKJ: Tensor) -> Tensor:
    """Return the mean squared cosine: the squared Frobenius norm over the number of angles."""
    return overlap_MKJ.square().sum(dim=(1, 2)) / min(overlap_MKJ.shape[1:])


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
    lengths_BM = first_BMK.norm(dim=2) * second_BMK.norm(dim=2)
    return (product_BM / torch.where(lengths_BM > 0, lengths_BM, torch.inf)).mean(dim=1)


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
    verdict, reason = decide(faults, *reached_levels("range", measured, spaces, settings))
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
