"""The steps of a pipeline: from hidden states to a distance or a vector.

Legend of shapes: B nonces of a batch, T positions, R of them that are read or reflections, D hidden
size, V output dimension, K picked or projected, S sketches.

Everything here is float32 on the engine's device, one batch at a time, and no operation mixes
rows. What depends on the block alone (target, random head) is made once per :class:`Transform`.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Float16, Float32
from numpy.typing import NDArray
from torch import Tensor

from assay import streams
from assay.errors import UsageError
from assay.models.frame import Frame
from assay.models.precision import own_precision
from assay.poc.protocol.pipelines import SKETCH_SIZE, Pipeline, Positions, Step, check_frame
from assay.poc.protocol.round import Input, Round, seed_texts
from assay.stats.chord import RANDOM_HEAD_ROWS
from assay.streams.arrays import as_tensor

_CPU = torch.device("cpu")
_EPSILON = 1e-8  # added to norms, as published
ROWS_OF_A_PRODUCT = 16
"""Rows from which a product has the kernels of matrices on CUDA: fewer may take those for matrix
times vector.
"""
# Kept because it is published; a distance does not depend on it.
_HEAD_SCALE = 0.02


def unit(x_BD: Float[Tensor, "*B D"]) -> Float[Tensor, "*B D"]:
    """Scale every row to length one: x / (‖x‖ + 1e-8)."""
    norm_B1: Tensor = torch.linalg.vector_norm(x_BD, dim=-1, keepdim=True)
    return x_BD / (norm_B1 + _EPSILON)


def reflect(x_BD: Float[Tensor, "*B D"], v_BD: Float[Tensor, "*#B D"]) -> Float[Tensor, "*B D"]:
    """Reflect every row in the hyperplane orthogonal to its unit vector: x − 2 (x·v) v."""
    return x_BD - 2 * (x_BD * v_BD).sum(dim=-1, keepdim=True) * v_BD


def layer_reflection(
    backend: streams.Backend, round: Round, index: int, size: int
) -> Float32[Tensor, " D"]:
    """Return the unit vector of a layer in a block, in whose hyperplane states are reflected."""
    seeds = streams.seeds([round.block_text("layer_reflection", index)])
    normals_D = as_tensor(backend.normals(seeds, size))[0]
    unit_D: Tensor = normals_D / torch.linalg.vector_norm(normals_D)
    return unit_D


def mean_over_positions(x_BRD: Float32[Tensor, "B R D"]) -> Float32[Tensor, "B 1 D"]:
    """Return the mean over positions by a matrix product, whose bits do not depend on the batch."""
    with own_precision(x_BRD):
        return torch.bmm(x_BRD.new_full((len(x_BRD), 1, x_BRD.shape[1]), 1 / x_BRD.shape[1]), x_BRD)


class Reading(NamedTuple):
    """How states of positions become one: weights of ±1 or 0, and a frame or scale."""

    weights: Float32[Tensor, "B T"]
    mean: Float32[Tensor, " D"] | None = None
    inverse: Float32[Tensor, " D"] | None = None  # of the scale
    first: int = 0  # no position before it has a weight
    scaled: bool = (
        False  # each coordinate by its mean and deviation over the positions that are read
    )

    def seen(self, x_BRD: Float[Tensor, "B R D"]) -> Float32[Tensor, "B R D"]:
        """Return every state, framed or scaled, over its norm, in float32."""
        y_BRD = x_BRD.float()
        if self.mean is not None and self.inverse is not None:
            y_BRD = (y_BRD - self.mean) * self.inverse
        elif self.scaled:
            y_BRD = y_BRD - mean_over_positions(y_BRD)
            y_BRD = y_BRD / (mean_over_positions(y_BRD.square()).sqrt() + _EPSILON)
        return unit(y_BRD)

    def sum(self, x_BTD: Float[Tensor, "B T D"]) -> Float32[Tensor, "B D"]:
        """Return the sum of the seen states with their weights, every row by itself.

        The states are those of all positions, or only those from ``first`` on.
        """
        weights_BR = self.weights[:, self.first :]
        with own_precision(x_BTD):
            return torch.bmm(
                weights_BR.unsqueeze(1), self.seen(x_BTD[:, -weights_BR.shape[1] :])
            ).squeeze(1)


def project(x_BD: Float[Tensor, "B D"], weight_VD: Float[Tensor, "V D"]) -> Float[Tensor, "B V"]:
    """Multiply every row by a head: [B, V] = x Wᵀ, one row at a time.

    One product of all rows would be faster, but on a CPU its kernels treat the rows at the edge of
    a tile in another order, and a nonce's bits would depend on its place in the batch. On CUDA they
    do not, from 16 rows on.
    """
    with own_precision(x_BD):
        if x_BD.is_cuda and len(x_BD) >= ROWS_OF_A_PRODUCT:
            return x_BD @ weight_VD.T
        return torch.bmm(x_BD.unsqueeze(1), weight_VD.T.expand(len(x_BD), -1, -1)).squeeze(1)


def random_projection(
    x_BD: Float[Tensor, "B D"], normals_BN: Float32[Tensor, "B N"], count: int
) -> Float32[Tensor, "B K"]:
    """Return P x of every row, with P [K, D] its own K · D normals, row by row."""
    p_BKD = normals_BN.view(len(x_BD), count, -1)
    # A row alone would take another kernel on a CPU, with other last bits.
    least = max(2, len(x_BD))
    with own_precision(x_BD):
        return torch.bmm(
            p_BKD.expand(least, -1, -1), x_BD.unsqueeze(2).expand(least, -1, -1)
        ).squeeze(2)[: len(x_BD)]


@torch.inference_mode()
def sketch_states(
    states_SD: Float[Tensor, "S D"], seeds_S: NDArray[np.uint32]
) -> Float16[Tensor, "S K"]:
    """Return unit(P · unit(h)) of every final state h, with P [12, D] the seeded normals.

    Whoever prefills prompt and tokens once has the same states, and so the same sketches up to
    rounding. The seed fixes the projection, so a node cannot prepare for it, and every coordinate
    of the state counts alike.
    """
    backend = streams.get_backend("auto", str(states_SD.device))
    normals_SN = as_tensor(backend.normals(seeds_S, SKETCH_SIZE * states_SD.shape[1]))
    return unit(random_projection(unit(states_SD.float()), normals_SN, SKETCH_SIZE)).to(
        torch.float16
    )


def block_target(round: Round, size: int, device: torch.device = _CPU) -> Float32[Tensor, " V"]:
    """Return the target of a block: a unit vector of ``size`` dimensions."""
    backend = streams.get_backend("auto", str(device))
    normals_V = as_tensor(backend.normals(streams.seeds([round.block_text("target")]), size)).to(
        device
    )[0]
    target_V: Tensor = normals_V / torch.linalg.vector_norm(normals_V)
    return target_V


class Transform:
    """The transform of one round, for batches of states of D numbers on a device.

    For pipelines with that head, ``trained_head`` maps [B, D] to logits [B, V], of ``vocab_size``
    V; a UsageError says that the engine does not have it.
    """

    def __init__(
        self,
        round: Round,
        pipeline: Pipeline,
        *,
        hidden_size: int,
        vocab_size: int,
        device: torch.device,
        trained_head: Callable[[Tensor], Tensor] | None = None,
        frame: Frame | None = None,
    ) -> None:
        if pipeline.head == "trained" and trained_head is None:
            raise UsageError(
                f"the pipeline {pipeline.name}, which needs the trained head",
                wanted="a pipeline with the random head or none: vLLM spreads the trained one "
                "over its workers",
                do="use --engine hf for it",
            )
        check_frame(pipeline, frame, hidden_size=hidden_size, vocab_size=vocab_size)
        self.round = round
        self.pipeline = pipeline
        self._frame = (
            (torch.from_numpy(frame.mean).to(device), torch.from_numpy(1 / frame.scale).to(device))
            if frame is not None and pipeline.framed
            else (None, None)
        )
        self._backend = streams.get_backend("auto", str(device))
        self._device = device
        self._trained_head = trained_head if pipeline.head == "trained" else None
        self._random_head_VD: Tensor | None = None
        self._target_V: Tensor | None = None
        if pipeline.head == "random":
            values = self._normals(
                streams.seeds([round.block_text("random_head")]), hidden_size * RANDOM_HEAD_ROWS
            )
            self._random_head_VD = values.view(RANDOM_HEAD_ROWS, hidden_size) * _HEAD_SCALE
        if pipeline.output == "distance":
            self._target_V = block_target(
                round, pipeline.output_size(hidden_size, vocab_size), device
            )

    def reading(self, inputs: Sequence[Input], seq_len: int) -> Reading | None:
        """Return how the positions are read; None where the last one alone is, as it is."""
        read = self.pipeline.read
        if not isinstance(read, Positions):
            return None
        weights_BT = as_tensor(self._backend.signs(self._seeds("weights", inputs), seq_len)).float()
        first = read.first(seq_len)
        if read.scaled:
            # Neighbours get opposite signs, so what they have in common cancels.
            pairs_BR = weights_BT.repeat_interleave(2, dim=1)[:, : seq_len - first]
            pairs_BR[:, 1::2] *= -1
            weights_BT[:, first:] = pairs_BR
        weights_BT[:, :first] = 0
        mean, inverse = self._frame
        return Reading(weights_BT, mean, inverse, first, read.scaled)

    def __call__(
        self, x_BD: Float32[Tensor, "B D"], inputs: Sequence[Input]
    ) -> Float32[Tensor, " B"] | Float16[Tensor, "B K"]:
        """Return what the pipeline publishes of the state read for each input: distances or
        vectors.

        A state that is not finite gives NaN throughout, and never a vector of coordinates that
        happen to be finite.
        """
        x_BD = torch.where(torch.isfinite(x_BD).all(dim=1, keepdim=True), x_BD, torch.nan)
        for step in self.pipeline.hidden:
            x_BD = self._step(step, x_BD, inputs)
        if self._target_V is None:
            return x_BD.to(torch.float16)
        y_BV = self.apply_head(x_BD)
        for step in self.pipeline.logits:
            y_BV = self._step(step, y_BV, inputs)
        y_BV = y_BV / torch.linalg.vector_norm(y_BV, dim=-1, keepdim=True)
        distances_B: Tensor = torch.linalg.vector_norm(y_BV - self._target_V, dim=-1)
        return distances_B

    def apply_head(self, x_BD: Tensor) -> Tensor:
        """Return the values [B, V] of the preset's head, or the rows themselves without one."""
        if self._random_head_VD is not None:
            return project(x_BD, self._random_head_VD)
        return x_BD if self._trained_head is None else self._trained_head(x_BD)

    def _step(self, step: Step, x_BD: Tensor, inputs: Sequence[Input]) -> Tensor:
        size = x_BD.shape[-1]
        match step.name:
            case "unit":
                return unit(x_BD)
            case "signs":
                return x_BD * as_tensor(self._backend.signs(self._seeds("signs", inputs), size))
            case "permute":
                order_BV = as_tensor(
                    self._backend.permutations(self._seeds("permutation", inputs), size)
                )
                return x_BD.gather(-1, order_BV)
            case "pick":
                seeds = self._seeds("pick", inputs, k=step.count)
                return x_BD.gather(-1, as_tensor(self._backend.picks(seeds, size, step.count)))
            case "project":
                seeds = self._seeds("projection", inputs, k=step.count)
                return random_projection(x_BD, self._normals(seeds, step.count * size), step.count)
            case "reflect":
                return self._reflections("reflection", step.count, x_BD, inputs)
            case "rotate":
                return self._reflections("rotation", step.count, x_BD, inputs, k=size)

    def _reflections(
        self, stream: str, count: int, x_BD: Tensor, inputs: Sequence[Input], k: int = 0
    ) -> Tensor:
        seeds_N1 = self._seeds(stream, inputs, count=count, k=k)
        reflected_BD = self._backend.reflected(x_BD, seeds_N1.reshape(len(inputs), count))
        if reflected_BD is not None:
            return reflected_BD
        v_BRD = self._normals(seeds_N1, x_BD.shape[-1]).view(len(inputs), count, -1)
        v_BRD = v_BRD / torch.linalg.vector_norm(v_BRD, dim=-1, keepdim=True)
        for r in range(count):
            x_BD = reflect(x_BD, v_BRD[:, r])
        return x_BD

    def _seeds(
        self, stream: str, inputs: Sequence[Input], *, count: int = 1, k: int = 0
    ) -> NDArray[np.uint32]:
        return streams.seeds(seed_texts(inputs, stream, count=count, k=k))

    def _normals(self, seeds_N1: NDArray[np.uint32], n: int) -> Tensor:
        return as_tensor(self._backend.normals(seeds_N1, n)).to(self._device)
