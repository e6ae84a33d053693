"""What every engine does for the prover, the verifier and the service, and what is drawn for its
nonces.

Presets that decode draw the prompt of a nonce, and every token is the one with the largest sum of
logit and Gumbel number, which is a sample of the model's own distribution. The numbers of a token
are those of the nonce and the step, so every validator that knows the round can say which token the
model gives after any others: one forward pass over prompt and tokens checks them all.

Legend of shapes: B nonces of a batch, T positions, P positions of a prompt, N tokens, D hidden
size, V vocabulary, S sketches, K length of a vector or sketch.
"""

from collections.abc import Generator, Iterator, Sequence
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import torch
from jaxtyping import Float, Float16, Float32, Int32, Int64, UInt32
from numpy.typing import NDArray
from torch import Tensor

from assay import streams
from assay.models.device import to_device
from assay.models.frame import Frame
from assay.poc.protocol.pipelines import Pipeline, unsupported
from assay.poc.protocol.proof import Fingerprint
from assay.poc.protocol.round import Round
from assay.streams.arrays import as_tensor


class Decoded(NamedTuple):
    """What a batch of nonces publishes."""

    tokens: UInt32[np.ndarray, "B N"]
    sketches: Float16[np.ndarray, "B S K"]


class Replayed(NamedTuple):
    """What an engine says to tokens that another one decoded."""

    margins: Float32[np.ndarray, "B N"]
    """How far the score of each token is below the best one; infinite where the token is not of the
    vocabulary.
    """
    sketches: Float16[np.ndarray, "B S K"]


class Engine(Protocol):
    """A model that turns nonces into the values that a pipeline publishes, in batches of one fixed
    shape.

    A nonce's result must not depend on the other nonces of its batch or on its place among them.
    """

    hidden_size: int  # D
    vocab_size: int  # V, the number of rows of the trained head
    batch_size: int  # B, the number of nonces that are handed out at a time
    seq_len: int  # T, the fixed number of positions of every nonce
    dtype: str  # name of the dtype of the inputs: float32, float16 or bfloat16
    frame: Frame | None  # of the checkpoint, for the pipelines that need it

    @property
    def fingerprint(self) -> Fingerprint:
        """How this engine computes."""

    def supports(self, pipeline: Pipeline) -> bool:
        """Return whether this engine can take every step of a pipeline."""

    def outputs(
        self, round: Round, pipeline: Pipeline, nonces: Sequence[int]
    ) -> Generator[NDArray[np.floating[Any]]]:
        """Yield what the pipeline publishes for the nonces, in their order, ``batch_size`` of them
        at a time.

        Distances [B] in float32, or vectors [B, K] in float16; the last batch holds the rest.
        ``nonces`` may be longer than will ever be computed: the caller closes the iterator, and the
        engine drops what it has begun.

        Raises:
            UsageError: The engine cannot take a step of the pipeline, or a nonce is longer than it
                takes.
            BadWeights: The model returned NaN or infinity. On CUDA such a nonce is NaN instead.
            OutOfMemory: The device ran out of memory.
            ModelError: This architecture cannot be run on input embeddings, or vLLM did not run a
                nonce.
            EngineEnded: The engine, or another process of it, has ended.
        """

    def decoded(
        self, round: Round, pipeline: Pipeline, nonces: Sequence[int]
    ) -> Generator[Decoded]:
        """Decode the tokens of nonces, ``batch_size`` of them at a time, as :meth:`outputs` does.

        On transformers the kernels are those of eager torch, whether the engine was compiled or
        not.
        """

    def replayed(
        self, round: Round, pipeline: Pipeline, nonces: Sequence[int], tokens_MN: NDArray[np.uint32]
    ) -> Generator[Replayed]:
        """Replay given tokens of nonces, [M, N], each by one forward pass over prompt and
        tokens.
        """


def check_supported(engine: Engine, pipeline: Pipeline) -> None:
    """Refuse a pipeline with a step that an engine cannot take; a UsageError names the presets that
    it supports.
    """
    if not engine.supports(pipeline):
        raise unsupported(pipeline, engine.fingerprint.engine, engine.supports)


def noise_inputs(
    backend: streams.Backend,
    round: Round,
    nonces: Sequence[int],
    *,
    seq_len: int,
    hidden_size: int,
    dtype: str,
) -> Float[Tensor, "B T D"]:
    """Return the input embeddings [B, T, D] of B nonces, N(0, 1) in the given dtype, on the device
    of the backend.
    """
    seeds_BS = streams.seeds(round.texts("inputs", nonces), round.strength)
    values = backend.normals(seeds_BS, seq_len * hidden_size, dtype)
    return as_tensor(values).view(len(nonces), seq_len, hidden_size)


class HostCopy:
    """Values on their way from a device to the host, made on the stream whose work computes
    them.
    """

    def __init__(self, values: Tensor) -> None:
        self._host = values
        self._done = None
        if values.is_cuda:
            self._host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._host.copy_(values, non_blocking=True)
            self._done = torch.cuda.current_stream(values.device).record_event()

    def numpy(self) -> NDArray[Any]:
        """Wait for the values, and return them; an error of the device comes up here."""
        if self._done is not None:
            self._done.synchronize()
        return self._host.numpy().copy()  # other values will land in this memory


def padded_batches(nonces: Sequence[int], size: int, rows: int) -> Iterator[tuple[int, list[int]]]:
    """Yield the number of nonces of every batch, and the batch padded to its fixed number of
    rows.
    """
    for start in range(0, len(nonces), size):
        wanted = list(nonces[start : start + size])
        yield len(wanted), wanted + wanted[-1:] * (rows - len(wanted))


def drawn_seeds(
    round: Round,
    stream: Literal["prompt", "tokens", "sketch"],
    nonces: Sequence[int],
    indices: range,
) -> UInt32[np.ndarray, "B I"]:
    """Return the 32-bit seeds of indices of a stream of nonces, which has the 256 bits of its seed
    text.

    The seed of index t of the stream ``tokens`` makes the Gumbel numbers of token t, and that of
    the stream ``sketch`` the projection of its state.
    """
    words_B8 = streams.seeds(round.texts(stream, nonces), 256)
    return streams.step_seeds(words_B8, np.asarray(indices))


def drawn_prompts(
    round: Round, nonces: Sequence[int], *, seq_len: int, vocab_size: int
) -> Int64[np.ndarray, "B P"]:
    """Return the token ids of the prompts of nonces.

    The id at position i is ⌊s·V/2³²⌋ with s the seed of index i of the stream ``prompt``, in whole
    numbers of 64 bits.
    """
    ids_BP = drawn_seeds(round, "prompt", nonces, range(seq_len)).astype(np.uint64) * np.uint64(
        vocab_size
    )
    return (ids_BP >> np.uint64(32)).astype(np.int64)


def margins(
    scores_NV: Float32[Tensor, "N V"], tokens_N: Int64[Tensor, " N"]
) -> Float32[Tensor, " N"]:
    """Return how far the score of every token is below the best one; infinite for an id without a
    token.
    """
    ids_N1 = tokens_N.unsqueeze(1)
    known_N1 = ids_N1 < scores_NV.shape[1]
    claimed_N1 = scores_NV.gather(1, torch.where(known_N1, ids_N1, 0)).where(known_N1, -torch.inf)
    return (scores_NV.amax(dim=1, keepdim=True) - claimed_N1).squeeze(1)


def token_inputs(
    round: Round, frame: Frame, nonces: Sequence[int], *, seq_len: int
) -> Int64[np.ndarray, "B T"]:
    """Return the token ids of nonces whose inputs are tokens, of the seeds of the stream
    ``prompt``.
    """
    return frame.tokens(drawn_seeds(round, "prompt", nonces, range(seq_len)))


def device_tokens(
    backend: streams.Backend, round: Round, frame: Frame, nonces: Sequence[int], *, seq_len: int
) -> Int32[Tensor, " N"]:
    """Return the ids of :func:`token_inputs` in one row, made on the device of the backend, without
    waiting for it.

    For 64 nonces of 256 positions numpy takes 1.2 ms on the host of an H100, 6 % of a pass of a
    small model.
    """
    device = torch.device(backend.device)
    words_B8 = to_device(streams.seeds(round.texts("prompt", nonces), 256).view(np.int32), device)
    steps_N = torch.arange(seq_len, device=device).repeat(len(nonces))
    seeds_N = backend.row_seeds(words_B8.repeat_interleave(seq_len, dim=0), steps_N).view(
        torch.int32
    )
    places_N = ((seeds_N.long() & 0xFFFFFFFF) * frame.drawn) >> 32
    return (
        places_N + torch.searchsorted(to_device(frame.before, device), places_N, right=True)
    ).int()
