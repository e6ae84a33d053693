"""A basis of hack directions, one small set of axes per module, and the share of a gradient that lies along them.

Shapes: N samples or pairs, R coordinates of δS in a module (its rank), K axes.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from assay.errors import UsageError
from assay.vhack.basis._file import Origin, read_basis, write_basis

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from assay.models import Model


@dataclass(frozen=True, eq=False)
class Basis:
    """Hack directions of a model.

    Attributes:
        axes: Orthonormal rows that point hack-ward, [K, R] float32 per module name; unused rows are zero.
        singular_values: Singular values in falling order, [K] float32 per module name.
        votes: Numbers of pairs with a positive and with a negative component along the axis, [K, 2] int64 per module
            name.
        origin: Model, pairs and settings it was made from.
        energy: Share of ‖D‖² along each axis, [K] float32 per module name; D are the differences it was extracted
            from. The file does not hold it, so it is empty in a basis that was read from one.

    Example:
        >>> import torch
        >>> axes = {"q_proj": torch.eye(3, 8)}
        >>> basis = Basis(axes, {"q_proj": torch.ones(3)}, {"q_proj": torch.tensor([[5, 1]] * 3)})
        >>> basis.slice(2).axes["q_proj"].shape
        torch.Size([2, 8])
    """

    axes: dict[str, Tensor]
    singular_values: dict[str, Tensor]
    votes: dict[str, Tensor]
    origin: Origin = field(default_factory=Origin)
    energy: dict[str, Tensor] = field(default_factory=dict)

    @property
    def undecided(self) -> list[tuple[str, int]]:
        """Module and index of every axis whose vote is a tie, so that its orientation is arbitrary."""
        return [
            (name, index)
            for name, votes_K2 in self.votes.items()
            for index in range(len(votes_K2))
            if self.axes[name][index].any() and votes_K2[index, 0] == votes_K2[index, 1]
        ]

    def slice(self, k_use: int = 5, tau_axis: float = 0.0) -> "Basis":
        """Return the basis with the first ``k_use`` axes of every module.

        Args:
            k_use: Number of axes; a module that has fewer keeps them all.
            tau_axis: Share of the first singular value below which an axis becomes zero.

        Raises:
            UsageError: ``k_use`` is below 1, or ``tau_axis`` is outside [0, 1].
        """
        check_axis_settings(k_use, tau_axis)
        axes = {
            name: zero_weak_axes(axes_KR, self.singular_values[name], tau_axis)[:k_use]
            for name, axes_KR in self.axes.items()
        }
        values = {name: values_K[:k_use] for name, values_K in self.singular_values.items()}
        votes = {name: votes_K2[:k_use] for name, votes_K2 in self.votes.items()}
        energy = {name: shares_K[:k_use] * axes[name].any(dim=1) for name, shares_K in self.energy.items()}
        return replace(self, axes=axes, singular_values=values, votes=votes, energy=energy)

    def save(self, path: str | Path) -> None:
        """Write the basis as one safetensors file, replacing an older one in one step.

        Raises:
            StorageError: The file cannot be written.
        """
        write_basis(Path(path), self.axes, self.singular_values, self.votes, self.origin)

    @classmethod
    def load(
        cls,
        path: str | Path,
        model: "Model | PreTrainedModel | None" = None,
        *,
        expect: Mapping[str, object] | None = None,
    ) -> "Basis":
        """Return the basis in a file with all its axes; :meth:`slice` takes the first of them.

        Args:
            path: Path of the file.
            model: Model that the basis must belong to, by the digest of its weights; None skips the check, which is
                right only where no model is at hand.
            expect: Attributes of :class:`Origin` that must have these values, for instance ``{"method": "lda"}``.

        Raises:
            DataError: The file is not a basis, or was made for other weights, pairs or settings; the message names
                which.
        """
        return cls(*read_basis(Path(path), model, expect or {}))


def check_axis_settings(top_k: int, tau_axis: float) -> None:
    """Raise UsageError unless ``top_k`` is at least 1 and ``tau_axis`` in [0, 1]."""
    if top_k < 1:
        raise UsageError(f"{top_k} axes", wanted="at least 1", do="ask for 1 or more")
    if not 0 <= tau_axis <= 1:
        raise UsageError(f"tau_axis={tau_axis}", wanted="a share of the first singular value, 0 to 1", do="use 0.25")


def zero_weak_axes(axes_KR: Tensor, values_K: Tensor, tau_axis: float) -> Tensor:
    """Return the axes with zeros in the rows where ``S_i / S_0 < tau_axis``."""
    return axes_KR * (values_K >= tau_axis * values_K[:1])[:, None]


def cin(gradients_NR: Tensor, axes_KR: Tensor, two_sided: bool = False) -> Tensor:
    """Return the share of each gradient that lies along the axes of its module, [N], from 0 to 1.

    ``‖relu(V g)‖ / ‖g‖``: only what points hack-ward counts, which is what the one-sided gate removes. Two-sided it is
    ``‖V g‖ / ‖g‖``. A zero gradient has share 0.

    Args:
        gradients_NR: Gradients, one per row.
        axes_KR: Orthonormal rows; zero rows add nothing.
        two_sided: Whether both signs count.
    """
    share_N: Tensor = _along(gradients_NR, axes_KR, two_sided) / _positive(gradients_NR.norm(dim=1))
    return share_N


def _along(gradients_NR: Tensor, axes_KR: Tensor, two_sided: bool) -> Tensor:
    along_NK: Tensor = gradients_NR @ axes_KR.to(gradients_NR).T
    along_N: Tensor = (along_NK if two_sided else along_NK.relu()).norm(dim=1)
    return along_N


def _positive(lengths: Tensor) -> Tensor:
    """Return the lengths to divide by: 1 instead of 0."""
    return torch.where(lengths > 0, lengths, 1.0)


def cin_over_modules(
    gradients: Mapping[str, Tensor], basis: Basis, *, two_sided: bool = False, weighting: str = "equal"
) -> Tensor:
    """Return one number per sample over all modules of the basis, [N].

    Args:
        gradients: Gradients, [N, R] per module name; modules that the basis does not have are left out.
        basis: Basis with the axes.
        two_sided: Whether both signs count, as in :func:`cin`.
        weighting: Way of taking the mean. ``"equal"`` is the mean of cin over the modules. ``"energy"`` is
            ``√(Σ‖relu(V g)‖² / Σ‖g‖²)``, in which small modules do not count as much as large ones.

    Raises:
        UsageError: A module of the basis has no gradients, or the weighting is neither of the two.
    """
    missing = [name for name in basis.axes if name not in gradients]
    if missing or not basis.axes:
        raise UsageError(
            f"no gradients of {missing[0]}" if missing else "a basis without modules",
            wanted="gradients of every module of the basis",
            do="compute the gradients and the basis with the same model",
        )
    if weighting not in ("equal", "energy"):
        raise UsageError(f"weighting={weighting!r}", wanted="equal or energy", do="choose one of them")
    along_MN = torch.stack([_along(gradients[name], axes_KR, two_sided) for name, axes_KR in basis.axes.items()])
    lengths_MN = torch.stack([gradients[name].norm(dim=1) for name in basis.axes])
    if weighting == "equal":
        return (along_MN / _positive(lengths_MN)).mean(dim=0)
    share_N: Tensor = along_MN.norm(dim=0) / _positive(lengths_MN.norm(dim=0))
    return share_N
