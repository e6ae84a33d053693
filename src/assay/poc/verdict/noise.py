"""Honest noise: a law of residuals, how well its scale is known, and the cheats that a verdict must
exclude.

The noise of responses has two laws, of their tokens and of their sketches. Their e-value is the
average E = (E_tokens + E_sketches)/2: both come from the same states, so their e-values are not
independent and must not be multiplied. A response is a cluster of values
(:class:`assay.stats.ClusterTest`). A verdict on responses is honest when each part that has seen
values excludes its cheats.

Suffixes: B blocks of 32 tokens, N tokens, G columns of a profile.
"""

import base64
import math
import shlex
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import asdict, dataclass, field, replace
from functools import cache, lru_cache
from pathlib import Path
from typing import Annotated, Any, Self

import numpy as np
import numpy.typing as npt
import scipy
from pydantic import AfterValidator, Field, PlainValidator, TypeAdapter

from assay import stats
from assay.errors import CalibrationError, UsageError
from assay.files.jsonl import JsonObject, dumps, read_json
from assay.poc.protocol.pipelines import SKETCH_EVERY, Pipeline
from assay.poc.protocol.round import Round
from assay.stats.cluster_test import ClusterResult
from assay.stats.e_values import CHEAP, EValueResult, decide
from assay.stats.law_fits import fit_log_noise, fit_scale_noise
from assay.stats.noise_laws import Spread, StrictLaw
from assay.stats.sequential import EXCLUDED
from assay.stats.token_law import COLUMNS, LEAST_LOG

FloatArray = npt.NDArray[np.float64]
Law = stats.NoiseLaw  # law of honest residuals

# Laws that were measured on the two bundled models, on a CPU and a GPU, with their digests. They
# hold for no other.
BUNDLED_LAWS = Path(__file__).with_name("bundled_noise.json")

# Smallest multiple of the honest noise that counts as another computation, where no measurement
# gives one. A vector shows a multiple in twelve numbers at once, and cheaper models come closer to
# it, so half is enough.
EFFECT = {"distance": 4.0, "vector": 2.0}

ALPHA = 1e-3
BETA = 1e-2  # usual bounds on the chance that an honest node is ever accused, and a cheat called honest
# version of the residual test: its cheats, weights and scales; another one computes other evidence
TEST = 2
VECTOR_STEP = 2.0**-11  # of a float16 between one half and one
LEAST_SCORE = 1e-6  # added to residuals over their typical size, so that zero has a logarithm
FARTHEST = 16.0  # a residual of a control over its typical size, or below it
WORTH = 0.9  # spread of ln residual that a control may leave at most
# typical residual of an honest node, over the smallest, of a computation that tells how far off a
# node is
NEAR = 2.0
MOST_SCORES = (
    1024  # honest residuals that are kept with a law, to price its bets; of more, as many quantiles
)
_KINDS: dict[str, TypeAdapter[Any]] = {
    "scale": TypeAdapter(stats.ScaleNoise),
    "log": TypeAdapter(stats.LogNoise),
}
_OF_RESIDUALS = ("a kind, scale or log, with its finite parameters", "calibrate")


@contextmanager
def _refusing(values: Any, wanted: str, command: str) -> Iterator[None]:
    """Say of values that cannot be read that they are no noise."""
    try:
        yield
    except (TypeError, ValueError, OverflowError, KeyError, AttributeError, UsageError):
        do = f"write the file with `assay poc {command}`"
        raise CalibrationError(f"noise {values!r:.120}", wanted=wanted, do=do) from None


def read_law(values: Any) -> Law:
    """Read a law; a CalibrationError where it is not one, or has a parameter that no measurement
    gives.
    """
    with _refusing(values, *_OF_RESIDUALS):
        parameters = dict(values)
        law: Law = _KINDS[parameters.pop("kind")].validate_json(dumps(parameters))
    return law


def _read_spread(values: Any) -> Spread:
    if set(values) != {"sd", "dof"}:
        raise ValueError(f"a spread of {values!r:.60}")
    return TypeAdapter(Spread).validate_json(dumps(values))


def pack_scores(residuals: npt.ArrayLike, law: Law) -> str:
    """Return the sizes of honest residuals over that of their law: base64 of logarithms in float16,
    in ascending order.

    Of more than :data:`MOST_SCORES`, as many quantiles are kept.
    """
    logs = np.sort(np.log(law.magnitudes(residuals) / law.size + LEAST_SCORE))
    if len(logs) > MOST_SCORES:
        logs = np.quantile(logs, (np.arange(MOST_SCORES) + 0.5) / MOST_SCORES)
    return base64.b64encode(logs.astype("<f2").tobytes()).decode()


def unpack_scores(text: str) -> FloatArray:
    """Return the sizes that :func:`pack_scores` wrote, over that of the law, [N]; a ValueError
    where it did not.
    """
    logs = np.frombuffer(base64.b64decode(text, validate=True), dtype="<f2").astype(np.float64)
    if len(logs) > MOST_SCORES or not np.isfinite(logs).all() or bool(np.any(np.diff(logs) < 0)):
        raise ValueError(f"{len(logs)} scores, or some that are not numbers in ascending order")
    return np.exp(logs)


def _check_scores(text: str) -> str:
    unpack_scores(text)
    return text


ReadLaw = Annotated[Law, PlainValidator(read_law)]
ReadSpread = Annotated[Spread, PlainValidator(_read_spread)]
Scores = Annotated[str, Field(max_length=4 * MOST_SCORES), AfterValidator(_check_scores)]
_Format = Annotated[str, Field(min_length=1, max_length=64)]
_Typical = tuple[Annotated[float, Field(ge=1e-12, le=2.0)], ...]


@dataclass(frozen=True, kw_only=True)
class Control(StrictLaw):
    """One or two more honest computations of every nonce, which say how hard the nonce is for any
    machine.

    A residual counts as a *score*: the geometric mean of the node's residuals from the validator's
    computations, over those between these computations, each to a power of its own, all in units of
    what is typical. Computations in a coarser format than the best are left out of the mean: their
    own noise hides how far off the node is.
    """

    of: _Format  # number format of the validator's first computation
    dtypes: Annotated[tuple[_Format, ...], Field(min_length=1, max_length=2)]  # those of the others
    usual: _Typical  # residual of an honest node from each computation, the first one first
    sizes: _Typical  # residual between each two of them, in the order of `itertools.combinations`
    powers: tuple[
        Annotated[float, Field(ge=0, le=1)], ...
    ]  # slopes of ln of the mean on those of each, if honest

    def __post_init__(self) -> None:
        count = len(self.dtypes) + 1
        fits = len(self.usual) == count and len(self.sizes) == len(self.powers) == math.comb(
            count, 2
        )
        if (
            not fits or not 0 < sum(self.powers) <= 1 + 1e-9
        ):  # a sum that was divided by itself may round up
            raise ValueError(
                f"sizes or powers of other computations than of {self.of} and "
                f"{', '.join(self.dtypes)}"
            )

    @classmethod
    def measured(
        cls, pairs: Sequence[tuple[FloatArray, FloatArray]], *, of: str, dtypes: Sequence[str]
    ) -> Self | None:
        """Return the control that honest machines give: for several of them residuals [E, N], and
        those between [P, N].

        It is None where it takes less than a tenth of the spread of the logarithms away, and is not
        worth its price.
        """
        if (
            not pairs
            or min(float(np.median(np.abs(one), axis=1).min()) for pair in pairs for one in pair)
            == 0.0
        ):
            return None  # machines that agree to the bit
        usual, sizes = (
            tuple(np.median(np.abs(np.hstack(side)), axis=1).tolist())
            for side in zip(*pairs, strict=True)
        )
        made = cls(
            of=of,
            dtypes=tuple(dtypes),
            usual=usual,
            sizes=sizes,
            powers=(1 / len(sizes),) * len(sizes),
        )
        logs = [
            np.vstack([made._node(node_EN), made._between(between_PN)])
            for node_EN, between_PN in pairs
        ]
        node_N, *between_PN = np.hstack(
            [one - np.median(one, axis=1, keepdims=True) for one in logs]
        )
        powers_P, _ = scipy.optimize.nnls(np.transpose(between_PN), node_N)
        powers_P /= max(1.0, powers_P.sum())
        worth = bool(np.std(node_N - powers_P @ between_PN) < WORTH * np.std(node_N))
        return replace(made, powers=tuple(powers_P.tolist())) if worth else None

    def scores(self, node_EN: npt.ArrayLike, between_PN: npt.ArrayLike) -> FloatArray:
        """Return scores, [N] in the unit of the first residual, from E residuals of each nonce and
        P between.

        A residual between computations counts as `FARTHEST` times its typical size at most, and as
        typical where it is zero or not finite, so it excuses no node. One of the node counts as a
        `FARTHEST`-th of its typical size at least: to equal one computation excuses little. Where
        one is missing, so is the score.
        """
        return np.asarray(
            self.usual[0] * np.exp(self._node(node_EN) - self.powers @ self._between(between_PN))
        )

    def _node(self, node_EN: npt.ArrayLike) -> FloatArray:
        near_E = np.array(self.usual) <= NEAR * min(self.usual)
        over_EN = (np.abs(np.asarray(node_EN, dtype=np.float64)) / np.array(self.usual)[:, None])[
            near_E
        ]
        return np.asarray(np.log(np.maximum(over_EN, 1 / FARTHEST)).mean(axis=0))

    def _between(self, between_PN: npt.ArrayLike) -> FloatArray:
        over_PN = np.abs(np.asarray(between_PN, dtype=np.float64)) / np.array(self.sizes)[:, None]
        says = np.isfinite(over_PN) & (over_PN > 0)
        return np.log(np.where(says, np.clip(over_PN, 1 / FARTHEST, FARTHEST), 1.0))


@dataclass(frozen=True)
class Noise(StrictLaw):
    """The honest law, its source, and what an honest verdict must exclude.

    Args:
        law: Law of honest residuals.
        source: Where the law comes from, in words.
        spread: Law of the scale of a machine over that of ``law``.
        effect: Smallest multiple of the noise that counts as another computation; that of
            :data:`EFFECT` when None.
        scores: Honest residuals that the law was measured on, as :func:`pack_scores` writes them:
            they price the bets of the test. Without them the law is believed.
        widest: Those of the pair of machines whose shape is the widest, which price the bets on a
            share.
        control: Other computations of each nonce, by which residuals are scores; None without one.
    """

    law: ReadLaw
    source: str = ""
    spread: ReadSpread = field(default_factory=Spread)
    effect: float | None = None
    scores: Scores = ""
    widest: Scores = ""
    control: Control | None = None

    @property
    def size(self) -> float:
        """A typical honest residual: sigma of a distance, or the median L2 distance of two
        vectors.
        """
        return self.law.size

    @property
    def shape(self) -> str:
        """All that a test rests on but the size and the words: two noises of one shape differ in
        their unit alone.
        """
        values = self.as_dict()
        return dumps(
            {name: value for name, value in values.items() if name not in ("sigma", "mu", "source")}
        )

    def scaled(self, factor: float) -> "Noise":
        """Return the noise where residuals, and controls as well, are ``factor`` times larger."""
        power = 0.0 if self.control is None else sum(self.control.powers)
        return replace(self, law=self.law.scaled(factor ** (1 - power)))

    def as_dict(self) -> dict[str, Any]:
        """Return JSON-ready values, which :meth:`from_dict` reads back."""
        values = {**law_as_dict(self.law), "source": self.source, "test": TEST}
        values |= {"spread": asdict(self.spread)} if self.spread.sd else {}
        values |= {"scores": self.scores, "widest": self.widest} if self.scores else {}
        values |= {} if self.control is None else {"control": asdict(self.control)}
        return values | ({"effect": self.effect} if self.effect is not None else {})

    @classmethod
    def from_dict(cls, values: Any) -> "Noise":
        """Read what :meth:`as_dict` wrote; a CalibrationError where it is no noise, or has a
        parameter out of range.
        """
        with _refusing(values, *_OF_RESIDUALS):
            law = dict(values)
            known = ("source", "effect", "spread", "scores", "widest", "control")
            rest = {name: law.pop(name) for name in known if name in law}
            law.pop("named", None)  # laws of known cheats, which earlier releases had
            check_version(law.pop("test", TEST), TEST, "the residual test")
            return TypeAdapter(cls).validate_json(dumps({"law": law, **rest}))


def bundled_noise(
    digest: str, output: str, prover_dtype: str, validator_dtype: str
) -> Noise | None:
    """Return the law of a bundled model between two number formats; None for any other model, which
    has no law.

    ``digest`` is the SHA-256 of the tensors of the checkpoint, ``output`` the family:
    :attr:`assay.poc.Pipeline.noise`. The order of the formats does not matter.
    """
    known = _bundled()
    pair = "/".join(sorted((prover_dtype, validator_dtype)))
    law = known["laws"].get(output, {}).get(pair) if is_bundled(digest) else None
    return None if law is None else Noise(read_law(law), f"measured on the bundled models, {pair}")


def is_bundled(digest: str) -> bool:
    """Return whether a checkpoint is one of the two whose laws come with assay."""
    return digest in _bundled()["digests"]


def missing_law(
    model: str, digest: str, round: Round, *, dtype: str | None = None, frame: Path | None = None
) -> str:
    """Return the sentence that says that a model has no law, and which command measures one.

    ``model``, ``dtype`` and ``frame`` are the reader's own values: the prover writes the header,
    and its words must not become a command.
    """
    flags = f" --frame {shlex.quote(str(frame))}" if frame is not None else ""
    flags += f" --dtype {dtype}" if dtype is not None else ""
    return (
        f"no law of honest noise was measured for checkpoint {digest[:12]}, preset {round.preset} "
        f"and these number formats: measure one with "
        f"`assay poc calibrate --model {shlex.quote(model[:200])} --preset {round.preset}{flags} "
        f"--seq-len {round.seq_len} -o calibration.json` (--quick takes minutes), and pass "
        f"--calibration"
    )


def fit_noise(pipeline: Pipeline, errors: FloatArray) -> tuple[Law, float]:
    """Fit a law to honest residuals [N] of a pipeline; return it with the standard error of the log
    of its size.
    """
    if pipeline.output == "distance":
        return fit_scale_noise(errors)
    # Rounded to float16, equal vectors may differ by a step. The published law came before that was
    # measured.
    floor = 1e-4 if pipeline.read == "last" and pipeline.output == "vector" else VECTOR_STEP
    return fit_log_noise(errors, dimension=pipeline.output_size(0, 0), floor=floor)


def law_as_dict(law: Law) -> dict[str, Any]:
    """Return the parameters of a law with its kind."""
    return {"kind": "scale" if isinstance(law, stats.ScaleNoise) else "log", **asdict(law)}


def check_version(found: Any, wanted: int, test: str) -> None:
    """Refuse noise for another version of a test."""
    if found != wanted:
        seen = f"noise for version {found!r:.20} of {test}"
        do = "read it with the release of assay that wrote it"
        raise CalibrationError(
            seen, wanted=f"version {wanted}, whose evidence this release can compute again", do=do
        )


def sequential_test(
    noise: Noise, *, alpha: float = ALPHA, beta: float = BETA
) -> stats.SequentialTest:
    """Return a fresh test of residuals against honest noise, with the rates of
    :class:`assay.stats.SequentialTest`.

    Every verdict comes from this test: in `verify`, the service, the validator and the experiments.

    Raises:
        UsageError: A rate is not in (0, 1), or the law is too wide for invented values to stand
            out.
    """
    return copy(
        _untouched_test(noise, alpha, beta)
    )  # a test replaces its numbers, and changes no array


@lru_cache(maxsize=256)
def _untouched_test(noise: Noise, alpha: float, beta: float) -> stats.SequentialTest:
    """Return the test that others are copies of: pricing its bets takes milliseconds, and lives are
    many.
    """
    effect = (
        noise.effect or EFFECT["distance" if isinstance(noise.law, stats.ScaleNoise) else "vector"]
    )
    rates = {"alpha": alpha, "beta": beta, "effect": effect}
    honest, widest = (
        unpack_scores(text) * noise.size if text else None for text in (noise.scores, noise.widest)
    )
    return stats.SequentialTest(
        noise.law, spread=noise.spread, honest=honest, widest=widest, **rates
    )


SAMPLES = (
    32,
    48,
    64,
    96,
    128,
)  # numbers of nonces among which a verifier chooses, where its caller does not choose
LARGEST_SAMPLE = SAMPLES[-1]
WANTED_POWER = 0.95  # at which a smaller sample is enough
_TRIALS = 300
_GRID = 4001  # points at which a law is inverted


def plan_sample(
    test: stats.SequentialTest | None, proved: int, sample: int | None = None
) -> tuple[int, float | None]:
    """Return how many nonces a verifier recomputes, and the power that this has.

    The power is the chance that the test accuses a node that computes a tenth of its nonces at 5 ×
    the honest noise. It is simulated under the law itself, with fixed seeds; its standard error is
    at most 3 points. Where no ``sample`` is asked for, it is the first of :data:`SAMPLES` with a
    power of 95 %, else the last, and at most the nonces that were ``proved``. Without a fresh test
    there is no power, and the least number is enough.
    """
    if test is None:
        return min(SAMPLES[0], proved) if sample is None else sample, None
    rng = np.random.default_rng(0)
    law = test.law
    shape = _TRIALS, min(LARGEST_SAMPLE, proved) if sample is None else sample
    grid = np.geomspace(law.size * 1e-4, law.size * 1e6, _GRID)
    honest_RC = np.interp(rng.random(shape), 1 - law.survival(grid), grid)
    cheap_RC = rng.random(shape) < EXCLUDED[0][0]
    power_C = test.accusations(np.where(cheap_RC, CHEAP * honest_RC, honest_RC)).mean(axis=0)
    enough = (
        count for count in SAMPLES if count <= power_C.size and power_C[count - 1] >= WANTED_POWER
    )
    size = next(enough, power_C.size) if sample is None else sample
    return size, float(power_C[size - 1])


@cache
def _bundled() -> JsonObject:
    return read_json(BUNDLED_LAWS)


KIND = "responses"
RESPONSE_TEST = 1  # version of the test of responses: its cheats, their weights and its scales


@dataclass(frozen=True, eq=False)
class ResponseBlocks:
    """The evidence of a response in blocks of 32 tokens, which the ledger calls its nonces."""

    distances: (
        FloatArray  # L2 distance of the sketch of every block, [B]; NaN where there is no sketch
    )
    profiles: (
        FloatArray  # of the tokens of all blocks, [N, G]; without a row where tokens say nothing
    )
    sizes: tuple[int, ...]  # number of the tokens of every block

    @classmethod
    def whole(cls, distances: npt.ArrayLike, profiles_NG: npt.ArrayLike) -> Self:
        """Return the evidence of a whole response; a UsageError where the tokens do not fill the
        blocks.
        """
        found = np.asarray(distances, dtype=np.float64)
        profiles = np.asarray(profiles_NG, dtype=np.float64)
        tokens = len(profiles)
        blocks = len(found)
        if profiles.shape[1:] != (COLUMNS,) or (
            tokens and math.ceil(tokens / SKETCH_EVERY) != blocks
        ):
            wanted = f"{COLUMNS} columns for each of {SKETCH_EVERY} tokens a block, or no tokens"
            do = "pass the evidence of one whole response"
            raise UsageError(
                f"profiles of shape {profiles.shape} in {blocks} blocks", wanted=wanted, do=do
            )
        starts = range(0, SKETCH_EVERY * blocks, SKETCH_EVERY)
        return cls(
            found, profiles, tuple(min(SKETCH_EVERY, max(0, tokens - start)) for start in starts)
        )

    @classmethod
    def parse(cls, distances: Sequence[float | None], text: str | None) -> Self:
        """Return the evidence of an entry of a ledger; a ValueError where the text has no profiles
        of these blocks.
        """
        content = base64.b64decode(text or "", validate=True)
        profiles = np.frombuffer(content, dtype="<f2").reshape(-1, COLUMNS).astype(np.float64)
        if not bool(np.all((profiles <= 0) & (profiles >= 2 * LEAST_LOG))):
            raise ValueError("a profile that is not of logarithms of probabilities")
        try:
            return cls.whole([math.nan if x is None else x for x in distances], profiles)
        except UsageError as error:
            raise ValueError(error.seen) from None

    @property
    def text(self) -> str | None:
        """The profiles as base64 of little-endian float16; None without tokens."""
        return (
            base64.b64encode(self.profiles.astype("<f2").tobytes()).decode()
            if len(self.profiles)
            else None
        )

    def __len__(self) -> int:
        return len(self.sizes)

    def without(self, places: Collection[int]) -> "ResponseBlocks":
        """Return the evidence without some of the blocks."""
        kept = [place for place in range(len(self)) if place not in places]
        of_token = np.repeat(np.arange(len(self)), self.sizes)
        sizes = tuple(self.sizes[place] for place in kept)
        return ResponseBlocks(self.distances[kept], self.profiles[np.isin(of_token, kept)], sizes)


def _read_part_law(values: Any) -> Any:
    of_tokens = set(values) == {"weights"}
    return (
        TypeAdapter(stats.TokenNoise).validate_json(dumps(values))
        if of_tokens
        else read_law(values)
    )


@dataclass(frozen=True, kw_only=True)
class PartNoise(StrictLaw):
    """Honest noise of the tokens or of the sketches of responses: arguments of
    :class:`assay.stats.ClusterTest`.
    """

    law: Annotated[stats.TokenNoise | stats.LogNoise, PlainValidator(_read_part_law)]
    spread: ReadSpread
    between: float = 0.0
    effect: float = 2.0

    def as_dict(self) -> dict[str, Any]:
        """Return JSON-ready values."""
        law = self.law
        values = (
            {"weights": list(law.weights)}
            if isinstance(law, stats.TokenNoise)
            else law_as_dict(law)
        )
        return asdict(self) | {"law": values}


@dataclass(frozen=True, kw_only=True)
class ResponseNoise(StrictLaw):
    """Honest noise of claimed tokens, in units of the logits, and of sketches, as L2 distances; its
    source in words.
    """

    tokens: PartNoise
    sketches: PartNoise
    source: str

    def as_dict(self) -> dict[str, Any]:
        """Return JSON-ready values, which :meth:`from_dict` reads back."""
        parts = {"tokens": self.tokens.as_dict(), "sketches": self.sketches.as_dict()}
        return {"kind": KIND, **parts, "source": self.source, "test": RESPONSE_TEST}

    @classmethod
    def from_dict(cls, values: Any) -> Self:
        """Read what :meth:`as_dict` wrote; a CalibrationError where it is not that, or of another
        version.
        """
        with _refusing(
            values,
            "the laws of tokens and sketches with their finite parameters",
            "calibrate-responses",
        ):
            parts = dict(values)
            if parts.pop("kind") != KIND:
                raise ValueError
            check_version(parts.pop("test"), RESPONSE_TEST, "the test of responses")
            made = TypeAdapter(cls).validate_json(dumps(parts))
            if (type(made.tokens.law), type(made.sketches.law)) != (
                stats.TokenNoise,
                stats.LogNoise,
            ):
                raise ValueError
            ResponseTest(made)  # refuses laws of which no test can be made
        return made


@dataclass(frozen=True, slots=True)
class ResponseResult(EValueResult):
    """All numbers behind a verdict on responses, by the average of the e-values of tokens and
    sketches.
    """

    responses: int
    tokens: ClusterResult
    sketches: ClusterResult


class ResponseTest:
    """The test of responses: feed it one after the other. Rates and refusals are
    :class:`assay.stats.ClusterTest`'s.
    """

    def __init__(self, noise: ResponseNoise, *, alpha: float = ALPHA, beta: float = BETA) -> None:
        self.noise = noise
        self.alpha = alpha
        self.beta = beta
        rates = {"alpha": alpha, "beta": beta}
        self.tokens, self.sketches = (
            stats.ClusterTest(
                part.law, spread=part.spread, between=part.between, effect=part.effect, **rates
            )
            for part in (noise.tokens, noise.sketches)
        )
        self._log_e = self._log_e_max = 0.0
        self._n = self._responses = 0

    def update(self, response: ResponseBlocks) -> Self:
        """Take the evidence of one response."""
        if len(response):
            seen = np.isfinite(response.distances)
            tokens_B = self.tokens.take(response.profiles, np.cumsum(response.sizes).tolist())
            sketches_B = self.sketches.take(response.distances[seen], np.cumsum(seen).tolist())
            logs_B = np.logaddexp(tokens_B, sketches_B) - math.log(2)
            self._log_e = float(logs_B[-1])
            self._log_e_max = max(self._log_e_max, float(logs_B.max()))
            self._n += len(response)
            self._responses += 1
        return self

    @property
    def result(self) -> ResponseResult:
        """The verdict with every number that it rests on."""
        tokens = self.tokens.result
        sketches = self.sketches.result
        evidence = min(
            (part.log_evidence_honest for part in (tokens, sketches) if part.n), default=0.0
        )
        return ResponseResult(
            verdict=decide(self._log_e_max, evidence, alpha=self.alpha, beta=self.beta),
            n=self._n,
            responses=self._responses,
            log_e_value=self._log_e,
            log_e_max=self._log_e_max,
            log_evidence_honest=evidence,
            tokens=tokens,
            sketches=sketches,
        )


AnyNoise = Noise | ResponseNoise  # honest noise of proofs or of responses


def noise_from_dict(values: Any) -> AnyNoise:
    """Read the noise of proofs or of responses; a CalibrationError where the values are neither."""
    of_responses = isinstance(values, Mapping) and values.get("kind") == KIND
    return ResponseNoise.from_dict(values) if of_responses else Noise.from_dict(values)
