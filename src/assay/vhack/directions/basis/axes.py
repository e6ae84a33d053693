"""From the gradients of the pairs of one module to its axes.

``D = G_hack − G_clean`` has few rows and many columns, so everything goes through its Gram matrix
``K = D Dᵀ``, in float64: with ``K = P Λ Pᵀ`` the singular values are ``√Λ`` and the right singular
vectors ``Λ^(−1/2) Pᵀ D``. Rows of ``D`` can be left out by leaving rows and columns of ``K`` out,
and added by adding them.

Shapes: N pairs, R coordinates of δS in a module (its rank), K axes, M directions with clean
    variance.
"""

from typing import cast

import torch
from torch import Tensor

from assay.errors import UsageError

ROUNDING = torch.finfo(torch.float32).eps
"""Singular values below this share of the first, times N, are rounding of float32 gradients, not
axes.
"""

MOST_AXES = 1024
"""Axes of a module in a file: to check them takes time that grows with their cube."""


def check_axis_settings(top_k: int, tau_axis: float) -> None:
    """Raise UsageError unless ``top_k`` is 1 to `MOST_AXES` and ``tau_axis`` in [0, 1]."""
    if not 1 <= top_k <= MOST_AXES:
        raise UsageError(
            f"{top_k} axes",
            wanted=f"1 to {MOST_AXES}, the most that a file of a basis may have",
            do="set --top-k within that",
        )
    if not 0 <= tau_axis <= 1:
        raise UsageError(
            f"tau_axis={tau_axis}",
            wanted="a share of the first singular value, 0 to 1",
            do="use 0.25",
        )


def zero_weak_axes(axes_KR: Tensor, values_K: Tensor, tau_axis: float) -> Tensor:
    """Return the axes with zeros in the rows where ``S_i / S_0 < tau_axis``."""
    return axes_KR * (values_K >= tau_axis * values_K[:1])[:, None]


def gram(rows_NR: Tensor) -> Tensor:
    """Return the Gram matrix of the rows, [N, N] in float64."""
    return rows_NR.double() @ rows_NR.double().T


def find_axes(
    difference_NR: Tensor,
    gram_NN: Tensor,
    *,
    top_k: int,
    clean: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the axes of one module by one of two methods, with their singular values and votes.

    - ``svd``: right singular vectors of the differences, not centred, strongest first.
    - ``lda``: the differences are whitened by the covariance of the clean gradients before the SVD,
      and the result is taken back: ``w = Σ^(−1/2) z``, made orthonormal in order. Σ is shrunk
      towards a multiple of the identity by :func:`shrinkage`. Values are those of the whitened
      differences: units of one clean standard deviation.

    Differences are hack minus clean, one row per pair; ``gram_NN`` is their Gram matrix. With the
    clean gradients and theirs it is ``lda``, and ``svd`` without. No more than N axes come back, as
    a :class:`Basis` has them; one that the data cannot fill is zero.
    """
    rows_NR = difference_NR.double()
    if clean is None:
        axes_KR, values_K = _singular_rows(rows_NR, gram_NN, top_k)
    else:
        axes_KR, values_K = _discriminants(rows_NR, clean[0].double(), clean[1], top_k)
    turned_KR, votes_K2 = _oriented(rows_NR, axes_KR)
    return turned_KR.float(), values_K.float(), votes_K2


def _singular_rows(rows_NR: Tensor, gram_NN: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    values_N, vectors_NN = torch.linalg.eigh(gram_NN)
    k = min(top_k, *rows_NR.shape)
    values_K = values_N.flip(0)[:k].clamp_min(0).sqrt()
    is_used_K = values_K > values_K[0] * len(rows_NR) * ROUNDING
    leading_NK = vectors_NN.flip(1)[:, :k]
    raw_KR = (leading_NK.T @ rows_NR) / torch.where(is_used_K, values_K, torch.inf)[:, None]
    return _orthonormal(raw_KR, is_used_K), torch.where(is_used_K, values_K, 0.0)


def _orthonormal(raw_KR: Tensor, kept_K: Tensor) -> Tensor:
    """Return the rows made orthonormal in their order; rows that are not used become zero."""
    axes_KR = torch.zeros_like(raw_KR)
    if kept_K.any():
        basis_RJ, upper_JJ = torch.linalg.qr(raw_KR[kept_K].T)
        axes_KR[kept_K] = (basis_RJ * upper_JJ.diagonal().sign()).T
    return axes_KR


def draw_frames(*shape: int, generator: torch.Generator, dtype: torch.dtype) -> Tensor:
    """Return orthonormal columns that are uniform among all (Haar), [..., R, K]."""
    frames, upper = torch.linalg.qr(torch.randn(*shape, generator=generator, dtype=dtype))
    # The algorithm chooses signs by itself; with these a column and its negative are as likely.
    return cast("Tensor", frames * upper.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2))


def _discriminants(
    rows_NR: Tensor, clean_NR: Tensor, clean_gram_NN: Tensor, top_k: int
) -> tuple[Tensor, Tensor]:
    n, r = clean_NR.shape
    centred_NR = clean_NR - clean_NR.mean(dim=0)
    gram_NN = clean_gram_NN - clean_gram_NN.mean(dim=0) - clean_gram_NN.mean(dim=1, keepdim=True)
    gram_NN = gram_NN + clean_gram_NN.mean()
    mean_variance = float(gram_NN.trace()) / (n * r)
    # The clean gradients do not vary, so there is nothing to whiten with.
    if mean_variance <= 0:
        return _singular_rows(rows_NR, gram(rows_NR), top_k)
    # Σ = floor·I + Q diag(s²) Qᵀ is never formed: Σ^(−1/2) is one factor along the directions Q and
    # one elsewhere.
    share = shrinkage(gram_NN, r)
    floor = share * mean_variance
    directions_MR, values_M = _singular_rows(centred_NR, gram_NN, n)
    elsewhere = floor**-0.5
    along_M = (floor + (1 - share) * values_M**2 / n).rsqrt()

    def whiten(some_NR: Tensor) -> Tensor:
        inside_NR = ((some_NR @ directions_MR.T) * (along_M - elsewhere)) @ directions_MR
        return cast("Tensor", elsewhere * some_NR + inside_NR)

    whitened_NR = whiten(rows_NR)
    axes_KR, values_K = _singular_rows(whitened_NR, gram(whitened_NR), top_k)
    return _orthonormal(whiten(axes_KR), values_K > 0), values_K


def shrinkage(gram_NN: Tensor, r: int) -> float:
    """Return the Ledoit-Wolf shrinkage of a covariance towards the identity (2004).

    With S = XᵀX/n for the centred rows X and μ = tr S/r it is ``min(1, b²/d²)``, where ``d² = ‖S −
    μI‖²`` and ``b² = Σ‖x xᵀ − S‖²/n²`` in Frobenius norms. Never below 0.001, so that the result is
    invertible when there are fewer rows than columns.
    """
    n = len(gram_NN)
    squared = float((gram_NN**2).sum()) / n**2
    distance = squared - float(gram_NN.trace() / n) ** 2 / r
    spread = (float((gram_NN.diagonal() ** 2).sum()) - n * squared) / n**2
    return min(1.0, max(1e-3, spread / distance)) if distance > 0 else 1.0


def _oriented(rows_NR: Tensor, axes_KR: Tensor) -> tuple[Tensor, Tensor]:
    """Turn each axis to the side of most pairs.

    The mean decides a tie, which its votes show.
    """
    along_NK = rows_NR @ axes_KR.T
    for_K = (along_NK > 0).sum(dim=0)
    against_K = (along_NK < 0).sum(dim=0)
    flip_K = (for_K < against_K) | ((for_K == against_K) & (along_NK.sum(dim=0) < 0))
    votes_K2 = torch.where(
        flip_K[:, None], torch.stack([against_K, for_K], 1), torch.stack([for_K, against_K], 1)
    )
    return torch.where(flip_K[:, None], -axes_KR, axes_KR), votes_K2
