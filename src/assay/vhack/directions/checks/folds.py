"""Which pairs fit and which are scored: never the same, and never of the same group.

Either a basis is given; then every pair of a group it was made from is left out of the scoring. Or
none is given; then the groups are divided into folds, and the pairs of a fold are scored by a basis
fitted to the other folds.

The null hypothesis of every test is that hack and clean are names without meaning: swapping them in
any set of groups changes nothing in law. The p-values come from doing that, with the basis turned
as its training labels say.

Shapes: M modules, N pairs, S = 2N samples (hack sides first, then clean sides in the same order),
    N' scored pairs, K axes, R coordinates of δS, B draws.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from assay.errors import DataError
from assay.vhack.directions.basis.basis import Basis, check_covered
from assay.vhack.directions.basis.extract import PairGradients
from assay.vhack.directions.checks.check_report import CheckSettings, FloatArray
from assay.vhack.directions.checks.geometry import FittedAxes, Geometry, cin_per_module
from assay.vhack.pairs.selection import HELD_OUT_PART, check_groups, split_groups

# Share of the first axis that differences of the pairs at hand explain, and share of the weights on
# scored pairs, above which the basis was made from scored pairs. Gradients of another run in
# bfloat16 differ by about 1 %.
_EXPLAINED = 0.99

_ON_SCORED = 0.1

_AT_ONCE = 100  # rows of swapped labels, to bound the memory


@dataclass(frozen=True, eq=False)
class Fold:
    """Basis and the pairs it is scored on."""

    along: Tensor  # component of every sample along its axes, [M, K, S]
    train: Tensor  # indices of the pairs that the basis was fitted to, as far as they are at hand
    test: Tensor  # indices of the pairs it may be scored on
    # Fit of the basis, where swapping training labels only turns its axes; None where the basis is
    # fixed.
    frame: FittedAxes | None = None

    def cin(self, along_MKS: Tensor, lengths_MS: Tensor, signs_BN: Tensor) -> Tensor:
        """Return mean cin over modules of gradients with these components and lengths, [B, S].

        A row of signs swaps the sides of the training pairs where it is −1.
        """
        if self.frame is None:
            return cin_per_module(along_MKS, lengths_MS).mean(dim=0).expand(len(signs_BN), -1)
        return cin_per_module(
            along_MKS, lengths_MS, self.frame.turned(signs_BN[:, self.train])
        ).mean(dim=1)


@dataclass(frozen=True, eq=False)
class Design:
    """All folds over the same pairs."""

    settings: CheckSettings
    geometry: Geometry
    folds: tuple[Fold, ...]  # their test pairs are disjoint
    text: str  # says in words what the design is
    # indices of the pairs that bases are made from, as far as they are at hand; check 5 halves
    # these
    sources: Tensor

    @property
    def groups(self) -> tuple[str, ...]:
        """Group of every pair."""
        return self.geometry.gradients.groups

    @property
    def tested(self) -> Tensor:
        """Indices of all pairs that are scored, fold by fold."""
        return torch.cat([fold.test for fold in self.folds])

    @property
    def tested_groups(self) -> list[str]:
        """Group of each pair that is scored, in that order."""
        return [self.groups[index] for index in self.tested.tolist()]

    @property
    def smallest_p(self) -> float:
        """Smallest p-value that swapping whole groups can give.

        With refitted axes, swapping all groups at once changes nothing, so one observation counts
        twice.
        """
        free = len(set(self.tested_groups)) - (self.folds[0].frame is not None)
        return float(0.5**free)

    @cached_property
    def held_out(self) -> tuple[FloatArray, FloatArray]:
        """Scores of both sides of scored pairs, [1 + B, N'] each: as labelled, then swapped."""
        generator = np.random.default_rng([self.settings.seed, 1])
        hack_BN, clean_BN = self.scores(draw_swaps(self.groups, self.settings.n_flips, generator))
        return hack_BN.numpy(), clean_BN.numpy()

    def scores(self, signs_BN: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean cin over modules of both sides under swapped labels, [B, N'] each.

        A row of signs swaps the sides of the pairs where it is −1, in training and in scoring.
        """
        hacks = []
        cleans = []
        for fold in self.folds:
            samples = torch.cat([fold.test, fold.test + self.geometry.n])
            along_MKS = fold.along[:, :, samples]
            lengths_MS = self.geometry.lengths_MS[:, samples]
            parts = [
                fold.cin(along_MKS, lengths_MS, part_BN)
                for part_BN in torch.split(signs_BN, _AT_ONCE)
            ]
            first_BN, second_BN = torch.cat(parts).chunk(2, dim=1)
            swapped_BN = signs_BN[:, fold.test] < 0
            hacks.append(torch.where(swapped_BN, second_BN, first_BN))
            cleans.append(torch.where(swapped_BN, first_BN, second_BN))
        return torch.cat(hacks, dim=1), torch.cat(cleans, dim=1)


def draw_swaps(groups: Sequence[str], n: int, generator: np.random.Generator) -> Tensor:
    """Return random signs per pair, equal within a group, [1 + n, N].

    The first row swaps nothing, and the others each group with probability 1/2.
    """
    names = list(dict.fromkeys(groups))
    index_N = np.array([names.index(group) for group in groups])
    signs_BG = generator.choice([-1.0, 1.0], size=(n, len(names)))
    return torch.from_numpy(np.concatenate([np.ones((1, len(names))), signs_BG])[:, index_N])


def cross_fit(gradients: PairGradients, settings: CheckSettings) -> Design:
    """Return folds of whole groups, each scored by a basis of the others.

    Swapped labels only turn the axes of an SVD basis, so it is refitted under every swap. With
    another method one split is made, and a third of the groups is held out.

    Raises:
        UsageError: There are too few groups to fit a basis and score another group.
    """
    check_groups(gradients.groups, settings.method, settings.seed, settings.alpha)
    n_parts = settings.n_folds if settings.method == "svd" else HELD_OUT_PART
    count = len(set(gradients.groups))
    parts = split_groups(gradients.groups, n_parts, settings.seed)
    geometry = Geometry(gradients)
    if settings.method == "svd":
        text = f"{count} groups in {len(parts)} folds; each fold is scored by a basis of the others"
        rows = [_rows(gradients.groups, part) for part in parts]
        fitted = ((test, train, geometry.fit_pairs(train, settings)) for test, train in rows)
        folds = [Fold(frame.along, train, test, frame) for test, train, frame in fitted]
    else:
        held_out = len(parts[0])
        text = (
            f"a {settings.method} basis of {count - held_out} groups, scored on {held_out} other "
            f"groups"
        )
        test, train = _rows(gradients.groups, parts[0])
        basis = gradients.basis(
            top_k=settings.k_use,
            tau_axis=settings.tau_axis,
            method=settings.method,
            keep=train.tolist(),
        )
        folds = [Fold(geometry.given(basis.axes), train, test)]
    return Design(settings, geometry, tuple(folds), text, torch.arange(geometry.n))


def design_for_basis(basis: Basis, gradients: PairGradients, settings: CheckSettings) -> Design:
    """Return the design that scores a basis on the pairs of groups it was not made from.

    Raises:
        DataError: A pair the basis was made from has another group here, or the modules are not the
            same.
        UsageError: No pair of another group is left.
    """
    group_of_key = dict(zip(basis.origin.pairs, basis.origin.groups, strict=True))
    for index, (key, group) in enumerate(zip(gradients.keys, gradients.groups, strict=True)):
        if key in group_of_key and group_of_key[key] != group:
            raise DataError(
                f"pair {index} is in group {group} here, but the basis was made from it in group "
                f"{group_of_key[key]}",
                wanted="held-out pairs that the basis has not seen",
                do="give pairs the groups they had at extraction",
            )
    ranks = [
        {name: rows.shape[1] for name, rows in axes_or_rows.items()}
        for axes_or_rows in (basis.axes, gradients.hack)
    ]
    if ranks[0] != ranks[1]:
        raise DataError(
            "gradients of other modules or ranks than the basis has",
            wanted="the same modules and ranks",
            do="use the same model, and factors of the rank of the basis",
        )
    check_groups(
        gradients.groups, settings.method, settings.seed, settings.alpha, basis.origin.groups
    )
    train, test = _rows(gradients.groups, set(basis.origin.groups))
    refuse_seen(basis, {name: gradients.differences(name) for name in basis.axes}, "pairs", test)
    geometry = Geometry(gradients)
    used_basis = basis.slice(settings.k_use, settings.tau_axis)
    text = (
        f"a basis of {len(basis.origin.pairs)} pairs in {len(set(basis.origin.groups))} groups, "
        f"scored on {len(test)} pairs of other groups"
    )
    fold = Fold(geometry.given(used_basis.axes), train, test)
    return Design(settings, geometry, (fold,), text, train)


def refuse_seen(
    basis: Basis, rows: Mapping[str, Tensor], samples_name: str, scored: Tensor | None = None
) -> None:
    """Refuse a basis that was made from the rows it is to be scored on, whatever its file says.

    An axis is a sum of rows that the basis was made from, differences of pairs or gradients of
    their samples. Where these are at hand, the nearest sum gives the axis back without a remainder,
    and the rows with a weight are those it was made from. That says nothing where there are so many
    rows that every axis is such a sum, or where none lies along it, as in an expert to which no
    token of these samples came.

    Raises:
        DataError: The basis was made from rows that are scored.
        UsageError: Rows of a module are missing, or have other coordinates.
    """
    check_covered(rows, basis)
    explained = []
    on_scored = []
    for name, axes_KR in basis.axes.items():
        wide_NR = rows[name].double()
        axis_R = axes_KR[0].double()
        along_N = wide_NR @ axis_R
        if 2 * len(wide_NR) > len(axis_R) or not along_N.any():
            continue
        weights_N = torch.linalg.pinv(wide_NR @ wide_NR.T, hermitian=True) @ along_N
        explained.append(float(weights_N @ along_N))
        on_scored.append(
            1.0 if scored is None else float(weights_N[scored].norm() / weights_N.norm())
        )
    if explained and np.median(explained) > _EXPLAINED and np.median(on_scored) > _ON_SCORED:
        raise DataError(
            f"the basis was made from {samples_name} that it is to be scored on",
            wanted=f"held-out {samples_name}: numbers from its own pairs show nothing",
            do=f"score it on other {samples_name}, or check without a basis",
        )


def _rows(groups: Sequence[str], part: set[str]) -> tuple[Tensor, Tensor]:
    inside = torch.tensor([group in part for group in groups])
    return inside.nonzero()[:, 0], (~inside).nonzero()[:, 0]
