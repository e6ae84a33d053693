"""What attackers are held against: the states of validator and honest provers, and the rules that
catch cheaters.

Legend of shapes: N nonces or residuals, R trials, C checked nonces, B nonces of a batch, T
positions, D hidden size, K published numbers.
"""

import math
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
from assay.models.frame import Frame
from assay.models.load import load_model
from assay.models.model import Model
from assay.models.number_formats import NUMBER_FORMATS
from assay.poc.engines.hf.compiled_forward import worth_compiling
from assay.poc.engines.hf.engine import HFEngine, make_transform
from assay.poc.frames import measure_frame
from assay.poc.protocol.pipelines import Pipeline, get_pipeline
from assay.poc.protocol.round import Round
from assay.poc.protocol.transforms import Reading as TransformReading
from assay.poc.protocol.transforms import unit
from assay.poc.verdict.honest_noise import Noise, fit_noise
from assay.poc.verdict.machine_fit import PAIR_SPREAD
from assay.poc.verdict.residuals import COUNT_ALPHA, DIST_THRESHOLD, P_FLIP, P_MISMATCH
from assay.poc.verdict.sample_plan import sequential_test
from assay.stats.chord import RANDOM_HEAD_ROWS
from assay.stats.noise_laws import Spread
from assay_research.redteam.attacks import Guesses, OnEngine, Program, Scene
from assay_research.runs.spread import first_reached

PRESETS = ("poc-2.0", "artifact", "hardened")
"""Presets that are attacked."""
TRAINING_BLOCK = "a block of the attacker's own"
ALPHA = 1e-3
"""Rate of false accusations at which rules are compared."""
CHECKED = (1, 2, 3, 5, 7, 10, 15, 20, 30, 50, 70, 100, 150, 200, 300)
"""Numbers of nonces of an audit at which attacks are counted."""
TRIALS = 2000
POWER = 0.99
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


def validator_format(dtype: str) -> str:
    """Return the number format of the validator against provers of a dtype."""
    return dtype if dtype == "float8" else "float32"


def mixed(share: float, cheating_N: FloatArray, honest_N: FloatArray) -> Pool:
    """Return the residuals of a node that cheats in a share of its nonces."""
    return Pool(((share, cheating_N), (1 - share, honest_N)))


class Judge:
    """The three rules for one pipeline, at one rate of false accusations, calibrated on honest
    residuals.

    The published rules count mismatches. Their constants accuse honest nodes on other hardware far
    more often than they state, so each is calibrated for the comparison: it takes the smallest
    count that honest noise reaches with probability 1e-3. The sequential test is used unchanged,
    with the law fitted to the residuals.

    Args:
        pipeline: Pipeline that says what is published.
        honest_N: Honest residuals to calibrate with.
        noise: Honest noise of the sequential test; the law of ``honest_N`` when None.
    """

    def __init__(
        self, pipeline: Pipeline, honest_N: FloatArray, noise: Noise | None = None
    ) -> None:
        self.pipeline = pipeline
        self.noise = noise or _fit_pair(pipeline, honest_N)
        self._test = sequential_test(self.noise, alpha=ALPHA)
        self.threshold = float(np.quantile(np.abs(honest_N), HONEST_QUANTILE))
        # For the calibrated count rule; of vectors, which are counted, it is an upper estimate.
        self.honest_rate = self.mismatch_rate(honest_N)
        if pipeline.output == "vector":
            beyond = int(np.count_nonzero(np.abs(honest_N) > self.threshold))
            self.honest_rate = stats.proportion_interval(beyond, honest_N.size, 0.9)[1]

    def mismatch_rate(self, residuals_N: FloatArray) -> float:
        """Return the chance that a nonce with such a residual is a mismatch.

        For distances: that the recomputed one is above r_target where the received one is below.
        Given the residual it follows from the chord law, so no flip has to be waited for.
        """
        if self.pipeline.output == "vector":
            return float(np.mean(np.abs(residuals_N) > self.threshold))
        valid = stats.valid_rate(Round.r_target, RANDOM_HEAD_ROWS)
        crossed_N = (
            stats.chord_cdf(Round.r_target - np.minimum(residuals_N, 0), RANDOM_HEAD_ROWS) - valid
        )
        return float(np.mean(crossed_N)) / valid

    def sequential(self, pool: Pool) -> FloatArray:
        """Return the share of audits in which the sequential test has accused after each of
        :data:`CHECKED` nonces.
        """
        drawn_RC = pool.draw(np.random.default_rng(0), TRIALS, CHECKED[-1])
        crossed_RC = self._test.accusations(drawn_RC)
        return np.asarray(crossed_RC.mean(axis=0)[np.array(CHECKED) - 1], dtype=np.float64)

    def accused(self, drawn_RC: FloatArray) -> float:
        """Return the share of audits that the sequential test accuses by their end."""
        return float(self._test.accusations(drawn_RC)[:, -1].mean())

    def counting(self, pool: Pool) -> FloatArray:
        """Return the chance that the calibrated count rule accuses after each of :data:`CHECKED`
        nonces.
        """
        return np.array([count_power(n, self.honest_rate, self._rate(pool)) for n in CHECKED])

    def counting_needs(self, pool: Pool) -> int | None:
        """Return the nonces after which the calibrated count rule accuses with 99 %; None for
        never.
        """
        rate = self._rate(pool)
        n = 1
        while rate > self.honest_rate and n <= MOST:
            if count_power(n, self.honest_rate, rate) >= POWER:
                return n
            n = max(n + 1, int(n * 1.02))
        return None

    def _rate(self, pool: Pool) -> float:
        return sum(share * self.mismatch_rate(residuals_N) for share, residuals_N in pool.parts)

    def published(self, drawn_RC: FloatArray) -> float:
        """Return the share of audits that the rule accuses with its published constants."""
        if self.pipeline.output == "vector":
            counts_R = (np.abs(drawn_RC) > DIST_THRESHOLD).sum(axis=1)
            p = P_MISMATCH
            n = drawn_RC.shape[1]
            return float(np.mean(distributions.binom.sf(counts_R - 1, n, p) < COUNT_ALPHA))
        return count_power(
            drawn_RC.shape[1], P_FLIP, self.mismatch_rate(drawn_RC.ravel()), COUNT_ALPHA
        )


def detection(judge: Judge, pool: Pool) -> dict[str, Any]:
    """Return the curves of the sequential test and of the calibrated count rule, and where they
    reach 99 %.
    """
    curve_C = judge.sequential(pool)
    return {
        "sequential": [round(float(p), 4) for p in curve_C],
        "sequential_99": first_reached(CHECKED, curve_C, POWER),
        "counting": [round(float(p), 4) for p in judge.counting(pool)],
        "counting_99": judge.counting_needs(pool),
    }


def best_test(honest_N: FloatArray, cheating_N: FloatArray) -> int | None:
    """Return the nonces after which the best test of sizes convicts 99 %, at 1 false conviction in
    1000.

    It knows both laws, as densities of the logarithm, and takes their ratio to be normal over many
    nonces. They are fitted to the sizes that they judge, so the number is a bound from below. None
    where it tells nothing: sizes that are all alike, or no larger ratio for the cheat.
    """
    logs = [np.log(np.maximum(np.abs(sizes_N), 1e-5)) for sizes_N in (honest_N, cheating_N)]
    if min(map(np.ptp, logs)) == 0:
        return None
    honest, cheating = map(distributions.gaussian_kde, logs)
    ratios = [cheating.logpdf(log_N).clip(-20) - honest.logpdf(log_N).clip(-20) for log_N in logs]
    gap = float(ratios[1].mean() - ratios[0].mean())
    width = sum(
        float(distributions.norm.isf(p) * x.std())
        for p, x in zip((ALPHA, 1 - POWER), ratios, strict=True)
    )
    return max(1, math.ceil((width / gap) ** 2)) if gap > 0 else None


def spread(errors_N: FloatArray, residuals_N: FloatArray) -> dict[str, float]:
    """Return the size of the errors of states, and of the residuals of what is published."""
    return {
        "error_mean": float(errors_N.mean()),
        "error_95": float(np.quantile(errors_N, 0.95)),
        "residual_rms": float(np.sqrt(np.mean(residuals_N**2))),
        "residual_median": float(np.median(np.abs(residuals_N))),
    }


def count_power(n: int, honest: float, cheating: float, alpha: float = ALPHA) -> float:
    """Return the chance that a count of mismatches accuses after n nonces.

    Args:
        n: Number of checked nonces.
        honest: Chance of a mismatch that the rule grants honest nodes.
        cheating: Chance of a mismatch of the audited node.
        alpha: Chance with which honest nodes may reach the smallest count that accuses.
    """
    critical = float(distributions.binom.isf(alpha, n, honest)) + 1
    return float(distributions.binom.sf(critical - 1, n, cheating))


class Reading:
    """One way to read the states, that of the round's preset, and the presets that share it: equal
    inputs and rows.
    """

    def __init__(self, validator: HFEngine, round: Round, presets: Sequence[str]) -> None:
        self.round = round
        self.presets = tuple(presets)
        self._validator = validator
        self._transforms = {
            name: make_transform(validator, round, get_pipeline(name)) for name in presets
        }
        self._recomputed: Tensor | None = None

    def states(self, program: Program, engine: HFEngine, nonces: int) -> Tensor:
        """Return what a program reads of the first nonces, [N, D], on the CPU in float32."""
        parts = []
        for start in range(0, nonces, engine.batch_size):
            batch = range(start, start + engine.batch_size)
            reading = self.of(batch, engine.seq_len)
            parts.append(program.read(engine.embeddings(self.round.inputs(batch)), reading).cpu())
        return torch.cat(parts)[:nonces]

    def of(self, nonces: Sequence[int], seq_len: int) -> TransformReading | None:
        """Return how the positions of nonces are read; None where only the last one is."""
        return self._transforms[self.presets[0]].reading(self.round.inputs(nonces), seq_len)

    @property
    def last(self) -> bool:
        """Whether only the last position is read."""
        return get_pipeline(self.presets[0]).read == "last"

    def recomputed(self, nonces: int) -> Tensor:
        """Return the validator's states of the first nonces, [N, D], which are kept."""
        if self._recomputed is None or len(self._recomputed) < nonces:
            self._recomputed = self.states(OnEngine(self._validator), self._validator, nonces)
        return self._recomputed[:nonces]

    def errors(self, x_ND: Tensor) -> FloatArray:
        """Return ε of every nonce: the distance of the unit states, [N]."""
        return np.asarray((unit(x_ND) - unit(self.recomputed(len(x_ND)))).norm(dim=-1).double())

    def residuals(self, preset: str, x_ND: Tensor) -> FloatArray:
        """Return received minus recomputed distance, or the L2 distance of the vectors, [N]."""
        return self.residuals_of(preset, self.published(preset, x_ND))

    def residuals_of(self, preset: str, received: FloatArray) -> FloatArray:
        """Return the same for what was published of the first nonces, [N] or [N, K]."""
        difference = received - self.published(preset, self.recomputed(len(received)))
        return (
            difference if difference.ndim == 1 else np.asarray(np.linalg.norm(difference, axis=1))
        )

    def published(self, preset: str, x_ND: Tensor) -> FloatArray:
        """Return what a preset publishes of states: distances [N] or vectors [N, K]."""
        device = self._validator.device
        values = self._transforms[preset](x_ND.to(device), self.round.inputs(range(len(x_ND))))
        return np.asarray(values.double().cpu())


@dataclass(frozen=True, kw_only=True)
class Field:
    """One model and one dtype of provers and attackers, against a validator in float32.

    Against provers in float8 the validator has float8 too: float32 is as far from it as a cheat. On
    CUDA it runs the kernels that `verify` takes by default, and provers run others; elsewhere only
    their attention is another.

    One half of the ``honest`` nonces calibrates the rules, the other one tests them.
    """

    reference: str
    dtype: str
    device: str | None
    block_hash: str
    seq_len: int
    batch_size: int
    honest: int
    presets: tuple[tuple[str, ...], ...] = (
        ("poc-2.0", "artifact"),
        ("hardened",),
    )  # those that read alike together

    def load(self) -> Model:
        """Load the model in the provers' number format; eight bits leave the rest in bfloat16."""
        quantise = self.dtype if self.dtype in NUMBER_FORMATS else None
        dtype = "bfloat16" if quantise else self.dtype
        model = load_model(self.reference, dtype=dtype, quantise=quantise, device=self.device)
        return model.with_frame(self.frame)

    @cached_property
    def frame(self) -> Frame | None:
        """Frame of the checkpoint, where the presets have one."""
        framed = get_pipeline(self.presets[0][0]).framed
        return (
            measure_frame(load_model(self.reference, dtype="float32", device=self.device))
            if framed
            else None
        )

    def engine_of(self, model: Model) -> HFEngine:
        """Return an engine of the field's batch shape."""
        return HFEngine(model, batch_size=self.batch_size, seq_len=self.seq_len)

    @cached_property
    def validator(self) -> HFEngine:
        """Engine of the validator, in float32, or in float8 against provers in that."""
        if (plain := validator_format(self.dtype)) != "float8":
            model = load_model(self.reference, dtype=plain, device=self.device)
            return self.engine_of(model.with_frame(self.frame))
        model = self.load()
        return HFEngine(
            model, batch_size=self.batch_size, seq_len=self.seq_len, compiled=worth_compiling(model)
        )

    @cached_property
    def prover(self) -> Model:
        """Model in the provers' dtype; in that of the validator with plain attention, or no bit
        would differ.
        """
        model = self.load()
        if self.dtype in ("float32", "float8"):
            model.module.set_attn_implementation("eager")
        return model

    @cached_property
    def engine(self) -> HFEngine:
        """Engine of the provers; attackers draw their inputs from it."""
        return self.engine_of(self.prover)

    @cached_property
    def scene(self) -> Scene:
        """Where the attackers work."""
        preset = self.presets[0][0]
        size = self.batch_size
        round = Round(
            block_hash=TRAINING_BLOCK, public_key="attacker", seq_len=self.seq_len, preset=preset
        )
        batches = [
            self.validator.embeddings(round.inputs(range(start, start + size)))
            for start in (0, size)
        ]
        of = [reading.of(range(size), self.seq_len) for reading in self.readings]
        guesses = Guesses(self.validator.model, torch.cat(batches), of)
        return Scene(
            model=self.prover, guesses=guesses, batch_size=self.batch_size, seq_len=self.seq_len
        )

    @cached_property
    def readings(self) -> tuple[Reading, ...]:
        """Readings of the presets, one for those that read alike."""
        return tuple(Reading(self.validator, self.round(names[0]), names) for names in self.presets)

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
        """States of the honest prover, [N, D] for each reading."""
        program = OnEngine(self.engine)
        return tuple(reading.states(program, self.engine, self.honest) for reading in self.readings)

    def each(self) -> Iterator[tuple[str, Reading, Tensor]]:
        """Yield every preset with its reading and the honest states of that."""
        for reading, x_ND in zip(self.readings, self.honest_states, strict=True):
            for preset in reading.presets:
                yield preset, reading, x_ND

    @cached_property
    def honest_residuals(self) -> dict[str, tuple[FloatArray, FloatArray]]:
        """Honest residuals of every preset: those that calibrate, and those that test, [N/2]
        each.
        """
        half = self.honest // 2
        by_preset = {
            preset: reading.residuals(preset, x_ND) for preset, reading, x_ND in self.each()
        }
        return {preset: (values[:half], values[half:]) for preset, values in by_preset.items()}

    @cached_property
    def judges(self) -> dict[str, Judge]:
        """Calibrated rules for every preset."""
        return {
            p: Judge(get_pipeline(p), calibrating)
            for p, (calibrating, _) in self.honest_residuals.items()
        }


def _fit_pair(pipeline: Pipeline, honest_N: FloatArray) -> Noise:
    """Return the noise of one pair of engines, with the error of its size."""
    law, error = fit_noise(pipeline, honest_N)
    return Noise(law, "the field", Spread(min(float(np.hypot(error, PAIR_SPREAD)), 0.99)))
