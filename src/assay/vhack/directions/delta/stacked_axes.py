"""The axes of a basis, stacked to fit the groups of an adapter.

Axes are float64, because what is asserted about them is exact: ``V Δ = 0`` for an update that is
projected. They are few numbers, so it costs nothing. Axes that come from a float32 decomposition
are orthonormal to 1e-6; here they are made so to 1e-12 by Newton's iteration for the nearest
orthonormal frame, ``V ← (3/2 − V Vᵀ / 2) V``. It leaves zero rows zero: the rows of modules that
the basis does not have, and of axes that it has dropped.

Shapes: M modules of a group, K axes, R coordinates of δS; dimensions before M, such as one per run,
    are kept.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from assay.errors import DataError, UsageError
from assay.vhack.directions.basis.basis import Basis
from assay.vhack.directions.delta.groups import ModuleGroup

# How far from orthonormal the axes of a file may be; applied twice, Newton's iteration makes 1e-3
# into 1e-12.
_SKEW = 1e-3

_ITERATIONS = 3


def along(axes_MKR: Tensor, vectors_MR: Tensor) -> Tensor:
    """Return ``V x`` of every module, [..., M, K] float64."""
    return torch.einsum("...mkr,...mr->...mk", axes_MKR, vectors_MR.double())


def spread(axes_MKR: Tensor, coordinates_MK: Tensor) -> Tensor:
    """Return ``Vᵀ c`` of every module, [..., M, R] float64."""
    return (coordinates_MK.unsqueeze(-2) @ axes_MKR).squeeze(-2)


class StackedAxes:
    """The axes of a basis per group of an adapter; without a basis there is no axis at all.

    Attributes:
        axes: Axes per group, [M, K, R] float64; rows that stand for no axis are zero.
        has_axes: Per group, whether each module has an axis, [M] bool.

    Raises:
        UsageError: The basis has modules that the adapter lacks, or more coordinates than the
            adapter.
        DataError: The rows of the basis are not orthonormal.
    """

    def __init__(self, groups: Sequence[ModuleGroup], basis: Basis | None) -> None:
        axes = {} if basis is None else basis.axes
        module_names = {name for group in groups for name in group.names}
        unknown = [name for name in axes if name not in module_names]
        if unknown:
            raise UsageError(
                f"axes of {unknown[0]}",
                wanted="a basis of this model",
                do="extract one with this very model",
            )
        self.axes = tuple(_stack(group, axes) for group in groups)
        self.has_axes = tuple(axes_MKR.any(dim=2).any(dim=1) for axes_MKR in self.axes)

    def __bool__(self) -> bool:
        return any(axes_MKR.shape[1] for axes_MKR in self.axes)


def _stack(group: ModuleGroup, axes: dict[str, Tensor]) -> Tensor:
    """Return the axes of a group, [M, K, R] float64, orthonormal to 1e-12 or zero."""
    axes_by_index = {
        index: axes[name]
        for index, name in enumerate(group.names)
        if name in axes and axes[name].any()
    }
    most = max((len(axes_KR) for axes_KR in axes_by_index.values()), default=0)
    axes_MKR = group.left.new_zeros(len(group.names), most, group.rank, dtype=torch.float64)
    for index, axes_KR in axes_by_index.items():
        if axes_KR.shape[1] > group.rank:
            raise UsageError(
                f"axes of {group.names[index]} with {axes_KR.shape[1]} coordinates",
                wanted=f"at most {group.rank}, those of the adapter",
                do="decompose the weights with the rank of the basis",
            )
        axes_MKR[index, : len(axes_KR), : axes_KR.shape[1]] = axes_KR
    ones_MK = axes_MKR.any(dim=2).double()
    skew_M = (
        (axes_MKR @ axes_MKR.transpose(1, 2) - torch.diag_embed(ones_MK)).flatten(1).norm(dim=1)
    )
    if not bool((skew_M <= _SKEW).all()):  # NaN is not smaller either
        worst = int(skew_M.nan_to_num(torch.inf).argmax())
        raise DataError(
            f"axes of {group.names[worst]} that are {float(skew_M[worst]):.2g} away from "
            f"orthonormal",
            wanted="orthonormal rows, or zero ones",
            do="extract the basis again",
        )
    for _ in range(_ITERATIONS):
        axes_MKR = 1.5 * axes_MKR - 0.5 * (axes_MKR @ axes_MKR.transpose(1, 2)) @ axes_MKR
    return axes_MKR
