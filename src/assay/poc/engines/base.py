"""What every engine does for the prover, the verifier and the service, and the inputs that all of them make.

Legend of shapes: B nonces of a batch, T positions, D hidden size, V vocabulary, K length of a vector.
"""

from collections.abc import Callable, Generator, Sequence
from typing import Any, Protocol

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from assay import streams
from assay.errors import UsageError
from assay.poc.protocol.pipelines import PIPELINES, Pipeline
from assay.poc.protocol.record import Fingerprint
from assay.poc.protocol.round import Round
from assay.streams.backends import as_tensor

MAX_BATCH = 65_536


class Engine(Protocol):
    """A model that turns nonces into the values that a pipeline publishes, in batches of one fixed shape.

    A nonce's result must not depend on the other nonces of its batch or on its place among them.
    """

    hidden_size: int
    """D."""
    vocab_size: int
    """V, the number of rows of the trained head."""
    batch_size: int
    """B, the number of nonces that are handed out at a time."""
    seq_len: int
    """T, the fixed number of positions of every nonce."""
    dtype: str
    """Name of the dtype of the inputs: float32, float16 or bfloat16."""

    @property
    def fingerprint(self) -> Fingerprint:
        """How this engine computes."""

    def supports(self, pipeline: Pipeline) -> bool:
        """Return whether this engine can take every step of a pipeline."""

    def outputs(self, round: Round, pipeline: Pipeline, nonces: Sequence[int]) -> Generator[NDArray[np.floating[Any]]]:
        """Yield what the pipeline publishes for the nonces, in their order, ``batch_size`` of them at a time.

        Distances [B] in float32, or vectors [B, K] in float16; the last batch holds the rest. ``nonces`` may be
        longer than will ever be computed: the caller closes the iterator, and the engine drops what it has begun.
        """


def check_supported(engine: Engine, pipeline: Pipeline) -> None:
    """Refuse a pipeline with a step that an engine cannot take.

    Raises:
        UsageError: Names the presets that the engine supports.
    """
    if not engine.supports(pipeline):
        raise unsupported(pipeline, engine.fingerprint.engine, engine.supports)


def unsupported(pipeline: Pipeline, engine: str, supports: Callable[[Pipeline], bool]) -> UsageError:
    """Return the refusal of a pipeline on an engine of that name, which names the presets that it supports."""
    supported = [name for name, known in PIPELINES.items() if supports(known)]
    return UsageError(
        f"preset {pipeline.name} on the {engine} engine",
        wanted=f"one of {', '.join(supported)}",
        do="choose one of them with --preset, or use --engine hf in one process",
    )


def check_batch_size(batch_size: int) -> None:
    """Refuse a batch size that is not a number from 1 to 65 536."""
    if type(batch_size) is not int or not 1 <= batch_size <= MAX_BATCH:
        raise UsageError(f"batch size {batch_size!r}", wanted=f"1 to {MAX_BATCH}", do="try --batch-size 32")


def noise_inputs(
    backend: streams.Backend, round: Round, nonces: Sequence[int], *, seq_len: int, hidden_size: int, dtype: str
) -> Float[Tensor, "B T D"]:
    """Return the input embeddings [B, T, D] of B nonces, N(0, 1) in the given dtype, on the device of the backend."""
    seeds_BS = streams.seeds(round.texts("inputs", nonces), round.strength)
    values = backend.normals(seeds_BS, seq_len * hidden_size, dtype)
    return as_tensor(values).view(len(nonces), seq_len, hidden_size)
