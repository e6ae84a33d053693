"""What the service runs: one model, and how to make an engine of a given shape for it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from assay.poc.engines import Engine, HFEngine

if TYPE_CHECKING:
    from assay.models import Model

__all__ = ["Deployment"]


@dataclass(frozen=True, kw_only=True)
class Deployment:
    """A model that is ready to run.

    Args:
        reference: how the model is called; artifact requests must name it.
        digest: SHA-256 of its tensors.
        weights: its weight mode.
        dtype: dtype of its weights.
        max_positions: the longest sequence.
        engine: makes an engine from ``(seq_len, batch_size)``; raises an error of assay where that does not fit.
    """

    reference: str
    digest: str
    weights: str
    dtype: str
    max_positions: int
    engine: Callable[[int, int], Engine]

    @classmethod
    def of(cls, model: "Model") -> "Deployment":
        """Deploy a loaded model on the transformers engine."""
        return cls(
            reference=model.reference,
            digest=model.digest,
            weights=model.weights,
            dtype=str(model.dtype).removeprefix("torch."),
            max_positions=model.max_positions,
            engine=lambda seq_len, batch_size: HFEngine(model, batch_size=batch_size, seq_len=seq_len),
        )
