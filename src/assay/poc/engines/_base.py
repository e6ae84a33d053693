"""What an engine promises to the prover and the verifier.

Legend of shapes: B nonces of a batch, T positions, D hidden size, V vocabulary.
"""

from collections.abc import Generator, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from assay.poc.protocol import Fingerprint, LayerStep, Pipeline, Round

__all__ = ["Engine", "TransformingEngine"]


class Engine(Protocol):
    """A model that turns input embeddings into last hidden states, in batches of one fixed shape.

    A nonce's result must not depend on its batch mates or on its place in the batch.
    """

    @property
    def hidden_size(self) -> int:
        """D."""

    @property
    def vocab_size(self) -> int:
        """V, the rows of the trained head."""

    @property
    def num_layers(self) -> int:
        """Number of decoder layers."""

    @property
    def batch_size(self) -> int:
        """B, the fixed number of rows of a batch."""

    @property
    def seq_len(self) -> int:
        """T, the fixed number of positions."""

    @property
    def dtype(self) -> str:
        """Name of the dtype of the inputs: float32, float16 or bfloat16."""

    @property
    def device(self) -> torch.device:
        """Where the hidden states are."""

    @property
    def fingerprint(self) -> Fingerprint:
        """How this engine computes."""

    def inputs(self, round: Round, nonces: Sequence[int]) -> Tensor:
        """Return the input embeddings [B, T, D] of B nonces, in the engine's dtype."""

    def last_hidden(self, inputs_BTD: Tensor) -> Tensor:
        """Return the last token's hidden state after the final norm, [B, D] in float32."""

    def weighted_hidden(self, inputs_BTD: Tensor, weights_BT: Tensor) -> Tensor:
        """Return Σ_t w_t · h_t/(‖h_t‖ + 1e-8) of the hidden states h after the final norm, [B, D] in float32.

        The sum is :func:`assay.poc.protocol.weighted_sum`, taken where the states are. Weights are ±1, or 0 where a
        position is not read, float32 on the engine's device.
        """

    def trained_head(self, x_BD: Tensor) -> Tensor:
        """Return x Wᵀ for the model's own head matrix, [B, V] in float32; no bias, no capping of logits."""

    def between_layers(self, step: LayerStep, round: Round) -> AbstractContextManager[None]:
        """Apply a transform after every decoder layer while the context is open."""


@runtime_checkable
class TransformingEngine(Engine, Protocol):
    """An engine that takes the steps of a pipeline itself, so that no hidden state leaves its devices."""

    def outputs(self, round: Round, pipeline: Pipeline, nonces: Sequence[int]) -> Generator[NDArray[np.floating[Any]]]:
        """Yield what the pipeline publishes of the nonces in their order, ``batch_size`` of them at a time.

        Distances [B] in float32, or vectors [B, K] in float16; the last batch holds what is left. ``nonces`` may be
        longer than will ever be computed: the caller closes the iterator, and the engine drops what it has begun.
        """
