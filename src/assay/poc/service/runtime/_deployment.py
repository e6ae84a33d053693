"""What the service runs: one model, and how to make an engine of a given shape for it."""

import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import structlog

from assay.poc.engines import Engine
from assay.poc.engines.hf import HFEngine, worth_compiling
from assay.streams import dtype_name

if TYPE_CHECKING:
    from assay.models import Model

__all__ = ["Deployment"]

log = structlog.get_logger("assay.engine")

KEPT = 2
"""Engines that are kept: the round's, and that of an artifact job of another shape."""

COMPILED_SHAPES = 32
"""Shapes that one process compiles. Clients choose them, and each takes seconds, and memory that is not given back."""


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
    def of(cls, model: "Model", *, compiled: bool | None = None) -> "Deployment":
        """Deploy a loaded model on the transformers engine.

        Args:
            model: the model.
            compiled: run compiled kernels; None does what ``prove`` does, see :func:`worth_compiling`.
        """
        return cls(
            reference=model.reference,
            digest=model.digest,
            weights=model.weights,
            dtype=dtype_name(model.dtype),
            max_positions=model.max_positions,
            engine=_Engines(model, compiled=worth_compiling(model) if compiled is None else compiled),
        )


class _Engines:
    """Makes the engines of a model. The latest are kept, with the kernels and graphs that were made for them.

    Every stream of batches asks for its engine, and requests ask whether a shape fits, in threads of their own.
    Nothing is compiled here: an engine does that in its first batch, in the thread that runs it.
    """

    def __init__(self, model: "Model", *, compiled: bool) -> None:
        self._model, self._compiled = model, compiled
        self._lock = threading.Lock()
        self._kept: OrderedDict[tuple[int, int], HFEngine] = OrderedDict()
        self._shapes: set[tuple[int, int]] = set()

    def __call__(self, seq_len: int, batch_size: int) -> HFEngine:
        """Return the engine of a shape.

        Raises:
            UsageError: the shape is out of range.
            OutOfMemory: a batch of it does not fit.
        """
        shape = (seq_len, batch_size)
        with self._lock:
            engine = self._kept.pop(shape, None) or self._make(shape)
            self._kept[shape] = engine
            while len(self._kept) > KEPT:
                self._kept.popitem(last=False)
            return engine

    def _make(self, shape: tuple[int, int]) -> HFEngine:
        seq_len, batch_size = shape
        known = shape in self._shapes
        compiled = self._compiled and (known or len(self._shapes) < COMPILED_SHAPES)
        engine = HFEngine(self._model, batch_size=batch_size, seq_len=seq_len, compiled=compiled)
        if compiled and not known:
            self._shapes.add(shape)
            log.info("the first batch compiles its kernels", seq_len=seq_len, batch_size=batch_size)
        return engine
