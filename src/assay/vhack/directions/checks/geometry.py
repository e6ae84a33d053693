"""All bases that the checks need, by the Gram matrices of all samples.

A basis fitted to differences of gradients lies in the span of those gradients, so its axes, the
components of any sample along them and its angles to another basis follow from the Gram matrix of
all samples of a module. Hundreds of bases then cost as much as a few extractions. `Geometry.fit`
finds the axes of :meth:`assay.vhack.PairGradients.basis`.

Shapes: M modules, N pairs, S = 2N samples (hack sides first, then clean sides in the same order), T
    differences that a basis is fitted to, K axes, R coordinates of δS, B draws.
"""

from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from assay.vhack.directions.basis.axes import ROUNDING, gram, shrinkage
from assay.vhack.directions.basis.extract import PairGradients
from assay.vhack.directions.checks.check_report import CheckSettings


@dataclass(frozen=True, eq=False)
class FittedAxes:
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
        self.gram_MSS = torch.stack([gram(gradients.both_sides(name)) for name in self.names])
        self.ranks_M = torch.tensor([rows.shape[1] for rows in gradients.hack.values()])
        self.lengths_MS = divisors(self.gram_MSS.diagonal(dim1=1, dim2=2).clamp_min(0).sqrt())

    def fit_pairs(self, pairs_T: Tensor, settings: CheckSettings) -> FittedAxes:
        """Return the basis of hack minus clean of these pairs."""
        return self.fit(pairs_T, pairs_T + self.n, settings)

    def fit(self, first_T: Tensor, second_T: Tensor, settings: CheckSettings) -> FittedAxes:
        """Return the basis of the differences of two rows of samples, each axis oriented.

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
            mix_MKT, _ = self._singular(whitened_MTT, settings.k_use, settings.tau_axis)
            inside_MKS = ((mix_MKT @ inside_MTN) * along_M1N) @ directions_MNS
            mix_MKS = self._orthonormal(elsewhere_M11 * (mix_MKT @ select_TS) + inside_MKS)
        else:
            mix_MKT, _ = self._singular(gram_MTT, settings.k_use, settings.tau_axis)
            mix_MKS = mix_MKT @ select_TS
        along_MKS = mix_MKS @ self.gram_MSS
        fitted_MKT = along_MKS[:, :, first_T] - along_MKS[:, :, second_T]
        unturned = FittedAxes(along_MKS, fitted_MKT, mix_MKS)
        sign_MK1 = unturned.turned(torch.ones(1, len(first_T), dtype=torch.float64))[0][..., None]
        return FittedAxes(sign_MK1 * along_MKS, sign_MK1 * fitted_MKT, sign_MK1 * mix_MKS)

    def _inverse_covariance(self, samples_N: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the Σ⁻¹ that ``lda`` whitens with.

        It is the identity in a module where these samples do not vary.

        It has three parts: the orthonormal directions in which the samples vary, as sums of
        samples, [M, N, S]; the factor outside their span, [M, 1, 1]; and the factor along each
        direction less the one outside, [M, 1, N].
        """
        n = len(samples_N)
        centre_NN = torch.eye(n, dtype=torch.float64) - 1 / n
        gram_MNN = centre_NN @ self.gram_MSS[:, samples_N][:, :, samples_N] @ centre_NN
        share_M = torch.tensor(list(map(shrinkage, gram_MNN, self.ranks_M.tolist()))).double()
        energy_M = gram_MNN.diagonal(dim1=1, dim2=2).sum(dim=1)
        floor_M1 = (share_M * energy_M / (n * self.ranks_M))[:, None]
        mix_MNN, values_MN = self._singular(gram_MNN, n, 0.0)
        across_MN = floor_M1 + (1 - share_M)[:, None] * values_MN**2 / n
        elsewhere_M1 = floor_M1.reciprocal().masked_fill(floor_M1 <= 0, 1.0)
        along_MN = across_MN.reciprocal().masked_fill(floor_M1 <= 0, 1.0)
        directions_MNS = mix_MNN @ (centre_NN @ self._selecting(samples_N))
        return directions_MNS, elsewhere_M1[..., None], (along_MN - elsewhere_M1)[:, None]

    def _singular(self, gram_MTT: Tensor, k: int, tau_axis: float) -> tuple[Tensor, Tensor]:
        """Return singular vectors, [M, K, T], and values, [M, K], of rows by their Gram matrix.

        The vectors are weights of sums of the rows. No module has more of them than coordinates:
        where the rows are small beside the samples that they are differences of, rounding of the
        Gram matrix would give them a value.
        """
        squares_MT, vectors_MTT = torch.linalg.eigh(gram_MTT)
        values_MK = squares_MT.flip(1)[:, :k].clamp_min(0).sqrt()
        least = max(gram_MTT.shape[1] * ROUNDING, tau_axis)
        exists_MK = torch.arange(values_MK.shape[1]) < self.ranks_M[:, None]
        kept_MK = exists_MK & (values_MK > 0) & (values_MK >= least * values_MK[:, :1])
        mix_MKT = (
            vectors_MTT.flip(2)[:, :, :k].transpose(1, 2)
            / torch.where(kept_MK, values_MK, torch.inf)[..., None]
        )
        return mix_MKT, values_MK

    def _selecting(self, samples_T: Tensor) -> Tensor:
        """Return the matrix that takes these samples out of all of them, [T, S]."""
        return torch.nn.functional.one_hot(samples_T, 2 * self.n).double()

    def _orthonormal(self, mix_MKS: Tensor) -> Tensor:
        """Return axes made orthonormal in their order; zero rows stay zero."""
        gram_MKK = mix_MKS @ self.gram_MSS @ mix_MKS.transpose(1, 2)
        empty_MK = (gram_MKK.diagonal(dim1=1, dim2=2) <= 0).double()
        lower_MKK = torch.linalg.cholesky(gram_MKK + torch.diag_embed(empty_MK))
        return cast("Tensor", torch.linalg.solve_triangular(lower_MKK, mix_MKS, upper=False))

    def clean_differences(
        self, pairs: Tensor, generator: np.random.Generator
    ) -> tuple[Tensor, Tensor]:
        """Return clean sides in random couples, of one group as far as possible."""
        # Sorted by group after shuffling: neighbours share a group, but for the odd one out.
        shuffled = generator.permutation(pairs.numpy())
        ordered = sorted(shuffled.tolist(), key=lambda index: self.gradients.groups[index])
        first_rows = ordered[0 : 2 * (len(ordered) // 2) : 2]
        return torch.tensor(first_rows) + self.n, torch.tensor(ordered[1::2]) + self.n

    def given(self, axes: dict[str, Tensor]) -> Tensor:
        """Return the components along given axes, [M, K, S], zero where a module has fewer axes."""
        along = [
            axes[name].double() @ self.gradients.both_sides(name).double().T for name in self.names
        ]
        return pad_sequence(along, batch_first=True)

    def overlaps(self, frame: FittedAxes, other_frame: FittedAxes) -> Tensor:
        """Return the scalar products of the axes of two bases, [M, K, K].

        Their singular values are the cosines of the principal angles.
        """
        return frame.mix @ self.gram_MSS @ other_frame.mix.transpose(1, 2)

    def batch(self, along_MKS: Tensor, weights_SQ: Tensor) -> tuple[Tensor, Tensor]:
        """Return components along axes, [M, K, Q], and lengths, [M, Q], of weighted sums of
        samples.
        """
        squares_MQ = torch.einsum("sq,mst,tq->mq", weights_SQ, self.gram_MSS, weights_SQ)
        return along_MKS @ weights_SQ, divisors(squares_MQ.clamp_min(0).sqrt())


def divisors(lengths: Tensor) -> Tensor:
    """Return lengths to divide by, infinite where they are 0: a share of nothing is 0."""
    return torch.where(lengths > 0, lengths, torch.inf)


def cin_per_module(along_MKS: Tensor, lengths_MS: Tensor, turn_BMK: Tensor | None = None) -> Tensor:
    """Return ``‖relu(V g)‖ / ‖g‖`` per module, [M, S], or [B, M, S] for B turns of the axes."""
    ahead_MKS = along_MKS.clamp_min(0).square()
    back_MKS = along_MKS.clamp_max(0).square()
    if turn_BMK is None:
        return ahead_MKS.sum(dim=1).sqrt() / lengths_MS
    turned_BMS = torch.einsum("bmk,mks->bms", (turn_BMK + 1) / 2, ahead_MKS - back_MKS)
    return (turned_BMS + back_MKS.sum(dim=1)).clamp_min(0).sqrt() / lengths_MS
