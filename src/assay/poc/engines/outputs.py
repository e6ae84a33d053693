"""From nonces to what a pipeline publishes, on an engine whose hidden states can be read.

:func:`plain_outputs` does one thing after the other. :func:`overlapped_outputs` keeps a CUDA device busy: while batch n
runs, the inputs of batch n + 1 are made and the states of batch n − 1 are transformed, each on a stream of its own. The
host waits for one event per batch, behind which the next batch is queued already.

Legend of shapes: B nonces of a batch, T positions, D hidden size, V vocabulary, K length of a vector.
"""

from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple, Protocol

import torch
from numpy.typing import NDArray
from torch import Tensor

from assay.poc.engines.base import Engine
from assay.poc.protocol.pipelines import LayerStep, Pipeline
from assay.poc.protocol.round import Round
from assay.poc.protocol.transforms import Transform


class StateEngine(Engine, Protocol):
    """An engine whose hidden states can be read in this process."""

    device: torch.device
    """Device of the hidden states."""

    def inputs(self, round: Round, nonces: Sequence[int]) -> Tensor:
        """Return the input embeddings [B, T, D] of B nonces, in the engine's dtype."""

    def read(self, inputs_BTD: Tensor, weights_BT: Tensor | None) -> Tensor:
        """Return what a pipeline reads of the hidden states after the final norm, [B, D] in float32.

        That is the state of the last position; or, with weights, :func:`assay.poc.protocol.weighted_sum` of all states.
        """

    def trained_head(self, x_BD: Tensor) -> Tensor:
        """Return x Wᵀ for the model's own head matrix, [B, V] in float32, without bias or capping of logits."""

    def between_layers(self, step: LayerStep, round: Round) -> AbstractContextManager[None]:
        """Apply a transform after every decoder layer while the context is open."""


def plain_outputs(
    engine: StateEngine, round: Round, pipeline: Pipeline, nonces: Sequence[int]
) -> Generator[NDArray[Any]]:
    """Yield the outputs of a pipeline a batch at a time; the last batch is padded, then cut."""
    transform = make_transform(engine, round, pipeline)
    with engine.between_layers(pipeline.layers, round):
        for start in range(0, len(nonces), engine.batch_size):
            count, padded = _batch(engine, nonces, start)
            inputs_BTD = engine.inputs(round, padded)
            states_BD = engine.read(inputs_BTD, transform.weights(padded, engine.seq_len))
            yield transform(states_BD, padded).cpu().numpy()[:count]


def overlapped_outputs(
    engine: StateEngine,
    run: Callable[[Tensor, Tensor | None], Tensor],
    round: Round,
    pipeline: Pipeline,
    nonces: Sequence[int],
) -> Generator[NDArray[Any]]:
    """Yield what :func:`plain_outputs` yields, on a CUDA device that never waits for the host.

    Args:
        engine: Engine that makes the inputs and fixes the shape of a batch.
        run: Function that does what ``engine.read`` does, without waiting for the device.
        round: Round that gives the seed texts.
        pipeline: Pipeline that names the steps and the published values.
        nonces: Nonces in the order of the outputs.
    """
    lanes = _lanes(engine.device)
    with torch.cuda.stream(lanes.tail):
        transform = make_transform(engine, round, pipeline)
    before: _Flight | None = None
    # No stream stays current across a yield: the caller may use the device for something else.
    with engine.between_layers(pipeline.layers, round):
        # The model was loaded on this stream, and the steps between its layers were prepared on it.
        for lane in lanes:
            lane.wait_stream(torch.cuda.current_stream(engine.device))
        for start in range(0, len(nonces), engine.batch_size):
            flight = _launch(engine, run, transform, lanes, *_batch(engine, nonces, start))
            if before is not None:
                yield _land(before, transform, lanes)
            before = flight
        if before is not None:
            yield _land(before, transform, lanes)


class _Lanes(NamedTuple):
    """The CUDA streams of one device."""

    inputs: torch.cuda.Stream
    forward: torch.cuda.Stream
    tail: torch.cuda.Stream


@cache
def _lanes(device: torch.device) -> _Lanes:
    """Return the one set of streams of a device: torch reuses freed memory only on the stream that freed it."""
    return _Lanes(*(torch.cuda.Stream(device) for _ in range(3)))  # type: ignore[no-untyped-call]


@dataclass(frozen=True, eq=False)
class _Flight:
    """A batch whose forward pass is queued; its first ``count`` nonces are wanted, the others are padding."""

    count: int
    nonces: list[int]
    states: Tensor  # B, D
    ready: torch.cuda.Event


def _launch(
    engine: StateEngine,
    run: Callable[[Tensor, Tensor | None], Tensor],
    transform: Transform,
    lanes: _Lanes,
    count: int,
    nonces: list[int],
) -> _Flight:
    """Queue the inputs and the forward pass of a batch."""
    with torch.cuda.stream(lanes.inputs):
        inputs_BTD = engine.inputs(transform.round, nonces)
        weights_BT = transform.weights(nonces, engine.seq_len)
    lanes.forward.wait_stream(lanes.inputs)
    with torch.cuda.stream(lanes.forward):
        for made in (inputs_BTD, weights_BT):
            if made is not None:
                made.record_stream(lanes.forward)  # do not reuse its memory before this stream is done
        states_BD = run(inputs_BTD, weights_BT)
        return _Flight(count, nonces, states_BD, lanes.forward.record_event())


def _land(flight: _Flight, transform: Transform, lanes: _Lanes) -> NDArray[Any]:
    """Transform the states of a batch and bring the outputs to the host."""
    with torch.cuda.stream(lanes.tail), torch.inference_mode():
        lanes.tail.wait_event(flight.ready)
        flight.states.record_stream(lanes.tail)
        landing = Landing(transform(flight.states, flight.nonces))
    return landing.numpy()[: flight.count]


class Landing:
    """Values on their way from a device to the host, made on the stream whose work computes them.

    Args:
        values: What is computed, perhaps not yet.
    """

    def __init__(self, values: Tensor) -> None:
        self._host, self._done = values, None
        if values.is_cuda:
            self._host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._host.copy_(values, non_blocking=True)
            self._done = torch.cuda.current_stream(values.device).record_event()

    def numpy(self) -> NDArray[Any]:
        """Wait for the values, and return them; an error of the device comes up here."""
        if self._done is not None:
            self._done.synchronize()
        return self._host.numpy().copy()  # other values will land in this memory


def make_transform(engine: StateEngine, round: Round, pipeline: Pipeline) -> Transform:
    """Return the randomisation of a round for an engine's states."""
    return Transform(
        round,
        pipeline,
        hidden_size=engine.hidden_size,
        vocab_size=engine.vocab_size,
        device=engine.device,
        trained_head=engine.trained_head,
    )


def _batch(engine: StateEngine, nonces: Sequence[int], start: int) -> tuple[int, list[int]]:
    """Return the number of nonces of a batch, and the batch padded to its fixed size."""
    wanted = list(nonces[start : start + engine.batch_size])
    return len(wanted), wanted + wanted[-1:] * (engine.batch_size - len(wanted))
