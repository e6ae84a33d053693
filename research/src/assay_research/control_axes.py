"""Control axes: what hack directions are compared with, from the same pairs.

Shapes: N pairs, R coordinates of δS, K axes.
"""

import random
from dataclasses import replace

import torch
from torch import Tensor

from assay.errors import UsageError
from assay.vhack.directions.basis.axes import draw_frames
from assay.vhack.directions.basis.basis import Basis
from assay.vhack.directions.basis.extract import PairGradients

BASIS_KINDS = ("true", "random", "shuffled", "clean-clean")
"""The axes that an arm may act along; all but the true ones are controls."""


def make_basis(
    kind: str, gradients: PairGradients, *, top_k: int = 5, method: str = "lda", seed: int = 0
) -> Basis:
    """Return ``top_k`` axes per module of one kind:

    - ``true``: the hack directions of the pairs;
    - ``random``: as many orthonormal axes, uniform among all of them;
    - ``shuffled``: extracted from the same pairs with hack and clean exchanged in a random half of
      them. The direction of the hack is lost. By ``svd`` the plane stays, because a difference and
      its negative span the same line; by ``lda`` it is lost too, because half of what it whitens by
      are hacks;
    - ``clean-clean``: extracted from differences between clean sides of different pairs.

    Raises:
        UsageError: There is no such kind, or there are too few pairs for it.
        DataError: The gradients do not differ.
    """
    if kind == "true":
        return gradients.basis(top_k=top_k, method=method)
    if kind == "random":
        return _random(gradients, top_k, seed)
    if kind in _PAIRED:
        return _PAIRED[kind](gradients, seed).basis(top_k=top_k, method=method)
    raise UsageError(f"{kind} axes", wanted=", ".join(BASIS_KINDS), do="choose one of them")


def _random(gradients: PairGradients, top_k: int, seed: int) -> Basis:
    """Return as many axes per module as the true ones have, uniform among all orthonormal ones."""
    generator = torch.Generator().manual_seed(seed)
    axes = {}
    k = min(top_k, len(gradients))
    for name, rows_NR in gradients.clean.items():
        rank = rows_NR.shape[1]
        frame_RK = draw_frames(rank, min(k, rank), generator=generator, dtype=torch.float64)
        axes[name] = frame_RK.T.float().contiguous()
    return Basis(
        axes,
        {name: torch.ones(len(axes_KR)) for name, axes_KR in axes.items()},
        {name: torch.zeros(len(axes_KR), 2, dtype=torch.int64) for name, axes_KR in axes.items()},
        replace(gradients.origin, top_k=top_k),
    )


def _shuffled(gradients: PairGradients, seed: int) -> PairGradients:
    """Exchange the two sides of half of the pairs, chosen at random."""
    n = len(gradients)
    swapped_N1 = torch.zeros(n, 1, dtype=torch.bool)
    swapped_N1[random.Random(f"shuffled {seed}").sample(range(n), n // 2)] = True

    def chosen(first: dict[str, Tensor], second: dict[str, Tensor]) -> dict[str, Tensor]:
        return {
            name: torch.where(swapped_N1.to(first[name].device), second[name], first[name])
            for name in first
        }

    hack = gradients.hack
    clean = gradients.clean
    return PairGradients(
        chosen(hack, clean), chosen(clean, hack), groups=gradients.groups, origin=gradients.origin
    )


def _clean_clean(gradients: PairGradients, seed: int) -> PairGradients:
    """Return clean sides two by two, each used once, of one group as far as possible."""
    shuffled = random.Random(f"clean-clean {seed}").sample(range(len(gradients)), len(gradients))
    ordered = sorted(
        shuffled, key=lambda index: gradients.groups[index]
    )  # stable, so random within a group
    first = ordered[0 : 2 * (len(ordered) // 2) : 2]
    second = ordered[1::2]
    if not second:
        raise UsageError("1 pair for clean-clean axes", wanted="at least two", do="use more pairs")
    clean = gradients.clean
    return PairGradients(
        {name: rows_NR[first] for name, rows_NR in clean.items()},
        {name: rows_NR[second] for name, rows_NR in clean.items()},
        groups=[gradients.groups[index] for index in first],
        origin=gradients.origin,
    )


_PAIRED = {"shuffled": _shuffled, "clean-clean": _clean_clean}
