"""What every engine does for prover, verifier and service, and what is drawn for its inputs.

Presets that decode draw the prompt of a nonce, and every token is the one with the largest sum of
logit and Gumbel number, which is a sample of the model's own distribution. The numbers of a token
are those of the nonce and the step, so every validator that knows the round can say which token the
model gives after any others: one forward pass over prompt and tokens checks them all.

Legend of shapes: B nonces of a batch, T positions, P positions of a prompt, N tokens, D hidden
size, V vocabulary, S sketches, K length of a vector or sketch.
"""

from collections.abc import Generator, Iterator, Mapping, Sequence
from typing import Any, Literal, Protocol

import numpy as np
import torch
from jaxtyping import Float, Float32, Int32, Int64, UInt32
from numpy.typing import NDArray
from torch import Tensor

from assay import streams
from assay.models.device import to_device
from assay.models.frame import Frame
from assay.poc.protocol.fingerprint import Fingerprint
from assay.poc.protocol.pipelines import Pipeline, unsupported
from assay.poc.protocol.round import Input, seed_texts
from assay.streams.arrays import as_tensor

Values = Mapping[str, NDArray[Any]]
"""What a batch of B inputs gives, by name: one row of every array for each input.

A preset publishes ``distance`` [B] in float32, ``vector`` [B, K] in float16, or ``tokens`` [B, N]
in uint32 with ``sketches`` [B, S, K] in float16. A replay of claimed tokens gives ``margins``
[B, N] in float32 and ``sketches``: how far the score of each claimed token is below the best one,
infinite where the token is not of the vocabulary.
"""


class Engine(Protocol):
    """A model that computes what a preset publishes, in batches of one fixed shape.

    The result of an input must not depend on the other inputs of its batch, or on its place.
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

    def run(
        self,
        inputs: Sequence[Input],
        pipeline: Pipeline,
        claimed_MN: NDArray[Any] | None = None,
    ) -> Generator[Values]:
        """Yield what the pipeline publishes for the inputs, ``batch_size`` of them at a time.

        The last batch holds the rest. ``inputs`` may be longer than will ever be computed: the
        caller closes the iterator, and the engine drops what it has begun. A pipeline that decodes
        takes the kernels of eager torch on transformers, whether the engine was compiled or not.

        Args:
            inputs: Inputs that may share a batch, by :func:`group_inputs`; vLLM takes those of one
                round only.
            pipeline: Preset, or a pipeline of one's own.
            claimed_MN: Tokens that another engine decoded for the M inputs, or points of their
                chains. They are replayed by one forward pass instead of being decoded again.

        Raises:
            UsageError: The engine cannot take a step of the pipeline, or an input is longer than it
                takes.
            BadWeights: The model returned NaN or infinity. On CUDA such a nonce is NaN instead.
            OutOfMemory: The device ran out of memory.
            ModelError: This architecture cannot be run on input embeddings, or vLLM did not run a
                nonce.
            EngineEnded: The engine, or another process of it, has ended.
        """


def check_supported(engine: Engine, pipeline: Pipeline) -> None:
    """Refuse a pipeline step that an engine lacks; the UsageError names supported presets."""
    if not engine.supports(pipeline):
        raise unsupported(pipeline, engine.fingerprint.engine, engine.supports)


def noise_inputs(
    backend: streams.Backend,
    inputs: Sequence[Input],
    *,
    seq_len: int,
    hidden_size: int,
    dtype: str,
) -> Float[Tensor, "B T D"]:
    """Return the input embeddings [B, T, D], N(0, 1) in the given dtype, on the backend's
    device.
    """
    seeds_BS = streams.seeds(seed_texts(inputs, "inputs"), inputs[0].round.strength)
    values = backend.normals(seeds_BS, seq_len * hidden_size, dtype)
    return as_tensor(values).view(len(inputs), seq_len, hidden_size)


class HostCopy:
    """Values on their way from a device to the host, on the stream that computes them."""

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
        # Other values will land in this memory.
        return self._host.numpy().copy()


def padded_batches(
    inputs: Sequence[Input], size: int, rows: int
) -> Iterator[tuple[int, list[Input]]]:
    """Yield the number of inputs of every batch, and the batch padded to a fixed number of rows."""
    for start in range(0, len(inputs), size):
        batch = list(inputs[start : start + size])
        yield len(batch), batch + batch[-1:] * (rows - len(batch))


def drawn_seeds(
    inputs: Sequence[Input], stream: Literal["prompt", "tokens", "sketch"], indices: range
) -> UInt32[np.ndarray, "B I"]:
    """Return the 32-bit seeds at indices of a stream, whose seed texts give 256 bits.

    The seed of index t of the stream ``tokens`` makes the Gumbel numbers of token t, and that of
    the stream ``sketch`` the projection of its state.
    """
    words_B8 = streams.seeds(seed_texts(inputs, stream), 256)
    return streams.step_seeds(words_B8, np.asarray(indices))


def drawn_prompts(
    inputs: Sequence[Input], *, seq_len: int, vocab_size: int
) -> Int64[np.ndarray, "B P"]:
    """Return the token ids of the prompts.

    The id at position i is ⌊s·V/2³²⌋ with s the seed of index i of the stream ``prompt``, in whole
    numbers of 64 bits.
    """
    seeds_BP = drawn_seeds(inputs, "prompt", range(seq_len)).astype(np.uint64)
    return ((seeds_BP * np.uint64(vocab_size)) >> np.uint64(32)).astype(np.int64)


def margins(
    scores_NV: Float32[Tensor, "N V"], tokens_N: Int64[Tensor, " N"]
) -> Float32[Tensor, " N"]:
    """Return how far the score of every token is below the best; infinite for an unknown id."""
    ids_N1 = tokens_N.unsqueeze(1)
    known_N1 = ids_N1 < scores_NV.shape[1]
    claimed_N1 = scores_NV.gather(1, torch.where(known_N1, ids_N1, 0)).where(known_N1, -torch.inf)
    return (scores_NV.amax(dim=1, keepdim=True) - claimed_N1).squeeze(1)


def token_inputs(
    inputs: Sequence[Input], frame: Frame, *, seq_len: int
) -> Int64[np.ndarray, "B T"]:
    """Return the token ids that are the model's inputs, from the seeds of the stream ``prompt``."""
    return frame.tokens(drawn_seeds(inputs, "prompt", range(seq_len)))


def device_tokens(
    backend: streams.Backend, inputs: Sequence[Input], frame: Frame, *, seq_len: int
) -> Int32[Tensor, " N"]:
    """Return the ids of :func:`token_inputs` in one row, on the device, without synchronising.

    For 64 nonces of 256 positions numpy takes 1.2 ms on the host of an H100, 6 % of a pass of a
    small model.
    """
    device = torch.device(backend.device)
    words_B8 = to_device(streams.seeds(seed_texts(inputs, "prompt"), 256).view(np.int32), device)
    steps_N = torch.arange(seq_len, device=device).repeat(len(inputs))
    seeds_N = backend.row_seeds(words_B8.repeat_interleave(seq_len, dim=0), steps_N).view(
        torch.int32
    )
    places_N = ((seeds_N.long() & 0xFFFFFFFF) * frame.drawn) >> 32
    left_out_N = torch.searchsorted(to_device(frame.before, device), places_N, right=True)
    return (places_N + left_out_N).int()
