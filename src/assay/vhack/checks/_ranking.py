"""Checks 1 and 2: does cin rank held-out hack samples above clean ones, over all of them and within each pair?"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import comb

import numpy as np
import numpy.typing as npt
import torch

from assay.stats import auroc, paired_accuracy, proportion_interval
from assay.vhack.checks._folds import Design, swaps
from assay.vhack.checks._judge import SWAPPED, FloatArray, judge, measure
from assay.vhack.checks._types import Check, CheckSettings

BoolArray = npt.NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class HeldOut:
    """Scores of the N' held-out pairs: as labelled in row 0, with swapped labels in the B others.

    Attributes:
        hack: Scores of the hack sides, [1 + B, N'].
        clean: Scores of the clean sides, [1 + B, N'].
        groups: Group of each pair.
    """

    hack: FloatArray
    clean: FloatArray
    groups: list[str]

    @property
    def sides(self) -> tuple[FloatArray, FloatArray]:
        """Scores of hack and clean sides as labelled, [N'] each."""
        return self.hack[0], self.clean[0]


def score(design: Design, settings: CheckSettings) -> HeldOut:
    """Return the scores of every held-out pair, as labelled and with swapped labels."""
    signs_BN = swaps(design.groups, settings.n_flips, np.random.default_rng([settings.seed, 1]))
    hack_BN, clean_BN = design.scores(signs_BN)
    return HeldOut(hack_BN.numpy(), clean_BN.numpy(), design.tested_groups)


def check_pools(design: Design, scored: HeldOut, settings: CheckSettings) -> Check:
    """Return check 1, from the two sides of held-out pairs taken as two pools."""
    measured = measure(auroc, scored.sides, [scored.groups] * 2, settings)
    swapped = [auroc(h, c) for h, c in zip(scored.hack[1:], scored.clean[1:], strict=True)]
    return judge(
        name="pools",
        title="cin of hack against clean samples",
        statistic="AUROC of mean cin over modules",
        rule=_RULE.format(alpha=settings.alpha, confidence=settings.confidence, what="the AUROC", above=0.5),
        measured=measured,
        nulls={SWAPPED: swapped},
        above=0.5,
        settings=settings,
        smallest_p=design.smallest_p,
        details={
            "mean_cin_hack": float(scored.sides[0].mean()),
            "mean_cin_clean": float(scored.sides[1].mean()),
            **_alternatives(design),
        },
    )


_RULE = (
    "Passes if, with the labels of whole groups swapped at random, at most a share {alpha:g} reaches {what}, and the "
    "lower end of its {confidence:.0%} group-bootstrap interval is above {above:g} and above the null's "
    "1 − {alpha:g} quantile."
)


def _alternatives(design: Design) -> dict[str, float]:
    """Return the AUROC of other scores of the same samples, which the verdict does not depend on."""
    geometry = design.geometry
    found: dict[str, tuple[list[float], list[float]]] = {"two_sided": ([], []), "energy": ([], []), "length": ([], [])}
    for fold in design.folds:
        for side, offset in enumerate((0, geometry.n)):
            along_MKS = fold.along[:, :, fold.test + offset]
            lengths_MS = geometry.lengths_MS[:, fold.test + offset]
            squares_MS = torch.where(lengths_MS.isinf(), 0.0, lengths_MS).square()
            both = (along_MKS.square().sum(dim=1).sqrt() / lengths_MS).mean(dim=0)
            energy = (along_MKS.clamp_min(0).square().sum(dim=(0, 1)) / squares_MS.sum(dim=0)).sqrt()
            for name, values in (("two_sided", both), ("energy", energy), ("length", squares_MS.sum(dim=0))):
                found[name][side].extend(values.tolist())
    names = {"two_sided": "auroc_two_sided", "energy": "auroc_energy_weighted", "length": "auroc_gradient_norm_alone"}
    return {names[name]: auroc(*sides) for name, sides in found.items()}


def check_heldout(design: Design, scored: HeldOut, settings: CheckSettings) -> Check:
    """Return check 2: within a held-out pair the hack side scores higher."""
    hack_N, clean_N = scored.sides
    measured = measure(paired_accuracy, (hack_N, clean_N), [scored.groups] * 2, settings)
    swapped = [paired_accuracy(h, c) for h, c in zip(scored.hack[1:], scored.clean[1:], strict=True)]
    names = list(dict.fromkeys(scored.groups))
    member = np.array([names.index(group) for group in scored.groups])
    won = sum(float((hack_N - clean_N)[member == g].mean()) > 0 for g in range(len(names)))
    low, high = proportion_interval(won, len(names), settings.confidence)
    return judge(
        name="heldout",
        title="Held-out pairs of held-out groups",
        statistic="share of pairs whose hack side has the larger cin",
        rule=_RULE.format(alpha=settings.alpha, confidence=settings.confidence, what="the share", above=0.5),
        measured=measured,
        nulls={SWAPPED: swapped},
        above=0.5,
        settings=settings,
        smallest_p=design.smallest_p,
        details={
            "pairs": len(hack_N),
            "groups": len(names),
            "groups_won": won,
            "groups_won_low": low,
            "groups_won_high": high,
            "per_group": {
                name: paired_accuracy(hack_N[member == g], clean_N[member == g]) for g, name in enumerate(names)
            },
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
        rule=_RULE.format(alpha=settings.alpha, confidence=settings.confidence, what="the AUROC", above=0.5),
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
