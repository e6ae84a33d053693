"""The singular value decomposition of one weight matrix, in float64, by two algorithms that give the same factors.

``exact`` calls LAPACK. ``gram`` takes the eigenvectors of the smaller of ``WᵀW`` and ``W Wᵀ``, which on a GPU is some
ten times faster; squaring costs digits where singular values are small, so the result is measured, repaired by a QR
decomposition if it is not orthonormal enough, and given up for ``exact`` if it still is not.

Shapes: O outputs, I inputs, R = min(O, I).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from assay.errors import BadWeights

TOLERANCE = 1e-6
"""Largest residual and orthogonality that ``gram`` may have; rounding to float32 adds about as much again."""


@dataclass(frozen=True, eq=False)
class Factors:
    """``W = left · diag(values) · right``.

    Attributes:
        left: Orthonormal columns U, [O, R].
        values: Singular values S in falling order, [R] float32.
        right: Orthonormal rows Vh, [R, I].
        residual: Error ‖U S Vh − W‖ / ‖W‖ in the Frobenius norm, measured in float64 before rounding to the dtype that
            is kept and before any truncation.
        orthogonality: Larger of ‖UᵀU − 1‖ and ‖Vh Vhᵀ − 1‖ in the Frobenius norm, measured likewise.
    """

    left: Tensor
    values: Tensor
    right: Tensor
    residual: float
    orthogonality: float

    @property
    def rank(self) -> int:
        """Number of singular directions that are kept."""
        return len(self.values)

    def truncated(self, rank: int) -> "Factors":
        """Return the ``rank`` strongest directions, in memory of their own."""
        if rank >= self.rank:
            return self
        return Factors(
            self.left[:, :rank].clone(),
            self.values[:rank].clone(),
            self.right[:rank].clone(),
            self.residual,
            self.orthogonality,
        )


def factorise(weight_OI: Tensor, *, dtype: torch.dtype = torch.float32, method: str = "auto") -> Factors:
    """Decompose a weight matrix on the device it is on.

    Args:
        weight_OI: Weight matrix of any floating dtype.
        dtype: Dtype of the factors that are kept; the work is done in float64.
        method: Algorithm: ``"exact"``, ``"gram"``, or ``"auto"``, which is gram on a GPU and exact on a CPU.

    Raises:
        BadWeights: The matrix holds NaN or infinity.
    """
    wide_OI = weight_OI.detach().double()
    if not torch.isfinite(wide_OI).all():
        raise BadWeights(
            f"a weight matrix {list(weight_OI.shape)} holds NaN or infinity",
            wanted="finite weights",
            do="load the checkpoint again",
        )
    is_tall = wide_OI.shape[0] >= wide_OI.shape[1]
    tall = wide_OI if is_tall else wide_OI.T
    by_gram = method == "gram" or (method == "auto" and weight_OI.is_cuda)
    parts = (_by_gram(tall) if by_gram else None) or _exactly(tall)
    left, right = (parts.left, parts.right) if is_tall else (parts.right.T, parts.left.T)
    return Factors(
        left.to(dtype).contiguous(),
        parts.values.float(),
        right.to(dtype).contiguous(),
        parts.residual,
        parts.orthogonality,
    )


def _exactly(tall: Tensor) -> Factors:
    return _measured(tall, *torch.linalg.svd(tall, full_matrices=False))


def _by_gram(tall: Tensor) -> Factors | None:
    """Return the factors of a tall matrix from its Gram matrix, or None if they are not accurate enough."""
    vectors = torch.linalg.eigh(tall.T @ tall).eigenvectors.flip(1)
    scaled = tall @ vectors
    values = scaled.norm(dim=0)
    found = _measured(tall, scaled / values.clamp_min(torch.finfo(values.dtype).tiny), values, vectors.T)
    if found.orthogonality > TOLERANCE:
        left, upper = torch.linalg.qr(scaled)
        signs = torch.where(upper.diagonal() < 0, -1.0, 1.0)
        found = _measured(tall, left * signs, upper.diagonal().abs(), vectors.T)
    accurate = found.orthogonality <= TOLERANCE and found.residual <= TOLERANCE
    return found if accurate and bool((found.values.diff() <= 0).all()) else None


def _measured(weight: Tensor, left: Tensor, values: Tensor, right: Tensor) -> Factors:
    size = weight.norm()
    error = ((left * values) @ right).sub_(weight).norm()
    residual = error / size if size > 0 else error
    return Factors(left, values, right, float(residual), max(_skew(left), _skew(right.T)))


def _skew(columns: Tensor) -> float:
    product = columns.T @ columns
    product.diagonal().sub_(1)
    return float(product.norm())
