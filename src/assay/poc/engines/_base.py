"""What every engine does for the prover, the verifier and the service.

Legend of shapes: B nonces of a batch, T positions, D hidden size, V vocabulary, K length of a vector.
"""

from collections.abc import Generator, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from assay.errors import UsageError
from assay.poc.protocol import PIPELINES, Fingerprint, Pipeline, Round


class Engine(Protocol):
    """A model that turns nonces into the values that a pipeline publishes, in batches of one fixed shape.

    A nonce's result must not depend on the other nonces of its batch or on its place among them.
    """

    @property
    def hidden_size(self) -> int:
        """D."""

    @property
    def vocab_size(self) -> int:
        """V, the number of rows of the trained head."""

    @property
    def batch_size(self) -> int:
        """B, the number of nonces that are handed out at a time."""

    @property
    def seq_len(self) -> int:
        """T, the fixed number of positions of every nonce."""

    @property
    def dtype(self) -> str:
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
        UsageError: names the presets that the engine supports.
    """
    if not engine.supports(pipeline):
        supported = [name for name, known in PIPELINES.items() if engine.supports(known)]
        raise UsageError(
            f"preset {pipeline.name} on the {engine.fingerprint.engine} engine",
            wanted=f"one of {', '.join(supported)}",
            do="choose one of them with --preset, or use --engine hf",
        )
