"""Checks 1 to 3: does cin rank held-out hack samples above clean ones, and do other bases of the same size do as well?

Check 1 ranks over all samples and check 2 within each pair. Check 3 has four nulls, from the weakest to the strongest:

- *Haar*: axes uniform among all orthonormal ones;
- *covariance-matched*: random sums of clean gradients, so axes prefer the directions in which gradients vary anyway;
- *clean-clean*: the extraction itself, by the same method, on differences between clean sides of different pairs;
- *labels swapped*: the extraction itself, on the same pairs with the labels of whole groups swapped.

Shapes as in :mod:`assay.vhack.checks.geometry`; N' scored pairs.
"""

from collections.abc import Iterable, Mapping, Sequence
from math import comb

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from assay.stats.rates import auroc, paired_accuracy, proportion_interval
from assay.vhack.checks.folds import Design, Fold
from assay.vhack.checks.geometry import shares
from assay.vhack.checks.judge import (
    CLEAN_CLEAN,
    HAAR,
    SWAPPED,
    Check,
    CheckSettings,
    FloatArray,
    Interval,
    judge,
    measure,
    swap_rule,
)

BoolArray = npt.NDArray[np.bool_]

_DRAWS = 25  # random frames of one module that are held at a time


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
        nulls={SWAPPED: list(map(auroc, hack_BN[1:], clean_BN[1:]))},
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
        nulls={SWAPPED: list(map(paired_accuracy, hack_BN[1:], clean_BN[1:]))},
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


def check_random_null(design: Design, measured: Interval) -> Check:
    """Return check 3 of the AUROC that check 1 measured."""
    settings = design.settings
    generator = torch.Generator().manual_seed(settings.seed)
    hack_BN, clean_BN = design.held_out
    swapped = slice(1, 1 + settings.n_null)
    nulls = {
        HAAR: _aurocs(design, _haar(design, generator)),
        "covariance-matched": _aurocs(design, _matched(design, generator)),
        CLEAN_CLEAN: _aurocs(design, _clean_clean(design)),
        SWAPPED: list(map(auroc, hack_BN[swapped], clean_BN[swapped])),
    }
    return judge(
        name="random_null",
        title="Against random bases",
        statistic="AUROC of mean cin over modules",
        rule=(
            f"Passes if of each null at most a share {settings.alpha:g} reaches the AUROC, and the lower end of its "
            f"{settings.confidence:.0%} group-bootstrap interval is above the 1 − {settings.alpha:g} quantile of "
            "every null."
        ),
        measured=measured,
        nulls=nulls,
        above=0.5,
        settings=settings,
        smallest_p=design.smallest_p,
        details={
            "z_scores": {
                name: (measured.value - float(np.mean(draws))) / float(np.std(draws) or 1.0)
                for name, draws in nulls.items()
            }
        },
    )


def _aurocs(design: Design, scores_BS: Tensor) -> list[float]:
    tested, n = design.tested, design.geometry.n
    return list(map(auroc, scores_BS[:, tested].numpy(), scores_BS[:, tested + n].numpy()))


def _haar(design: Design, generator: torch.Generator) -> Tensor:
    """Return mean cin of every sample under random frames, [B, S]; all folds share the frames."""
    geometry, settings = design.geometry, design.settings
    gradients = map(geometry.samples, geometry.names)
    return haar_scores(gradients, geometry.lengths_MS, settings.axes, settings.n_null, generator)


def haar_scores(
    gradients: Iterable[Tensor], lengths_MS: Tensor, k: int, count: int, generator: torch.Generator
) -> Tensor:
    """Return mean cin over modules of samples under random frames, [B, S].

    Args:
        gradients: Gradients of the samples, [S, R] per module.
        lengths_MS: Their lengths, infinite instead of 0.
        k: Number of axes; a module that has fewer coordinates gets no more than these.
        count: Number of frames, B.
        generator: Source of the frames.
    """
    total_BS = torch.zeros(count, lengths_MS.shape[1], dtype=torch.float64)
    for lengths_S, samples_SR in zip(lengths_MS, gradients, strict=True):
        r = samples_SR.shape[1]
        for draws in torch.split(torch.arange(count), _DRAWS):
            frames_BRK = torch.linalg.qr(torch.randn(len(draws), r, min(k, r), generator=generator))[0]
            along_BSK = samples_SR.float() @ frames_BRK
            ahead_BS = along_BSK.clamp_min(0).norm(dim=2).double()
            total_BS[draws] += ahead_BS / lengths_S
    return total_BS / len(lengths_MS)


def _matched(design: Design, generator: torch.Generator) -> Tensor:
    """Return mean cin of every sample under bases of random sums of clean training gradients, [B, S]."""
    geometry, settings = design.geometry, design.settings
    draws_BKN = torch.randn(settings.n_null, settings.axes, geometry.n, generator=generator, dtype=torch.float64)
    scores_BS = torch.zeros(settings.n_null, 2 * geometry.n, dtype=torch.float64)
    for fold in design.folds:
        rows = _clean_rows(fold)
        clean, samples = rows + geometry.n, torch.cat([fold.test, fold.test + geometry.n])
        weights_BKT = draws_BKN[:, :, rows]
        weights_BKT = weights_BKT - weights_BKT.mean(dim=2, keepdim=True)
        total_BS = torch.zeros(settings.n_null, len(samples), dtype=torch.float64)
        for gram_SS, lengths_S in zip(geometry.gram_MSS, geometry.lengths_MS, strict=True):
            gram_BKK = weights_BKT @ gram_SS[clean][:, clean] @ weights_BKT.transpose(1, 2)
            along_BKS = _inverse_root(gram_BKK) @ weights_BKT @ gram_SS[clean][:, samples]
            total_BS += along_BKS.clamp_min(0).norm(dim=1) / lengths_S[samples]
        scores_BS[:, samples] = total_BS / len(geometry.names)
    return scores_BS


def _inverse_root(gram_BKK: Tensor) -> Tensor:
    values_BK, vectors_BKK = torch.linalg.eigh(gram_BKK)
    kept_BK = values_BK > values_BK[:, -1:] * 1e-10
    scale_BK = torch.where(kept_BK, values_BK, torch.inf).rsqrt()
    root_BKK: Tensor = (vectors_BKK * scale_BK[:, None]) @ vectors_BKK.transpose(1, 2)
    return root_BKK


def _clean_clean(design: Design) -> Tensor:
    """Return mean cin of every sample under bases of differences between clean sides, [B, S]."""
    geometry, settings = design.geometry, design.settings
    generator = np.random.default_rng([settings.seed, 3])
    scores_BS = torch.zeros(settings.n_null, 2 * geometry.n, dtype=torch.float64)
    for fold in design.folds:
        rows = _clean_rows(fold)
        samples = torch.cat([fold.test, fold.test + geometry.n])
        for draw in range(settings.n_null):
            frame = geometry.fit(*geometry.clean_differences(rows, generator), settings)
            along_MKS = frame.along[:, :, samples]
            scores_BS[draw, samples] = shares(along_MKS, geometry.lengths_MS[:, samples]).mean(dim=0)
    return scores_BS


def _clean_rows(fold: Fold) -> Tensor:
    """Return the pairs whose clean sides make a null basis: those of training, or with too few of these all.

    A basis from a file may come without its pairs. A null that has seen the samples is harder to beat.
    """
    return fold.train if len(fold.train) > 1 else torch.cat([fold.train, fold.test])


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
    """Return check 1 for two pools of samples that are not paired.

    Labels are swapped in whole groups that have both kinds, and exchanged among groups that have one kind.

    Args:
        hack: Held-out scores of hack samples.
        clean: Held-out scores of clean samples.
        hack_groups: Group of each hack sample, such as its prompt.
        clean_groups: Group of each clean sample.
        settings: Number of draws, and alpha.
        nulls: Draws of the AUROC under further nulls, by name.
        details: Further numbers that are not part of the rule.
    """
    scores_N = np.concatenate([hack, clean])
    groups = [*hack_groups, *clean_groups]
    is_hack_N = np.arange(len(scores_N)) < len(hack)
    generator = np.random.default_rng([settings.seed, 2])
    relabelled = [_relabelled(is_hack_N, groups, generator) for _ in range(settings.n_flips)]
    swapped = [auroc(scores_N[labels_N], scores_N[~labels_N]) for labels_N in relabelled]
    measured = measure(auroc, (hack, clean), (hack_groups, clean_groups), settings)
    # One over the number of relabellings: groups of both kinds swap, groups of one kind trade places.
    with_hack, with_clean = set(hack_groups), set(clean_groups)
    trades = 1 / comb(len(with_hack ^ with_clean), len(with_hack - with_clean))
    smallest_p = 0.5 ** len(with_hack & with_clean) * trades
    return judge(
        name="pools",
        title="cin of hack against clean samples",
        statistic="AUROC of mean cin over modules, two pools",
        rule=swap_rule(settings, "the AUROC", 0.5) + (f" So for {', '.join(nulls)} bases." if nulls else ""),
        measured=measured,
        nulls={SWAPPED: swapped, **(nulls or {})},
        above=0.5,
        settings=settings,
        smallest_p=smallest_p,
        details={"mean_cin_hack": float(hack.mean()), "mean_cin_clean": float(clean.mean()), **(details or {})},
    )


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
