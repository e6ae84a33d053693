"""All bases that the checks need, from scalar products of gradients alone.

A basis fitted to differences of gradients lies in the span of those gradients. So with the Gram matrix of all samples
of a module, its axes, what they say of any sample, and its angles to another basis follow without touching a vector of
length R again. Hundreds of bases then cost as much as a few extractions. `Geometry.fit` finds the same axes as
:func:`assay.vhack.basis_from_gradients`, for all modules at once.

Shapes: M modules, N pairs, S = 2N samples (hack sides first, then clean sides in the same order), T differences that a
basis is fitted to, K axes, R coordinates of δS, B draws.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from assay.vhack.basis import PairGradients

__all__ = ["Frame", "Geometry", "shares"]

# As in assay.vhack: singular values below this share of the first, times T, are rounding of float32 gradients.
_ROUNDING = torch.finfo(torch.float32).eps


@dataclass(frozen=True, eq=False)
class Frame:
    """A fitted basis of every module, by what it says of the samples.

    Attributes:
        along: component of each sample along each axis, [M, K, S]; axes point to where most differences point.
        fitted: the same of the differences it was fitted to, [M, K, T].
        mix: the axes as combinations of these differences, [M, K, T].
        first: the differences are sample ``first`` minus sample ``second``, [T].
        second: see ``first``, [T].
        values: singular values, [M, K].
    """

    along: Tensor
    fitted: Tensor
    mix: Tensor
    first: Tensor
    second: Tensor
    values: Tensor

    def turned(self, signs_BT: Tensor) -> Tensor:
        """How the axes would turn if the differences had these signs, [B, M, K] of ±1.

        Signs leave ``DᵀD`` and with it the axes as they are; only the vote on which way they point changes.
        """
        votes_BMK = torch.einsum("bt,mkt->bmk", signs_BT, self.fitted.sign())
        sums_BMK = torch.einsum("bt,mkt->bmk", signs_BT, self.fitted)
        decided_BMK = torch.where(votes_BMK == 0, sums_BMK, votes_BMK)
        return torch.where(decided_BMK < 0, -1.0, 1.0).to(votes_BMK)


class Geometry:
    """Scalar products of all gradients of N pairs.

    Args:
        gradients: both sides of every pair.
    """

    def __init__(self, gradients: PairGradients) -> None:
        self.gradients = gradients
        self.names = tuple(gradients.hack)
        self.n = len(gradients)
        self.gram_MSS = torch.stack([(rows := self.samples(name).double()) @ rows.T for name in self.names])
        lengths_MS = self.gram_MSS.diagonal(dim1=1, dim2=2).clamp_min(0).sqrt()
        self.lengths_MS = torch.where(lengths_MS > 0, lengths_MS, torch.inf)

    def samples(self, name: str) -> Tensor:
        """Gradients of one module, [S, R]."""
        return torch.cat([self.gradients.hack[name], self.gradients.clean[name]])

    def fit_pairs(self, pairs_T: Tensor, k: int, tau_axis: float = 0.0) -> Frame:
        """The basis of hack minus clean of these pairs."""
        return self.fit(pairs_T, pairs_T + self.n, k, tau_axis)

    def fit(self, first_T: Tensor, second_T: Tensor, k: int, tau_axis: float = 0.0) -> Frame:
        """The SVD basis of these differences, each axis turned to where most of them point."""
        products_MTS = self.gram_MSS[:, first_T] - self.gram_MSS[:, second_T]
        gram_MTT = products_MTS[:, :, first_T] - products_MTS[:, :, second_T]
        squares_MT, vectors_MTT = torch.linalg.eigh(gram_MTT)
        values_MK = squares_MT.flip(1)[:, :k].clamp_min(0).sqrt()
        least = max(len(first_T) * _ROUNDING, tau_axis)
        kept_MK = (values_MK > 0) & (values_MK >= least * values_MK[:, :1])
        mix_MKT = vectors_MTT.flip(2)[:, :, :k].transpose(1, 2) / torch.where(kept_MK, values_MK, torch.inf)[..., None]
        fitted_MKT = mix_MKT @ gram_MTT
        frame = Frame(mix_MKT @ products_MTS, fitted_MKT, mix_MKT, first_T, second_T, values_MK)
        sign_MK1 = frame.turned(torch.ones(1, len(first_T), dtype=torch.float64))[0][..., None]
        return Frame(sign_MK1 * frame.along, sign_MK1 * fitted_MKT, sign_MK1 * mix_MKT, first_T, second_T, values_MK)

    def given(self, axes: dict[str, Tensor]) -> Tensor:
        """Components along axes from elsewhere, [M, K, S]; modules with fewer axes are filled with zeros."""
        k = max(len(axes[name]) for name in self.names)
        along_MKS = torch.zeros(len(self.names), k, 2 * self.n, dtype=torch.float64)
        for index, name in enumerate(self.names):
            along_MKS[index, : len(axes[name])] = axes[name].double() @ self.samples(name).double().T
        return along_MKS

    def overlaps(self, one: Frame, other: Frame) -> Tensor:
        """Scalar products of the axes of two frames, [M, K, K]; their singular values are cosines of angles."""
        products_MTS = self.gram_MSS[:, one.first] - self.gram_MSS[:, one.second]
        products_MTT = products_MTS[:, :, other.first] - products_MTS[:, :, other.second]
        return one.mix @ products_MTT @ other.mix.transpose(1, 2)

    def batch(self, along_MKS: Tensor, weights_SQ: Tensor) -> tuple[Tensor, Tensor]:
        """Weighted sums of samples: their components along axes [M, K, Q] and lengths [M, Q]."""
        squares_MQ = torch.einsum("sq,mst,tq->mq", weights_SQ, self.gram_MSS, weights_SQ)
        lengths_MQ = squares_MQ.clamp_min(0).sqrt()
        return along_MKS @ weights_SQ, torch.where(lengths_MQ > 0, lengths_MQ, torch.inf)


def shares(along_MKS: Tensor, lengths_MS: Tensor, turn_BMK: Tensor | None = None) -> Tensor:
    """Cin per module, ``‖relu(V g)‖ / ‖g‖``: [M, S], or [B, M, S] for axes turned in B ways."""
    ahead_MKS, back_MKS = along_MKS.clamp_min(0).square(), along_MKS.clamp_max(0).square()
    if turn_BMK is None:
        return ahead_MKS.sum(dim=1).sqrt() / lengths_MS
    forward_BMK = (turn_BMK + 1) / 2
    squares_BMS = torch.einsum("bmk,mks->bms", forward_BMK, ahead_MKS - back_MKS) + back_MKS.sum(dim=1)
    return squares_BMS.clamp_min(0).sqrt() / lengths_MS
