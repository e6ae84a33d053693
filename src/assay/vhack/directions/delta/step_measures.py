"""The axes of a basis, stacked to fit the groups of an adapter, and what a step did along them.

    cin           ‖relu(V g)‖ / ‖g‖ of the gradient before a gate, cout of the one after it
    leak          ‖relu(−V Δ)‖ / ‖Δ‖ of the update Δ that the optimizer made: the honest cout
    displacement  V (δS − δS_0): how far δS went and in which direction; + is away from the hack

The shares are means over the modules that have axes. Two-sided shares have ‖V x‖ instead of
‖relu(V x)‖.

Axes are float64, because what is asserted about them is exact: ``V Δ = 0`` for an update that is
projected. They are few numbers, so it costs nothing. Axes that come from a float32 decomposition
are orthonormal to 1e-6; here they are made so to 1e-12 by Newton's iteration for the nearest
orthonormal frame, ``V ← (3/2 − V Vᵀ / 2) V``. It leaves zero rows zero: the rows of modules that
the basis does not have, and of axes that it has dropped.

Shapes: M modules of a group, K axes, R coordinates of δS; dimensions before M, such as one per run,
    are kept.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from assay.errors import DataError, UsageError
from assay.vhack.directions.basis.basis import Basis
from assay.vhack.directions.delta.groups import ModuleGroup

_SHARE = ("", "_two_sided")

# How far from orthonormal the axes of a file may be; applied twice, Newton's iteration makes 1e-3
# into 1e-12.
_SKEW = 1e-3
_ITERATIONS = 3


@dataclass(frozen=True, eq=False)
class StepMeasures:
    """The numbers of one step by name, as scalar tensors that stay on their device."""

    tensors: dict[str, Tensor]

    def as_dict(self) -> dict[str, float]:
        """Return the numbers, copied from the device at once: one wait for it per step, or none."""
        values = torch.stack(list(self.tensors.values())).tolist() if self.tensors else []
        return dict(zip(self.tensors, values, strict=True))


def measure_shares(
    name: str, vectors: Iterable[tuple[Tensor, Tensor, Tensor]]
) -> dict[str, Tensor]:
    """Return one- and two-sided shares of gradients along the axes.

    Each group gives vectors [..., M, R], axes [..., M, K, R] and whether a module has axes, [...,
    M]; shares have the dimensions before M.
    """
    # Sums over modules: one-sided share, two-sided share, 1.
    sums = []
    for vectors_MR, axes_MKR, has_M in vectors:
        hackward_MK = along(axes_MKR, vectors_MR)
        size_M = vectors_MR.double().norm(dim=-1)
        lengths_2M = torch.stack([hackward_MK.relu().norm(dim=-1), hackward_MK.norm(dim=-1)])
        shares_2M = lengths_2M / torch.where(size_M > 0, size_M, 1.0)
        parts_3M = torch.cat([shares_2M, torch.ones_like(size_M)[None]])
        sums.append((parts_3M * has_M).sum(dim=-1))
    *shares, count = torch.stack(sums).sum(dim=0) if sums else torch.zeros(3, dtype=torch.float64)
    return {
        name + suffix: share / count.clamp_min(1)
        for suffix, share in zip(_SHARE, shares, strict=True)
    }


def measure_displacement(moved: Iterable[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """Return sum, norm and farthest hack-ward place of δS along the axes.

    Each group gives δS − δS_0 [..., M, R] and axes [..., M, K, R]; the numbers have the dimensions
    before M.
    """
    coordinates_MK = torch.cat(
        [along(axes_MKR, moved_MR).flatten(-2) for moved_MR, axes_MKR in moved], dim=-1
    )
    sums = torch.stack([coordinates_MK.sum(dim=-1), (coordinates_MK**2).sum(dim=-1)])
    farthest = (
        (-coordinates_MK).amax(dim=-1).clamp_min(0)
        if coordinates_MK.shape[-1]
        else torch.zeros_like(sums[0])
    )
    return {
        "displacement": sums[0],
        "displacement_norm": sums[1].sqrt(),
        "displacement_hackward": farthest,
    }


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
        if unknown := [name for name in axes if name not in module_names]:
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
    wanted_MKK = torch.diag_embed(axes_MKR.any(dim=2).double())
    skew_M = (axes_MKR @ axes_MKR.transpose(1, 2) - wanted_MKK).flatten(1).norm(dim=1)
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
