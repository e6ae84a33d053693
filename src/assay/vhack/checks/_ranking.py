"""Checks 1 and 2: does cin rank held-out hack samples above clean ones, over all of them and within each pair?"""

from collections.abc import Sequence
from math import comb

import numpy as np
import numpy.typing as npt
import torch

from assay.stats import auroc, paired_accuracy, proportion_interval
from assay.vhack.checks._folds import Design
from assay.vhack.checks._judge import SWAPPED, judge, measure, swap_rule
from assay.vhack.checks._types import Check, CheckSettings, FloatArray

BoolArray = npt.NDArray[np.bool_]


def check_pools(design: Design) -> Check:
    """Return check 1, from the two sides of held-out pairs taken as two pools."""
    hack_BN, clean_BN = design.held_out
    settings = design.settings
    return judge(
        name="pools",
        title="cin of hack against clean samples",
        statistic="AUROC of mean cin over modules",
        rule=swap_rule(settings, "the AUROC", 0.5),
        measured=measure(auroc, (hack_BN[0], clean_BN[0]), [design.tested_groups] * 2, settings),
        nulls={SWAPPED: [auroc(hack_N, clean_N) for hack_N, clean_N in zip(hack_BN[1:], clean_BN[1:], strict=True)]},
        above=0.5,
        settings=settings,
        smallest_p=design.smallest_p,
        details={
            "mean_cin_hack": float(hack_BN[0].mean()),
            "mean_cin_clean": float(clean_BN[0].mean()),
            **_alternatives(design),
        },
    )


def _alternatives(design: Design) -> dict[str, float]:
    """Return the AUROC of other scores of the same samples, which the verdict does not depend on."""
    names = ("auroc_two_sided", "auroc_energy_weighted", "auroc_gradient_norm_alone")
    found: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in names}
    for fold in design.folds:
        for side, offset in enumerate((0, design.geometry.n)):
            along_MKS = fold.along[:, :, fold.test + offset]
            lengths_MS = design.geometry.lengths_MS[:, fold.test + offset]
            squares_MS = torch.where(lengths_MS.isinf(), 0.0, lengths_MS).square()
            both = (along_MKS.square().sum(dim=1).sqrt() / lengths_MS).mean(dim=0)
            energy = (along_MKS.clamp_min(0).square().sum(dim=(0, 1)) / squares_MS.sum(dim=0)).sqrt()
            for name, values in zip(names, (both, energy, squares_MS.sum(dim=0)), strict=True):
                found[name][side].extend(values.tolist())
    return {name: auroc(*sides) for name, sides in found.items()}


def check_heldout(design: Design) -> Check:
    """Return check 2: within a held-out pair the hack side scores higher."""
    hack_BN, clean_BN = design.held_out
    hack_N, clean_N, settings = hack_BN[0], clean_BN[0], design.settings
    groups = design.tested_groups
    rows = {name: np.array([group == name for group in groups]) for name in dict.fromkeys(groups)}
    won = sum(float((hack_N - clean_N)[chosen].mean()) > 0 for chosen in rows.values())
    low, high = proportion_interval(won, len(rows), settings.confidence)
    return judge(
        name="heldout",
        title="Held-out pairs of held-out groups",
        statistic="share of pairs whose hack side has the larger cin",
        rule=swap_rule(settings, "the share", 0.5),
        measured=measure(paired_accuracy, (hack_N, clean_N), [groups] * 2, settings),
        nulls={SWAPPED: [paired_accuracy(one, other) for one, other in zip(hack_BN[1:], clean_BN[1:], strict=True)]},
        above=0.5,
        settings=settings,
        smallest_p=design.smallest_p,
        details={
            "pairs": len(hack_N),
            "groups": len(rows),
            "groups_won": won,
            "groups_won_low": low,
            "groups_won_high": high,
            "per_group": {name: paired_accuracy(hack_N[chosen], clean_N[chosen]) for name, chosen in rows.items()},
        },
    )


def check_unpaired(
    hack: FloatArray,
    clean: FloatArray,
    hack_groups: Sequence[str],
    clean_groups: Sequence[str],
    settings: CheckSettings,
) -> Check:
    """Return check 1 for two pools of samples that are not paired.

    Labels are swapped in whole groups that have both kinds, and exchanged among groups that have one kind.

    Args:
        hack: Held-out scores of hack samples.
        clean: Held-out scores of clean samples.
        hack_groups: Group of each hack sample, such as its prompt.
        clean_groups: Group of each clean sample.
        settings: Number of draws, and alpha.
    """
    scores_N = np.concatenate([hack, clean])
    groups = [*hack_groups, *clean_groups]
    is_hack_N = np.arange(len(scores_N)) < len(hack)
    generator = np.random.default_rng([settings.seed, 2])
    relabelled = [_relabelled(is_hack_N, groups, generator) for _ in range(settings.n_flips)]
    swapped = [auroc(scores_N[labels_N], scores_N[~labels_N]) for labels_N in relabelled]
    measured = measure(auroc, (hack, clean), (hack_groups, clean_groups), settings)
    return judge(
        name="pools",
        title="cin of hack against clean samples",
        statistic="AUROC of mean cin over modules, two pools",
        rule=swap_rule(settings, "the AUROC", 0.5),
        measured=measured,
        nulls={SWAPPED: swapped},
        above=0.5,
        settings=settings,
        smallest_p=_smallest_p(set(hack_groups), set(clean_groups)),
        details={"mean_cin_hack": float(hack.mean()), "mean_cin_clean": float(clean.mean())},
    )


def _smallest_p(hack: set[str], clean: set[str]) -> float:
    """Return one over the number of relabellings: groups of both kinds swap, groups of one kind trade places."""
    return 0.5 ** len(hack & clean) / comb(len(hack ^ clean), len(hack - clean))


def _relabelled(is_hack_N: BoolArray, groups: Sequence[str], generator: np.random.Generator) -> BoolArray:
    members: dict[str, list[int]] = {}
    for index, group in enumerate(groups):
        members.setdefault(group, []).append(index)
    pure = {group: bool(is_hack_N[rows[0]]) for group, rows in members.items() if len(set(is_hack_N[rows])) == 1}
    shuffled = dict(zip(pure, generator.permutation(list(pure.values())), strict=True))
    labels_N = is_hack_N.copy()
    for group, rows in members.items():
        if group in shuffled:
            labels_N[rows] = shuffled[group]
        elif generator.random() < 0.5:
            labels_N[rows] = ~is_hack_N[rows]
    return labels_N
