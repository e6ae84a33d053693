"""The model that the service runs, and the engines of it."""

import threading
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import structlog

from assay.poc.engines.base import Engine
from assay.poc.engines.hf.block_factor import read_block_factor
from assay.poc.engines.hf.compiled_forward import worth_compiling
from assay.poc.engines.hf.engine import HFEngine
from assay.poc.protocol.blocks import BlockFactor
from assay.poc.protocol.pipelines import get_pipeline
from assay.poc.protocol.records import Record
from assay.poc.protocol.round import Input, Round
from assay.poc.prover import compute
from assay.streams.arrays import dtype_name

if TYPE_CHECKING:
    from assay.models.model import Model


log = structlog.get_logger("assay.engine")

KEPT = 2
"""Engines that are kept: the round's, and that of an artifact job of another shape."""

STATES = 64
"""Nonces whose states say how wide the distances of a block are, where no calibration does. A round
waits for them.
"""

COMPILED_SHAPES = 32
"""Shapes that one process compiles. Clients choose them, and each takes seconds, and memory that is
not given back.
"""

MakeEngine = Callable[[int, int], Engine]


@dataclass(frozen=True, kw_only=True)
class Deployment:
    """A model that is ready to run."""

    reference: str  # name of the model, which artifact requests must use
    digest: str  # SHA-256 of its tensors
    weights: str  # weight mode of the model
    dtype: str  # number format of its weights
    max_positions: int  # positions of the longest sequence
    engine: MakeEngine
    """Makes an engine from ``(seq_len, batch_size)``, once per shape, and raises an
    :class:`~assay.errors.AssayError` if that shape does not fit."""
    aliases: tuple[str, ...] = ()  # its further names, as those under which vLLM serves it
    decodes: bool = False  # whether its engines take the presets that decode
    framed: bool = False  # whether they have the frame of the checkpoint, which tokens-1 needs
    # Same model in other number formats, with which a validator computes again.
    controls: tuple["Deployment", ...] = ()

    def __post_init__(self) -> None:
        # The latest engines are kept, with the kernels and graphs that were made for them. Every
        # stream of batches asks for its engine, and requests ask whether a shape fits, in threads
        # of their own.
        cached_engine = lru_cache(KEPT)(self.engine)
        lock = threading.Lock()

        def engine(seq_len: int, batch_size: int) -> Engine:
            with lock:
                return cached_engine(seq_len, batch_size)

        object.__setattr__(self, "engine", engine)

    @classmethod
    def of(cls, model: "Model", *, compiled: bool | None = None) -> "Deployment":
        """Deploy a loaded model on transformers; ``compiled`` forces the kind of kernels."""
        return cls(
            reference=model.reference,
            digest=model.digest,
            weights=model.weights,
            dtype=model.quantised or dtype_name(model.dtype),
            max_positions=model.max_positions,
            decodes=True,
            framed=model.frame is not None,
            engine=_hf_engines(
                model, compiled=worth_compiling(model) if compiled is None else compiled
            ),
        )

    def compute(
        self,
        inputs: Sequence[Input],
        batch_size: int,
        claimed: Sequence[Record] | None = None,
    ) -> Generator[list[Record], None, None]:
        """Compute the records of inputs in their order, one list per batch of ``batch_size`` rows.

        Inputs of several rounds may stand together where they can share a batch. Tokens that were
        ``claimed`` are replayed. Nothing is made, or fails, before the first is asked for.
        """
        if not inputs:
            return
        round = inputs[0].round
        engine = self.engine(round.seq_len, batch_size)
        yield from compute(engine, get_pipeline(round.preset), inputs, claimed)

    def block_factor(self, round: Round, batch_size: int) -> BlockFactor | None:
        """Measure the factor of a round's block; None where states cannot be read."""
        engine = self.engine(round.seq_len, batch_size)
        return read_block_factor(engine, round, nonces=STATES) if type(engine) is HFEngine else None


def _hf_engines(model: "Model", *, compiled: bool) -> MakeEngine:
    """Return what makes the engines of a model. An engine compiles in its first batch, in the
    thread that runs it.
    """
    compiled_shapes: set[tuple[int, int]] = set()

    def make(seq_len: int, batch_size: int) -> HFEngine:
        is_compiled = (seq_len, batch_size) in compiled_shapes
        compiles = compiled and (is_compiled or len(compiled_shapes) < COMPILED_SHAPES)
        engine = HFEngine(model, batch_size=batch_size, seq_len=seq_len, compiled=compiles)
        if compiles and not is_compiled:
            compiled_shapes.add((seq_len, batch_size))
            log.info("the first batch compiles its kernels", seq_len=seq_len, batch_size=batch_size)
        return engine

    return make
