"""A basis of hack directions: one small set of axes per weight matrix of a model."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors.torch import save
from torch import Tensor

from assay.files.storage import write_atomic
from assay.models.model import Model
from assay.vhack.directions.gradients.targets import target_modules, weights_digest

if TYPE_CHECKING:
    from transformers import PreTrainedModel
from assay.vhack.directions.basis.axes import check_axis_settings, zero_weak_axes
from assay.vhack.directions.basis.basis_file import (
    VALUES_PREFIX,
    basis_metadata,
    read_basis,
    stale_basis,
)
from assay.vhack.directions.basis.origin import Origin


@dataclass(frozen=True, eq=False)
class Basis:
    """Hack directions of a model.

    Attributes:
        axes: Orthonormal rows that point hack-ward, [K, R] float32 per module name; unused rows are
            zero.
        singular_values: Singular values in falling order, [K] float32 per module name.
        votes: Numbers of pairs with a positive and with a negative component along the axis, [K, 2]
            int64 per module name.
        origin: Model, pairs and settings it was made from.

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

    @property
    def undecided(self) -> list[tuple[str, int]]:
        """Module and index of every axis whose vote is a tie, so that its sign is arbitrary."""
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
        return replace(self, axes=axes, singular_values=values, votes=votes)

    def save(self, path: str | Path) -> None:
        """Write the basis as one safetensors file, replacing an older one in one step.

        Raises:
            StorageError: The file cannot be written.
        """
        tensors = {name: axes_KR.contiguous() for name, axes_KR in self.axes.items()}
        tensors |= {
            VALUES_PREFIX + name: values_K.contiguous()
            for name, values_K in self.singular_values.items()
        }
        write_atomic(path, save(tensors, metadata=basis_metadata(self.votes, self.origin)))

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
            model: Model that the basis must belong to, by the digest of its weights; None skips the
                check, which is right only where no model is at hand.
            expect: Attributes of :class:`Origin` that must have these values, for instance
                ``{"method": "lda"}``.

        Raises:
            DataError: The file is not a basis, or was made for other weights, pairs or settings;
                the message names which.
        """
        basis = cls(*read_basis(path))
        if model is not None:
            basis.check_model(model, name=str(path))
        for name, wanted in (expect or {}).items():
            seen = getattr(basis.origin, name)
            if seen != wanted and name == "given":
                raise stale_basis(path, "pairs", "another set of them", "the pairs it is asked for")
            if seen != wanted:
                raise stale_basis(path, name, repr(seen), repr(wanted))
        return basis

    def check_model(self, model: "Model | PreTrainedModel", *, name: str = "the basis") -> None:
        """Refuse a model with other modules, or another digest of its weights.

        Args:
            model: Model to check.
            name: What the error calls the basis.

        Raises:
            DataError: The model has other modules or weights.
        """
        modules = target_modules(model)
        for module, axes_KR in self.axes.items():
            if module not in modules or axes_KR.shape[1] > min(modules[module].weight.shape):
                raise stale_basis(
                    name,
                    "model",
                    f"axes of {module} with {axes_KR.shape[1]} coordinates",
                    "the model's modules",
                )
        digest = weights_digest(model)
        if self.origin.weights != digest:
            raise stale_basis(
                name, "weights", self.origin.weights[:16] or "none", f"weights {digest[:16]}"
            )

    def check_template(self, digest: str, *, name: str = "the basis") -> None:
        """Raise a DataError if another chat template rendered the pairs.

        An empty digest stands for no template, and is never refused.
        """
        digest_of_pairs = self.origin.chat_template
        if digest_of_pairs and digest and digest_of_pairs != digest:
            raise stale_basis(
                name, "chat template", digest_of_pairs[:16], f"the chat template {digest[:16]}"
            )
