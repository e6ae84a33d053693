"""The experiments' own way through a pipeline: hidden states once, then as many pipelines as want
them.

Legend of shapes: N nonces, B nonces of a batch, D hidden size, K published numbers.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch

from assay.errors import UsageError
from assay.poc.engines.base import padded_batches
from assay.poc.engines.hf.engine import HFEngine, make_transform
from assay.poc.protocol.pipelines import Pipeline
from assay.poc.protocol.round import Input, Round
from assay.poc.protocol.transforms import Transform


def state_pipeline(pipeline: Pipeline) -> Pipeline:
    """Return the pipeline cut off before its head: it publishes the randomised state itself, in
    fp16.
    """
    return replace(pipeline, head="none", logits=(), output="vector")


def states(
    engine: HFEngine, transform: Transform, nonces: Sequence[int]
) -> Iterator[tuple[list[Input], torch.Tensor]]:
    """Yield what a transform reads of the hidden states, [B, D] in float32, batch by batch, each
    with its B inputs.

    The last batch is padded with its last nonce, as in a proof; the rows in excess are to be
    dropped. What happens between the layers is what the engine was set to before.
    """
    inputs = transform.round.inputs(nonces)
    for _, padded in padded_batches(inputs, engine.batch_size, engine.batch_size):
        reading = transform.reading(padded, engine.seq_len)
        yield padded, engine.read(engine.embeddings(padded), reading)


def published(
    engine: HFEngine, round: Round, pipelines: Sequence[Pipeline], nonces: Sequence[int]
) -> dict[str, npt.NDArray[np.float32]]:
    """Return what every pipeline publishes, by name: distances [N] or vectors [N, K].

    The pipelines must agree on what happens between the layers and on what is read; the model runs
    once for all.
    """
    ((layers, _),) = {(pipeline.layers, pipeline.read) for pipeline in pipelines}
    transforms = {pipeline.name: make_transform(engine, round, pipeline) for pipeline in pipelines}
    by_preset: dict[str, list[npt.NDArray[np.float32]]] = {name: [] for name in transforms}
    with engine.between_layers(layers, round):
        for padded, x_BD in states(engine, next(iter(transforms.values())), nonces):
            for name, transform in transforms.items():
                by_preset[name].append(transform(x_BD, padded).float().cpu().numpy())
    return {name: np.concatenate(batches)[: len(nonces)] for name, batches in by_preset.items()}


def effective_dimension(states_ND: npt.NDArray[np.floating]) -> float:
    """Return 1/‖E[x xᵀ]‖² of unit states [N, D], from the mean squared product of two different
    ones.

    Raises:
        UsageError: There are fewer than 2 states, or one has no direction.
    """
    if len(states_ND) < 2:
        raise UsageError(f"{len(states_ND)} states", wanted="at least 2", do="measure more nonces")
    unit_ND = states_ND.astype(np.float64)
    length_N1 = np.linalg.norm(unit_ND, axis=1, keepdims=True)
    without = np.count_nonzero(~(np.isfinite(length_N1) & (length_N1 > 0)))
    if without:
        raise UsageError(
            f"{without} of {len(states_ND)} states that are zero or not finite",
            wanted="states with a direction",
            do="find out which nonces they are of",
        )
    unit_ND /= length_N1
    squares_NN = (unit_ND @ unit_ND.T) ** 2
    n = len(unit_ND)
    return float(n * (n - 1) / (squares_NN.sum() - np.trace(squares_NN)))
