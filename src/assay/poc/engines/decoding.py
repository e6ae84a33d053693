"""What a round of decoding draws for the nonces of a batch, and what an engine that decodes does.

The prompt of a nonce is drawn, and every token is the one with the largest sum of logit and Gumbel number, which is a
sample of the model's own distribution. The numbers of a token are those of the nonce and the step, so every
validator that knows the round can say which token the model gives after any others: one forward pass over prompt and
tokens checks them all.

Legend of shapes: B nonces of a batch, P positions of the prompt, N tokens, V vocabulary, D hidden size, S sketches, K
numbers of a sketch.
"""

from collections.abc import Generator, Sequence
from typing import Literal, NamedTuple, Protocol, TypeGuard

import numpy as np
import torch
from jaxtyping import Float, Float16, Float32, Int64, UInt32
from numpy.typing import NDArray
from torch import Tensor

from assay import streams
from assay.poc.engines.base import Engine
from assay.poc.protocol.pipelines import Pipeline, sketch_steps
from assay.poc.protocol.round import Round
from assay.poc.protocol.transforms import sketch_states


class Decoded(NamedTuple):
    """What a batch of nonces publishes."""

    tokens: UInt32[np.ndarray, "B N"]
    sketches: Float16[np.ndarray, "B S K"]


class Replayed(NamedTuple):
    """What an engine says to tokens that another one decoded."""

    margins: Float32[np.ndarray, "B N"]
    """How far the score of each token is below the best one; infinite where the token is not of the vocabulary."""
    sketches: Float16[np.ndarray, "B S K"]


class DecodingEngine(Engine, Protocol):
    """An engine that takes the presets which decode as well."""

    def decoded(self, round: Round, pipeline: Pipeline, nonces: Sequence[int]) -> Generator[Decoded]:
        """Decode the tokens of nonces, ``batch_size`` of them at a time, as :meth:`Engine.outputs` does."""

    def replayed(
        self, round: Round, pipeline: Pipeline, nonces: Sequence[int], tokens_MN: NDArray[np.uint32]
    ) -> Generator[Replayed]:
        """Replay given tokens of nonces, N for each nonce, by one forward pass over prompt and tokens."""


def decodes(engine: Engine) -> TypeGuard[DecodingEngine]:
    """Return whether an engine decodes."""
    return hasattr(engine, "decoded")


def drawn_seeds(
    round: Round, stream: Literal["prompt", "tokens", "sketch"], nonces: Sequence[int], indices: range
) -> UInt32[np.ndarray, "B I"]:
    """Return the 32-bit seeds of indices of a stream of nonces, which has the 256 bits of its seed text.

    The seed of index t of the stream ``tokens`` makes the Gumbel numbers of token t, and that of the stream ``sketch``
    the projection of its state.
    """
    words_B8 = streams.seeds(round.texts(stream, nonces), 256)
    return streams.step_seeds(words_B8, np.asarray(indices))


def drawn_prompts(round: Round, nonces: Sequence[int], *, seq_len: int, vocab_size: int) -> Int64[np.ndarray, "B P"]:
    """Return the token ids of the prompts of nonces.

    The id at position i is ⌊s·V/2³²⌋ with s the seed of index i of the stream ``prompt``, in whole numbers of 64 bits.
    """
    ids_BP = drawn_seeds(round, "prompt", nonces, range(seq_len)).astype(np.uint64) * np.uint64(vocab_size)
    return (ids_BP >> np.uint64(32)).astype(np.int64)


def margins(scores_NV: Float32[Tensor, "N V"], tokens_N: Int64[Tensor, " N"]) -> Float32[Tensor, " N"]:
    """Return how far the score of every token is below the best one; infinite for an id without a token."""
    ids_N1 = tokens_N.unsqueeze(1)
    known_N1 = ids_N1 < scores_NV.shape[1]
    claimed_N1 = scores_NV.gather(1, torch.where(known_N1, ids_N1, 0)).where(known_N1, -torch.inf)
    return (scores_NV.amax(dim=1, keepdim=True) - claimed_N1).squeeze(1)


class Draws:
    """Everything that is drawn for the nonces of one batch.

    That is :func:`drawn_prompts`, and what follows from :func:`drawn_seeds`.

    Args:
        round: Round that gives the seed texts.
        pipeline: Pipeline that says how many tokens are decoded.
        nonces: Nonces of the batch, in order.
        seq_len: Number P of positions of the prompt.
        vocab_size: Number V of rows of the embedding.
        device: Device of the engine.
    """

    def __init__(
        self,
        round: Round,
        pipeline: Pipeline,
        nonces: Sequence[int],
        *,
        seq_len: int,
        vocab_size: int,
        device: torch.device,
    ) -> None:
        self._backend = streams.get_backend("auto", str(device))
        self.steps = pipeline.steps
        self.sketched = sketch_steps(pipeline.steps)
        prompts_BP = drawn_prompts(round, nonces, seq_len=seq_len, vocab_size=vocab_size)
        self.prompts_BP: Int64[Tensor, "B P"] = torch.from_numpy(prompts_BP).to(device)
        noise_BN = drawn_seeds(round, "tokens", nonces, range(self.steps))
        self._noise_BN = torch.from_numpy(noise_BN.view(np.int32)).to(device)
        self._sketch_BS = drawn_seeds(round, "sketch", nonces, self.sketched)

    def add_noise(self, logits_BV: Float32[Tensor, "B V"], step: int) -> None:
        """Add the Gumbel numbers of one step to the logits of every nonce, in place."""
        self._backend.add_gumbels(logits_BV, self._noise_BN[:, step])

    def add_noise_of(self, row: int, logits_NV: Float32[Tensor, "N V"], start: int) -> None:
        """Add the Gumbel numbers of the steps from ``start`` on to the logits of one nonce, in place."""
        self._backend.add_gumbels(logits_NV, self._noise_BN[row, start : start + len(logits_NV)])

    def sketches(self, states_BSD: Float[Tensor, "B S D"]) -> Float16[np.ndarray, "B S K"]:
        """Return the sketches of the states that gave the sketched tokens."""
        made = sketch_states(states_BSD.flatten(0, 1), self._sketch_BS.reshape(-1))
        return made.view(*states_BSD.shape[:2], -1).cpu().numpy()
