"""The factors of one matrix.

Shapes: O outputs, I inputs, R = min(O, I), or fewer.
"""

from dataclasses import dataclass

from torch import Tensor


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
