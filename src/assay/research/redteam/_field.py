"""What attackers are held against: the states of validator and honest provers, and the rules that catch cheaters.

Legend of shapes: N nonces or residuals, R trials, C checked nonces, B nonces of a batch, T positions, D hidden size,
K published numbers.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from scipy import stats as distributions
from torch import Tensor

from assay import stats
from assay.models import Model, load_model
from assay.poc.engines import make_transform
from assay.poc.engines.hf import HFEngine
from assay.poc.protocol import RANDOM_HEAD_ROWS, Pipeline, Round, get_pipeline, unit
from assay.poc.verdict import COUNT_ALPHA, DIST_THRESHOLD, P_FLIP, P_MISMATCH, Law, fit_noise, sequential_test
from assay.research.redteam._attacks import OnEngine, Program, Scene
from assay.research.redteam._partial import Guesses

PRESETS = ("poc-2.0", "artifact", "hardened")
TRAINING_BLOCK = "a block of the attacker's own"
ALPHA = 1e-3
CHECKED = (1, 2, 3, 5, 7, 10, 15, 20, 30, 50, 70, 100, 150, 200, 300)
TRIALS = 2000
SOON = 20
MOST = 100_000  # checked nonces beyond which a rule counts as blind
HONEST_QUANTILE = 0.95  # of honest L2 distances, the threshold of the calibrated count test

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Pool:
    """Residuals that a node's nonces are drawn from, [N]: a share of each kind."""

    parts: tuple[tuple[float, FloatArray], ...]

    def draw(self, rng: np.random.Generator, trials: int, checked: int) -> FloatArray:
        """Draw the residuals of audits, [R, C]."""
        shares = np.array([share for share, _ in self.parts])
        drawn_RC = np.empty((trials, checked))
        which_RC = rng.choice(len(shares), size=(trials, checked), p=shares / shares.sum())
        for index, (_, residuals_N) in enumerate(self.parts):
            here_RC = which_RC == index
            drawn_RC[here_RC] = rng.choice(residuals_N, size=int(here_RC.sum()))
        return drawn_RC

    def mean(self, values: Sequence[float]) -> float:
        """Average a value of each part over the shares."""
        return sum(share * value for (share, _), value in zip(self.parts, values, strict=True))


def mixed(share: float, cheating_N: FloatArray, honest_N: FloatArray) -> Pool:
    """Return the residuals of a node that cheats in a share of its nonces."""
    return Pool(((share, cheating_N), (1 - share, honest_N)))


class Judge:
    """The three rules for one pipeline, at one rate of false accusations, calibrated on honest residuals.

    The published rules count mismatches. Their constants accuse honest nodes on other hardware far more often than they
    state, so each is calibrated for the comparison: it takes the smallest count that honest noise reaches with
    probability 1e-3. The sequential test is used unchanged, with the law fitted to the residuals.

    Args:
        pipeline: Pipeline that says what is published.
        honest_N: Honest residuals to calibrate with.
        r_target: Target distance of the published rule.
        seed: Seed of the simulated audits.
    """

    def __init__(
        self, pipeline: Pipeline, honest_N: FloatArray, *, r_target: float = Round.r_target, seed: int = 0
    ) -> None:
        self.pipeline, self.r_target, self._seed = pipeline, r_target, seed
        self.law: Law = fit_noise(pipeline, honest_N)[0]
        self._test = sequential_test(self.law, alpha=ALPHA)
        self.threshold = float(np.quantile(np.abs(honest_N), HONEST_QUANTILE))
        self.honest_rate = self._honest_rate(honest_N)

    def _honest_rate(self, honest_N: FloatArray) -> float:
        """Upper estimate of the chance that an honest nonce mismatches, for the calibrated count rule."""
        if self.pipeline.output == "distance":
            return self.mismatch_rate(honest_N)
        beyond = int(np.count_nonzero(np.abs(honest_N) > self.threshold))
        return stats.proportion_interval(beyond, honest_N.size, 0.9)[1]

    def mismatch_rate(self, residuals_N: FloatArray) -> float:
        """Chance that a nonce with such a residual is a mismatch.

        For distances: that the recomputed one is above r_target where the received one is below. Given the residual it
        follows from the chord law, so no flip has to be waited for.
        """
        if self.pipeline.output == "vector":
            return float(np.mean(np.abs(residuals_N) > self.threshold))
        valid = stats.valid_rate(self.r_target, RANDOM_HEAD_ROWS)
        crossed_N = stats.chord_cdf(self.r_target - np.minimum(residuals_N, 0), RANDOM_HEAD_ROWS) - valid
        return float(np.mean(crossed_N)) / valid

    def sequential(self, pool: Pool) -> FloatArray:
        """Share of audits in which the sequential test has accused after each of :data:`CHECKED` nonces."""
        rng = np.random.default_rng(self._seed)
        drawn_RC = pool.draw(rng, TRIALS, CHECKED[-1])
        crossed_RC = np.ones(drawn_RC.shape, dtype=np.bool_)
        crossed_RC[:, :SOON] = self._test.accusations(drawn_RC[:, :SOON])
        # Most are caught soon: only the others are followed to the end.
        late = ~crossed_RC[:, SOON - 1]
        crossed_RC[late] = self._test.accusations(drawn_RC[late])
        return np.asarray(crossed_RC.mean(axis=0)[np.array(CHECKED) - 1], dtype=np.float64)

    def accused(self, drawn_RC: FloatArray) -> float:
        """Share of audits that the sequential test accuses by their end."""
        return float(self._test.accusations(drawn_RC)[:, -1].mean())

    def counting(self, pool: Pool) -> FloatArray:
        """Chance that the calibrated count rule accuses after each of :data:`CHECKED` nonces."""
        rate = pool.mean([self.mismatch_rate(residuals_N) for _, residuals_N in pool.parts])
        return np.array([_power(n, self.honest_rate, rate) for n in CHECKED])

    def counting_needs(self, pool: Pool, power: float = 0.99) -> int | None:
        """Return the nonces after which the calibrated count rule accuses with the wanted chance; None for never."""
        rate = pool.mean([self.mismatch_rate(residuals_N) for _, residuals_N in pool.parts])
        if rate <= self.honest_rate:
            return None
        n = 1
        while n <= MOST:
            if _power(n, self.honest_rate, rate) >= power:
                return n
            n = max(n + 1, int(n * 1.02))
        return None

    def published(self, drawn_RC: FloatArray) -> float:
        """Share of audits that the rule accuses with its published constants."""
        if self.pipeline.output == "vector":
            counts_R = (np.abs(drawn_RC) > DIST_THRESHOLD).sum(axis=1)
            p, n = P_MISMATCH, drawn_RC.shape[1]
            return float(np.mean(distributions.binom.sf(counts_R - 1, n, p) < COUNT_ALPHA))
        rate, n = self.mismatch_rate(drawn_RC.ravel()), drawn_RC.shape[1]
        accusing = np.flatnonzero(distributions.binom.sf(np.arange(n + 1) - 1, n, P_FLIP) < COUNT_ALPHA)[0]
        return float(distributions.binom.sf(accusing - 1, n, rate))


def smallest(curve_C: FloatArray, power: float = 0.99) -> int | None:
    """Return the first of :data:`CHECKED` at which a curve reaches the wanted chance; None for never."""
    reached = np.flatnonzero(curve_C >= power)
    return CHECKED[int(reached[0])] if reached.size else None


def detection(judge: Judge, pool: Pool) -> dict[str, Any]:
    """Return the curves of the sequential test and of the calibrated count rule, and where they reach 99 %."""
    curve_C = judge.sequential(pool)
    return {
        "sequential": [round(float(p), 4) for p in curve_C],
        "sequential_99": smallest(curve_C),
        "counting": [round(float(p), 4) for p in judge.counting(pool)],
        "counting_99": judge.counting_needs(pool),
    }


def spread(errors_N: FloatArray, residuals_N: FloatArray) -> dict[str, float]:
    """Return the size of the errors of states, and of the residuals of what is published."""
    return {
        "error_mean": float(errors_N.mean()),
        "error_95": float(np.quantile(errors_N, 0.95)),
        "residual_rms": float(np.sqrt(np.mean(residuals_N**2))),
        "residual_median": float(np.median(np.abs(residuals_N))),
    }


def _power(n: int, honest: float, cheating: float) -> float:
    """Chance to accuse after n nonces, with the smallest count that honest nonces reach with at most `ALPHA`."""
    critical = float(distributions.binom.isf(ALPHA, n, honest)) + 1
    return float(distributions.binom.sf(critical - 1, n, cheating))


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
