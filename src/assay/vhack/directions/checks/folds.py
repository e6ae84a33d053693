"""Which pairs fit and which are scored: never the same, and never of the same group; and all bases
that this needs.

Either a basis is given; then every pair of a group it was made from is left out of the scoring. Or
none is given; then the groups are divided into folds, and the pairs of a fold are scored by a basis
fitted to the other folds.

The null hypothesis of every test is that hack and clean are names without meaning: swapping them in
any set of groups changes nothing in law. The p-values come from doing that, with the basis turned
as its training labels say.

A basis fitted to differences of gradients lies in the span of those gradients, so its axes, the
components of any sample along them and its angles to another basis follow from the Gram matrix of
all samples of a module. Hundreds of bases then cost as much as a few extractions. `Geometry.fit`
finds the axes of :meth:`assay.vhack.PairGradients.basis`.

Shapes: M modules, N pairs, S = 2N samples (hack sides first, then clean sides in the same order), T
    differences that a
basis is fitted to, K axes, R coordinates of δS, B draws.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from assay.errors import DataError
from assay.vhack.directions.basis.basis import Basis, shrinkage
from assay.vhack.directions.basis.extract import PairGradients
from assay.vhack.directions.checks.judge import CheckSettings, FloatArray
from assay.vhack.pairs.selection import HELD_OUT_PART, check_groups, split_groups

# As in assay.vhack.directions.basis: singular values below this share of the first, times T, are rounding of
# float32 gradients.
_ROUNDING = torch.finfo(torch.float32).eps


@dataclass(frozen=True, eq=False)
class Frame:
    """Fitted basis of every module, by its components of the samples."""

    # component of each sample along each axis, [M, K, S]; axes point to where most differences
    # point
    along: Tensor
    fitted: Tensor  # component of each difference that the basis was fitted to, [M, K, T]
    mix: Tensor  # axes as sums of samples, [M, K, S]

    def turned(self, signs_BT: Tensor) -> Tensor:
        """Return how the axes would turn if the differences had these signs, [B, M, K] of ±1.

        Signs leave ``DᵀD`` and with it the axes of an SVD as they are; only the vote on which way
        they point changes.
        """
        votes_BMK = torch.einsum("bt,mkt->bmk", signs_BT, self.fitted.sign())
        sums_BMK = torch.einsum("bt,mkt->bmk", signs_BT, self.fitted)
        decided_BMK = torch.where(votes_BMK == 0, sums_BMK, votes_BMK)
        return torch.where(decided_BMK < 0, -1.0, 1.0).to(votes_BMK)


class Geometry:
    """Scalar products of all gradients of N pairs."""

    def __init__(self, gradients: PairGradients) -> None:
        self.gradients = gradients
        self.names = tuple(gradients.hack)
        self.n = len(gradients)
        self.gram_MSS = torch.stack(
            [(rows := self.samples(name).double()) @ rows.T for name in self.names]
        )
        lengths_MS = self.gram_MSS.diagonal(dim1=1, dim2=2).clamp_min(0).sqrt()
        self.lengths_MS = torch.where(lengths_MS > 0, lengths_MS, torch.inf)

    def samples(self, name: str) -> Tensor:
        """Return the gradients of one module, [S, R]."""
        return torch.cat([self.gradients.hack[name], self.gradients.clean[name]])

    def fit_pairs(self, pairs_T: Tensor, settings: CheckSettings) -> Frame:
        """Return the basis of hack minus clean of these pairs."""
        return self.fit(pairs_T, pairs_T + self.n, settings)

    def fit(self, first_T: Tensor, second_T: Tensor, settings: CheckSettings) -> Frame:
        """Return the basis of the differences of two rows of samples, each axis turned to where
        most of them point.

        It is that of :meth:`assay.vhack.PairGradients.basis`; ``lda`` whitens with the second row,
        the clean sides.
        """
        products_MTS = self.gram_MSS[:, first_T] - self.gram_MSS[:, second_T]
        gram_MTT = products_MTS[:, :, first_T] - products_MTS[:, :, second_T]
        select_TS = self._selecting(first_T) - self._selecting(second_T)
        if settings.method == "lda":
            directions_MNS, elsewhere_M11, along_M1N = self._inverse_covariance(second_T)
            inside_MTN = products_MTS @ directions_MNS.transpose(1, 2)
            # D Σ⁻¹ Dᵀ has the singular values of the whitened differences, and Σ⁻¹ Dᵀ takes their
            # vectors back.
            whitened_MTT = elsewhere_M11 * gram_MTT + (
                inside_MTN * along_M1N
            ) @ inside_MTN.transpose(1, 2)
            mix_MKT, _ = _singular(whitened_MTT, settings.k_use, settings.tau_axis)
            inside_MKS = ((mix_MKT @ inside_MTN) * along_M1N) @ directions_MNS
            mix_MKS = self._orthonormal(elsewhere_M11 * (mix_MKT @ select_TS) + inside_MKS)
        else:
            mix_MKT, _ = _singular(gram_MTT, settings.k_use, settings.tau_axis)
            mix_MKS = mix_MKT @ select_TS
        along_MKS = mix_MKS @ self.gram_MSS
        fitted_MKT = along_MKS[:, :, first_T] - along_MKS[:, :, second_T]
        unturned = Frame(along_MKS, fitted_MKT, mix_MKS)
        sign_MK1 = unturned.turned(torch.ones(1, len(first_T), dtype=torch.float64))[0][..., None]
        return Frame(sign_MK1 * along_MKS, sign_MK1 * fitted_MKT, sign_MK1 * mix_MKS)

    def _inverse_covariance(self, samples_N: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the Σ⁻¹ that ``lda`` whitens with, or the identity in a module where these samples
        do not vary.

        It has three parts: the orthonormal directions in which the samples vary, as sums of
        samples, [M, N, S]; the factor outside their span, [M, 1, 1]; and the factor along each
        direction less the one outside, [M, 1, N].
        """
        n = len(samples_N)
        centre_NN = torch.eye(n, dtype=torch.float64) - 1 / n
        gram_MNN = centre_NN @ self.gram_MSS[:, samples_N][:, :, samples_N] @ centre_NN
        ranks_M = torch.tensor([self.gradients.hack[name].shape[1] for name in self.names])
        share_M = torch.tensor(
            [shrinkage(g, r) for g, r in zip(gram_MNN, ranks_M.tolist(), strict=True)]
        ).double()
        floor_M1 = (share_M * gram_MNN.diagonal(dim1=1, dim2=2).sum(dim=1) / (n * ranks_M))[:, None]
        mix_MNN, values_MN = _singular(gram_MNN, n, 0.0)
        across_MN = floor_M1 + (1 - share_M)[:, None] * values_MN**2 / n
        elsewhere_M1 = floor_M1.reciprocal().masked_fill(floor_M1 <= 0, 1.0)
        along_MN = across_MN.reciprocal().masked_fill(floor_M1 <= 0, 1.0)
        directions_MNS = mix_MNN @ (centre_NN @ self._selecting(samples_N))
        return directions_MNS, elsewhere_M1[..., None], (along_MN - elsewhere_M1)[:, None]

    def _selecting(self, samples_T: Tensor) -> Tensor:
        """Return the matrix that takes these samples out of all of them, [T, S]."""
        return torch.nn.functional.one_hot(samples_T, 2 * self.n).double()

    def _orthonormal(self, mix_MKS: Tensor) -> Tensor:
        """Return axes made orthonormal in their order; rows that have no length stay as they
        are.
        """
        gram_MKK = mix_MKS @ self.gram_MSS @ mix_MKS.transpose(1, 2)
        empty_MK = (gram_MKK.diagonal(dim1=1, dim2=2) <= 0).double()
        lower_MKK = torch.linalg.cholesky(gram_MKK + torch.diag_embed(empty_MK))
        axes_MKS: Tensor = torch.linalg.solve_triangular(lower_MKK, mix_MKS, upper=False)
        return axes_MKS

    def clean_differences(
        self, pairs: Tensor, generator: np.random.Generator
    ) -> tuple[Tensor, Tensor]:
        """Return the clean sides of these pairs two by two, drawn at random, of the same group as
        far as possible.
        """
        # Sorted by group after shuffling: neighbours share a group, but for the odd one out.
        shuffled = generator.permutation(pairs.numpy())
        ordered = sorted(shuffled.tolist(), key=lambda index: self.gradients.groups[index])
        first = ordered[0 : 2 * (len(ordered) // 2) : 2]
        second = ordered[1::2]
        return torch.tensor(first) + self.n, torch.tensor(second) + self.n

    def given(self, axes: dict[str, Tensor]) -> Tensor:
        """Return the components along given axes, [M, K, S]; modules with fewer axes are filled
        with zeros.
        """
        along = [axes[name].double() @ self.samples(name).double().T for name in self.names]
        return pad_sequence(along, batch_first=True)

    def overlaps(self, one: Frame, other: Frame) -> Tensor:
        """Return the scalar products of the axes of two frames, [M, K, K]; the cosines are its
        singular values.
        """
        return one.mix @ self.gram_MSS @ other.mix.transpose(1, 2)

    def batch(self, along_MKS: Tensor, weights_SQ: Tensor) -> tuple[Tensor, Tensor]:
        """Return the components along axes, [M, K, Q], and the lengths, [M, Q], of weighted sums of
        samples.
        """
        squares_MQ = torch.einsum("sq,mst,tq->mq", weights_SQ, self.gram_MSS, weights_SQ)
        lengths_MQ = squares_MQ.clamp_min(0).sqrt()
        return along_MKS @ weights_SQ, torch.where(lengths_MQ > 0, lengths_MQ, torch.inf)


def _singular(gram_MTT: Tensor, k: int, tau_axis: float) -> tuple[Tensor, Tensor]:
    """Return singular vectors as sums of the rows with this Gram matrix, [M, K, T], and singular
    values, [M, K].
    """
    squares_MT, vectors_MTT = torch.linalg.eigh(gram_MTT)
    values_MK = squares_MT.flip(1)[:, :k].clamp_min(0).sqrt()
    least = max(gram_MTT.shape[1] * _ROUNDING, tau_axis)
    kept_MK = (values_MK > 0) & (values_MK >= least * values_MK[:, :1])
    mix_MKT = (
        vectors_MTT.flip(2)[:, :, :k].transpose(1, 2)
        / torch.where(kept_MK, values_MK, torch.inf)[..., None]
    )
    return mix_MKT, values_MK


def cin_per_module(along_MKS: Tensor, lengths_MS: Tensor, turn_BMK: Tensor | None = None) -> Tensor:
    """Return cin per module, ``‖relu(V g)‖ / ‖g‖``: [M, S], or [B, M, S] for axes turned in B
    ways.
    """
    ahead_MKS = along_MKS.clamp_min(0).square()
    back_MKS = along_MKS.clamp_max(0).square()
    if turn_BMK is None:
        return ahead_MKS.sum(dim=1).sqrt() / lengths_MS
    forward_BMK = (turn_BMK + 1) / 2
    squares_BMS = torch.einsum("bmk,mks->bms", forward_BMK, ahead_MKS - back_MKS) + back_MKS.sum(
        dim=1
    )
    return squares_BMS.clamp_min(0).sqrt() / lengths_MS


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
    frame: Frame | None = None

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
        """Scores of both sides of every scored pair, [1 + B, N'] each: as labelled, then with
        swapped labels.
        """
        generator = np.random.default_rng([self.settings.seed, 1])
        hack_BN, clean_BN = self.scores(draw_swaps(self.groups, self.settings.n_flips, generator))
        return hack_BN.numpy(), clean_BN.numpy()

    def scores(self, signs_BN: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean cin over modules of both sides of every scored pair under swapped labels, [B,
        N'] each.

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
    """Return signs per pair, [1 + n, N]: the first row swaps nothing, the others each group with
    probability 1/2.
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
        k = settings.k_use
        tau = settings.tau_axis
        basis = gradients.basis(top_k=k, tau_axis=tau, method=settings.method, keep=train.tolist())
        folds = [Fold(geometry.given(basis.axes), train, test)]
    return Design(settings, geometry, tuple(folds), text, torch.arange(geometry.n))


def design_for_basis(basis: Basis, gradients: PairGradients, settings: CheckSettings) -> Design:
    """Return the design that scores a basis on the pairs of groups it was not made from.

    Raises:
        DataError: A pair the basis was made from has another group here, or the modules are not the
            same.
        UsageError: No pair of another group is left.
    """
    known = dict(zip(basis.origin.pairs, basis.origin.groups, strict=True))
    for index, (key, group) in enumerate(zip(gradients.keys, gradients.groups, strict=True)):
        if key in known and known[key] != group:
            raise DataError(
                f"pair {index} is in group {group} here, but the basis was made from it in group "
                f"{known[key]}",
                wanted="held-out pairs that the basis has not seen",
                do="give pairs the groups they had at extraction",
            )
    ranks = [
        {name: rows.shape[1] for name, rows in each.items()}
        for each in (basis.axes, gradients.hack)
    ]
    if ranks[0] != ranks[1]:
        wanted = "the same modules and ranks"
        do = "use the same model, and factors of the rank of the basis"
        raise DataError(
            "gradients of other modules or ranks than the basis has", wanted=wanted, do=do
        )
    check_groups(
        gradients.groups, settings.method, settings.seed, settings.alpha, basis.origin.groups
    )
    train, test = _rows(gradients.groups, set(basis.origin.groups))
    differences = {name: gradients.differences(name) for name in basis.axes}
    refuse_seen(basis, differences, "pairs", test)
    geometry = Geometry(gradients)
    used = basis.slice(settings.k_use, settings.tau_axis)
    text = (
        f"a basis of {len(basis.origin.pairs)} pairs in {len(set(basis.origin.groups))} groups, "
        f"scored on "
        f"{len(test)} pairs of other groups"
    )
    fold = Fold(geometry.given(used.axes), train, test)
    return Design(settings, geometry, (fold,), text, train)


def refuse_seen(
    basis: Basis, rows: Mapping[str, Tensor], what: str, scored: Tensor | None = None
) -> None:
    """Refuse a basis that was made from what it is to be scored on, rows [N, R] by module, whatever
    its file says.

    An axis is a sum of rows that the basis was made from, differences of pairs or gradients of
    their samples. Where these are at hand, the nearest sum gives the axis back without a remainder,
    and the rows with a weight are those it was made from. That says nothing where there are so many
    rows that every axis is such a sum, or where none lies along it, as in an expert to which no
    token of these samples came.

    Raises:
        DataError: The basis was made from rows that are scored.
    """
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
        wanted = f"held-out {what}: numbers from its own pairs show nothing"
        do = f"score it on other {what}, or check without a basis"
        raise DataError(
            f"the basis was made from {what} that it is to be scored on", wanted=wanted, do=do
        )


def _rows(groups: Sequence[str], part: set[str]) -> tuple[Tensor, Tensor]:
    inside = torch.tensor([group in part for group in groups])
    return inside.nonzero()[:, 0], (~inside).nonzero()[:, 0]
