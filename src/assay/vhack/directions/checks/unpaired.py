"""Check 1 of two pools of samples that are not paired.

Shapes: N samples of both pools, hack first.
"""

from collections.abc import Mapping, Sequence
from math import comb
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from assay.stats.ranks import auroc
from assay.vhack.directions.checks.check_report import (
    SWAPPED,
    Check,
    CheckSettings,
    FloatArray,
)
from assay.vhack.directions.checks.check_rules import bootstrap, judge

if TYPE_CHECKING:
    pass

BoolArray = npt.NDArray[np.bool_]


def check_unpaired(
    hack: FloatArray,
    clean: FloatArray,
    hack_groups: Sequence[str],
    clean_groups: Sequence[str],
    settings: CheckSettings,
    *,
    nulls: Mapping[str, Sequence[float]] | None = None,
    details: Mapping[str, float] | None = None,
) -> Check:
    """Return check 1 for two pools of unpaired samples, each with the group of its samples.

    Labels are swapped in whole groups that have both kinds, and exchanged among groups that have
    one kind. Further nulls are draws of the AUROC by name.
    """
    scores_N = np.concatenate([hack, clean])
    groups = [*hack_groups, *clean_groups]
    is_hack_N = np.arange(len(scores_N)) < len(hack)
    generator = np.random.default_rng([settings.seed, 2])
    relabelled = [_relabelled(is_hack_N, groups, generator) for _ in range(settings.n_flips)]
    swapped = [auroc(scores_N[labels_N], scores_N[~labels_N]) for labels_N in relabelled]
    # One over the number of relabellings: groups of both kinds swap, groups of one kind trade
    # places.
    with_hack = set(hack_groups)
    with_clean = set(clean_groups)
    trades = 1 / comb(len(with_hack ^ with_clean), len(with_hack - with_clean))
    smallest_p = 0.5 ** len(with_hack & with_clean) * trades
    means = {"mean_cin_hack": float(hack.mean()), "mean_cin_clean": float(clean.mean())}
    return judge(
        "pools",
        "AUROC of mean cin over modules, two pools",
        bootstrap(auroc, (hack, clean), (hack_groups, clean_groups), settings),
        {SWAPPED: swapped, **(nulls or {})},
        settings,
        smallest_p,
        details={**means, **(details or {})},
    )


def _relabelled(
    is_hack_N: BoolArray, groups: Sequence[str], generator: np.random.Generator
) -> BoolArray:
    members: dict[str, list[int]] = {}
    for index, group in enumerate(groups):
        members.setdefault(group, []).append(index)
    pure = {
        group: bool(is_hack_N[rows[0]])
        for group, rows in members.items()
        if len(set(is_hack_N[rows])) == 1
    }
    shuffled = dict(zip(pure, generator.permutation(list(pure.values())), strict=True))
    labels_N = is_hack_N.copy()
    for group, rows in members.items():
        if group in shuffled:
            labels_N[rows] = shuffled[group]
        elif generator.random() < 0.5:
            labels_N[rows] = ~is_hack_N[rows]
    return labels_N
