"""What attackers are held against: the validator's states, the honest provers' states, and the law of their noise.

Legend of shapes: N nonces, B nonces of a batch, T positions, D hidden size, K published numbers.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from assay.models import Model, load_model
from assay.poc.engines import make_transform
from assay.poc.engines.hf import HFEngine
from assay.poc.protocol import Pipeline, Round, get_pipeline, unit
from assay.research.redteam._attacks import OnEngine, Program, Scene
from assay.research.redteam._detect import Judge
from assay.research.redteam._partial import Guesses

__all__ = ["PRESETS", "Field", "Reading"]

PRESETS = ("poc-2.0", "artifact", "hardened")
TRAINING_BLOCK = "a block of the attacker's own"

FloatArray = npt.NDArray[np.float64]


class Reading:
    """One way to read the states, that of the round's preset, and the presets that share it: equal inputs and rows."""

    def __init__(self, validator: HFEngine, round: Round, presets: Sequence[str]) -> None:
        self.round, self.presets, self._validator = round, tuple(presets), validator
        self._transforms = {name: make_transform(validator, round, get_pipeline(name)) for name in presets}
        self._states: list[Tensor] = []

    def states(self, program: Program, engine: HFEngine, nonces: int) -> Tensor:
        """Return what a program reads of the first nonces, [N, D], on the CPU in float32."""
        return torch.cat([x_BD[: nonces - start].cpu() for start, x_BD in self._batches(program, engine, nonces)])

    def _batches(self, program: Program, engine: HFEngine, nonces: int) -> Iterator[tuple[int, Tensor]]:
        for start in range(0, nonces, engine.batch_size):
            batch = range(start, start + engine.batch_size)
            inputs_BTD = engine.inputs(self.round, batch)
            yield start, program.read(inputs_BTD, self._transforms[self.presets[0]].weights(batch, engine.seq_len))

    def recomputed(self, nonces: int) -> Tensor:
        """Return the validator's states of the first nonces, [N, D]; computed once."""
        while sum(map(len, self._states)) < nonces:
            start = sum(map(len, self._states))
            batch = range(start, start + self._validator.batch_size)
            inputs_BTD = self._validator.inputs(self.round, batch)
            weights_BT = self._transforms[self.presets[0]].weights(batch, self._validator.seq_len)
            self._states.append(OnEngine(self._validator).read(inputs_BTD, weights_BT).cpu())
        return torch.cat(self._states)[:nonces]

    def errors(self, x_ND: Tensor) -> FloatArray:
        """Return ε of every nonce: the distance of the unit states, [N]."""
        return np.asarray((unit(x_ND) - unit(self.recomputed(len(x_ND)))).norm(dim=-1).double())

    def residuals(self, preset: str, x_ND: Tensor) -> FloatArray:
        """Return received minus recomputed distance, or the L2 distance of the vectors, [N]."""
        received, recomputed = (self.published(preset, states) for states in (x_ND, self.recomputed(len(x_ND))))
        if received.ndim == 1:
            return np.asarray(received - recomputed)
        return np.asarray(np.linalg.norm(received - recomputed, axis=1))

    def published(self, preset: str, x_ND: Tensor) -> FloatArray:
        """Return what a preset publishes of states: distances [N] or vectors [N, K]."""
        device = self._validator.device
        values = self._transforms[preset](x_ND.to(device), range(len(x_ND)))
        return np.asarray(values.double().cpu())


@dataclass(frozen=True, kw_only=True)
class Field:
    """One model and one dtype of provers and attackers, against a validator in float32.

    One half of the ``honest`` nonces calibrates the rules, the other one tests them.
    """

    reference: str
    dtype: str
    device: str | None
    block_hash: str
    seq_len: int
    batch_size: int
    honest: int

    @cached_property
    def validator(self) -> HFEngine:
        """The validator's engine, in float32."""
        model = load_model(self.reference, dtype="float32", device=self.device)
        return HFEngine(model, batch_size=self.batch_size, seq_len=self.seq_len)

    @cached_property
    def prover(self) -> Model:
        """The model in the provers' dtype. In float32 its attention is the library's plain one: else no bit differs."""
        model = load_model(self.reference, dtype=self.dtype, device=self.device)
        if self.dtype == "float32":
            model.module.set_attn_implementation("eager")
        return model

    @cached_property
    def engine(self) -> HFEngine:
        """The provers' engine; attackers draw their inputs from it."""
        return HFEngine(self.prover, batch_size=self.batch_size, seq_len=self.seq_len)

    @cached_property
    def scene(self) -> Scene:
        """Where the attackers work."""
        round = Round(block_hash=TRAINING_BLOCK, public_key="attacker", seq_len=self.seq_len)
        batches = [
            self.validator.inputs(round, range(i * self.batch_size, (i + 1) * self.batch_size)) for i in range(2)
        ]
        guesses = Guesses(self.validator.model, torch.cat(batches))
        return Scene(model=self.prover, guesses=guesses, batch_size=self.batch_size, seq_len=self.seq_len)

    @cached_property
    def readings(self) -> tuple[Reading, ...]:
        """The readings of the three presets: of the last state, and of all positions."""
        rounds = [self.round(preset) for preset in ("poc-2.0", "hardened")]
        presets = (("poc-2.0", "artifact"), ("hardened",))
        return tuple(Reading(self.validator, round, names) for round, names in zip(rounds, presets, strict=True))

    def round(self, preset: str) -> Round:
        """Return the attacked round with a preset."""
        return Round(
            block_hash=self.block_hash,
            public_key="node_A",
            model=self.reference,
            preset=preset,
            seq_len=self.seq_len,
        )

    @cached_property
    def honest_states(self) -> tuple[Tensor, ...]:
        """The honest prover's states, [N, D] for each reading."""
        program = OnEngine(self.engine)
        return tuple(reading.states(program, self.engine, self.honest) for reading in self.readings)

    def each(self) -> Iterator[tuple[str, Pipeline, Reading, Tensor]]:
        """Give every preset with its pipeline, its reading, and the honest states of that."""
        for reading, x_ND in zip(self.readings, self.honest_states, strict=True):
            for preset in reading.presets:
                yield preset, get_pipeline(preset), reading, x_ND

    @cached_property
    def honest_residuals(self) -> dict[str, tuple[FloatArray, FloatArray]]:
        """Honest residuals of every preset: those that calibrate, and those that test, [N/2] each."""
        half = self.honest // 2
        found = {preset: reading.residuals(preset, x_ND) for preset, _, reading, x_ND in self.each()}
        return {preset: (values[:half], values[half:]) for preset, values in found.items()}

    @cached_property
    def judges(self) -> dict[str, Judge]:
        """The three rules for every preset, calibrated."""
        return {p: Judge(get_pipeline(p), calibrating) for p, (calibrating, _) in self.honest_residuals.items()}
