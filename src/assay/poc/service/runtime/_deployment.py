"""The model that the service runs, and the engines of it."""

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

log = structlog.get_logger("assay.engine")

KEPT = 2
"""Engines that are kept: the round's, and that of an artifact job of another shape."""

COMPILED_SHAPES = 32
"""Shapes that one process compiles. Clients choose them, and each takes seconds, and memory that is not given back."""

MakeEngine = Callable[[int, int], Engine]


@dataclass(frozen=True, kw_only=True)
class Deployment:
    """A model that is ready to run.

    Args:
        reference: Name of the model. Artifact requests must use it.
        digest: SHA-256 of its tensors.
        weights: Weight mode of the model.
        dtype: Dtype of its weights.
        max_positions: Positions of the longest sequence.
        engine: Makes an engine from ``(seq_len, batch_size)``, and raises an :class:`~assay.errors.AssayError` if that
            shape does not fit. The latest engines are kept, so that it is called once per shape.
    """

    reference: str
    digest: str
    weights: str
    dtype: str
    max_positions: int
    engine: MakeEngine

    def __post_init__(self) -> None:
        object.__setattr__(self, "engine", self.engine if isinstance(self.engine, _Latest) else _Latest(self.engine))

    @classmethod
    def of(cls, model: "Model", *, compiled: bool | None = None) -> "Deployment":
        """Deploy a loaded model on the transformers engine.

        Args:
            model: Model that is loaded and ready.
            compiled: Whether to run compiled kernels; None does what ``prove`` does.
        """
        return cls(
            reference=model.reference,
            digest=model.digest,
            weights=model.weights,
            dtype=dtype_name(model.dtype),
            max_positions=model.max_positions,
            engine=_hf_engines(model, compiled=worth_compiling(model) if compiled is None else compiled),
        )


class _Latest:
    """Keeps the latest engines, with the kernels and graphs that were made for them.

    Every stream of batches asks for its engine, and requests ask whether a shape fits, in threads of their own.
    """

    def __init__(self, make: MakeEngine) -> None:
        self._make = make
        self._lock = threading.Lock()
        self._kept: OrderedDict[tuple[int, int], Engine] = OrderedDict()

    def __call__(self, seq_len: int, batch_size: int) -> Engine:
        with self._lock:
            engine = self._kept.pop((seq_len, batch_size), None) or self._make(seq_len, batch_size)
            self._kept[seq_len, batch_size] = engine
            while len(self._kept) > KEPT:
                self._kept.popitem(last=False)
            return engine


def _hf_engines(model: "Model", *, compiled: bool) -> MakeEngine:
    """Return what makes the engines of a model. An engine compiles in its first batch, in the thread that runs it."""
    compiled_shapes: set[tuple[int, int]] = set()

    def make(seq_len: int, batch_size: int) -> HFEngine:
        known = (seq_len, batch_size) in compiled_shapes
        compiles = compiled and (known or len(compiled_shapes) < COMPILED_SHAPES)
        engine = HFEngine(model, batch_size=batch_size, seq_len=seq_len, compiled=compiles)
        if compiles and not known:
            compiled_shapes.add((seq_len, batch_size))
            log.info("the first batch compiles its kernels", seq_len=seq_len, batch_size=batch_size)
        return engine

    return make
