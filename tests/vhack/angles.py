"""Principal angles between two subspaces: how far apart they are, whatever bases describe them."""

import torch
from torch import Tensor

__all__ = ["principal_angles"]


def principal_angles(axes_KR: Tensor, others_JR: Tensor) -> Tensor:
    """Return the angles between two row spaces in radians, smallest first, min(K, J) of them.

    Björck and Golub (1973): cosines are the singular values of ``A Bᵀ`` for orthonormal rows; where a cosine is near
    one the sine is used, which keeps its digits. Zero rows span nothing and are left out.

    Args:
        axes_KR: Rows that span the first space. They need not be orthonormal.
        others_JR: Rows that span the second space.
    """
    first_KR, second_JR = (_orthonormal_rows(rows) for rows in (axes_KR, others_JR))
    if len(first_KR) > len(second_JR):
        first_KR, second_JR = second_JR, first_KR
    if not len(first_KR):
        return torch.zeros(0)
    product_KJ = first_KR @ second_JR.T
    cosines_K = torch.linalg.svdvals(product_KJ).clamp(max=1)
    sines_K = torch.linalg.svdvals(first_KR - product_KJ @ second_JR).flip(0).clamp(max=1)
    return torch.where(cosines_K**2 < 0.5, cosines_K.acos(), sines_K.asin()).float()


def _orthonormal_rows(rows_KR: Tensor) -> Tensor:
    rows_KR = rows_KR.double()
    rows_KR = rows_KR[rows_KR.norm(dim=1) > 0]
    if not len(rows_KR):
        return rows_KR
    _, values, right_KR = torch.linalg.svd(rows_KR, full_matrices=False)
    kept: Tensor = right_KR[values > values[0] * 1e-6]
    return kept
