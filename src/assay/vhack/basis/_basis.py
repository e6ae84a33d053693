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
from assay.vhack.basis._file import read_basis, write_basis
from assay.vhack.basis._origin import Origin

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from assay.models import Model

__all__ = ["Basis", "cin", "cin_over_modules"]


@dataclass(frozen=True, eq=False)
class Basis:
    """The hack directions of a model.

    Attributes:
        axes: per module name, [K, R] float32, orthonormal rows that point hack-ward; unused rows are zero.
        singular_values: per module name, [K] float32, falling.
        votes: per module name, [K, 2] int64: pairs with a positive and with a negative component along the axis.
        origin: Model, pairs and settings it was made from.
        energy: Per module name, [K] float32: share of ‖D‖² that lies along each axis, D being the differences it was
            extracted from. The file does not hold it, so it is empty in a basis that was read from one.
    """

    axes: dict[str, Tensor]
    singular_values: dict[str, Tensor]
    votes: dict[str, Tensor]
    origin: Origin = field(default_factory=Origin)
    energy: dict[str, Tensor] = field(default_factory=dict)

    @property
    def confidence(self) -> dict[str, Tensor]:
        """Per module name, [K] float32: the share of the pairs on the majority's side, 0.5 for a tie or no vote."""
        return {name: _majority(votes_K2) for name, votes_K2 in self.votes.items()}

    @property
    def undecided(self) -> list[tuple[str, int]]:
        """Module and index of every axis whose vote is a tie: which way it points is an accident."""
        return [
            (name, index)
            for name, votes_K2 in self.votes.items()
            for index in range(len(votes_K2))
            if self.axes[name][index].any() and votes_K2[index, 0] == votes_K2[index, 1]
        ]

    def slice(self, k_use: int = 5, tau_axis: float = 0.0, *, decided_only: bool = False) -> "Basis":
        """The first ``k_use`` axes of every module.

        Args:
            k_use: how many axes; a module that has fewer keeps what it has.
            tau_axis: axes with ``S_i / S_0`` below this become zero.
            decided_only: axes whose vote is a tie become zero.

        Raises:
            UsageError: ``k_use`` is below 1, or ``tau_axis`` is outside [0, 1].
        """
        check_axis_settings(k_use, tau_axis)
        drop = set(self.undecided) if decided_only else set()
        axes = {}
        for name, axes_KR in self.axes.items():
            kept_KR = zero_weak_axes(axes_KR, self.singular_values[name], tau_axis)[:k_use]
            keep_K = torch.tensor([(name, index) not in drop for index in range(len(kept_KR))])
            axes[name] = kept_KR * keep_K[:, None]
        values = {name: values_K[:k_use] for name, values_K in self.singular_values.items()}
        votes = {name: votes_K2[:k_use] for name, votes_K2 in self.votes.items()}
        energy = {name: shares_K[:k_use] * axes[name].any(dim=1) for name, shares_K in self.energy.items()}
        return replace(self, axes=axes, singular_values=values, votes=votes, energy=energy)

    def save(self, path: str | Path) -> None:
        """Write the basis as one safetensors file, replacing an older one in one step.

        The format is described in :mod:`assay.vhack.basis._file`.

        Raises:
            StorageError: the file cannot be written.
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
    """The axes, with zeros in the rows where ``S_i / S_0 < tau_axis``."""
    return axes_KR * (values_K >= tau_axis * values_K[:1])[:, None]


def _majority(votes_K2: Tensor) -> Tensor:
    total_K = votes_K2.sum(dim=1)
    return torch.where(total_K > 0, votes_K2.amax(dim=1) / total_K.clamp_min(1), 0.5)


def cin(gradients_NR: Tensor, axes_KR: Tensor, two_sided: bool = False) -> Tensor:
    """The share of each gradient that lies along the axes of its module, [N], from 0 to 1.

    ``‖relu(V g)‖ / ‖g‖``: only what points hack-ward counts, which is what the one-sided gate removes. Two-sided it is
    ``‖V g‖ / ‖g‖``. A zero gradient has share 0.

    Args:
        gradients_NR: one gradient per row.
        axes_KR: orthonormal rows; zero rows add nothing.
        two_sided: count both ways.
    """
    share_N: Tensor = _along(gradients_NR, axes_KR, two_sided) / _lengths(gradients_NR)
    return share_N


def _along(gradients_NR: Tensor, axes_KR: Tensor, two_sided: bool) -> Tensor:
    along_NK: Tensor = gradients_NR @ axes_KR.to(gradients_NR).T
    along_N: Tensor = (along_NK if two_sided else along_NK.relu()).norm(dim=1)
    return along_N


def _lengths(gradients_NR: Tensor) -> Tensor:
    lengths_N = gradients_NR.norm(dim=1)
    return torch.where(lengths_N > 0, lengths_N, 1.0)


def cin_over_modules(
    gradients: Mapping[str, Tensor], basis: Basis, *, two_sided: bool = False, weighting: str = "equal"
) -> Tensor:
    """One number per sample over all modules of the basis, [N].

    Args:
        gradients: per module name, [N, R]; modules that the basis does not have are left out.
        basis: the axes.
        two_sided: as in :func:`cin`.
        weighting: ``"equal"`` is the mean of cin over the modules. ``"energy"`` is
            ``√(Σ‖relu(V g)‖² / Σ‖g‖²)``, in which small modules do not count as much as large ones.

    Raises:
        UsageError: a module of the basis has no gradients, or the weighting is neither of the two.
    """
    missing = [name for name in basis.axes if name not in gradients]
    if missing or not basis.axes:
        raise UsageError(
            f"no gradients of {missing[0]}" if missing else "a basis without modules",
            wanted="gradients of every module of the basis",
            do="compute the gradients and the basis with the same model",
        )
    if weighting == "equal":
        return torch.stack([cin(gradients[name], axes, two_sided) for name, axes in basis.axes.items()]).mean(dim=0)
    if weighting == "energy":
        along = torch.stack([_along(gradients[name], axes, two_sided) for name, axes in basis.axes.items()])
        total = torch.stack([gradients[name].norm(dim=1) for name in basis.axes])
        share_N: Tensor = along.norm(dim=0) / _lengths(total.T)
        return share_N
    raise UsageError(f"weighting={weighting!r}", wanted="equal or energy", do="choose one of them")
