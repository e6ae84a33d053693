"""Honest noise of responses, and their test.

The noise of responses has two laws, of their tokens and of their sketches. Their e-value is the
average E = (E_tokens + E_sketches)/2: both come from the same states, so their e-values are not
independent and must not be multiplied. A response is a cluster of values
(:class:`assay.stats.ClusterTest`). A verdict on responses is honest when each part that has seen
values excludes its cheats.

Suffixes: B blocks of 32 tokens, N tokens, G columns of a profile.
"""

import base64
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Self

import numpy as np
import numpy.typing as npt
from pydantic import Field, PlainValidator, TypeAdapter

from assay import stats
from assay.errors import UsageError
from assay.files.jsonl import dumps
from assay.poc.protocol.pipelines import SKETCH_EVERY
from assay.poc.verdict.honest_noise import (
    Noise,
    ReadSpread,
    check_version,
    law_as_dict,
    read_law,
    refusing,
)
from assay.poc.verdict.sample_plan import ALPHA, BETA
from assay.stats.chord import FloatArray
from assay.stats.cluster_test import ClusterResult
from assay.stats.e_values import EValueResult, decide
from assay.stats.noise_laws import StrictLaw
from assay.stats.token_law import COLUMNS, LEAST_LOG

KIND = "responses"
# Version of the test of responses: its cheats, their weights and its scales.
RESPONSE_TEST = 1
# Times the honest noise that a cheat may have: a calibration states one of them.
EFFECTS = tuple(2.0**k for k in range(1, 25))


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
        """Return the evidence of a whole response; a UsageError if tokens do not fill blocks."""
        distances_B = np.asarray(distances, dtype=np.float64)
        profiles = np.asarray(profiles_NG, dtype=np.float64)
        tokens = len(profiles)
        blocks = len(distances_B)
        if profiles.shape[1:] != (COLUMNS,) or (
            tokens and math.ceil(tokens / SKETCH_EVERY) != blocks
        ):
            raise UsageError(
                f"profiles of shape {profiles.shape} in {blocks} blocks",
                wanted=f"{COLUMNS} columns for each of {SKETCH_EVERY} tokens a block, or no tokens",
                do="pass the evidence of one whole response",
            )
        starts = range(0, SKETCH_EVERY * blocks, SKETCH_EVERY)
        return cls(
            distances_B,
            profiles,
            tuple(min(SKETCH_EVERY, max(0, tokens - start)) for start in starts),
        )

    @classmethod
    def parse(cls, distances: Sequence[float | None], text: str | None) -> Self:
        """Return the evidence of a ledger entry; a ValueError without profiles of these blocks."""
        numbers = np.frombuffer(base64.b64decode(text or "", validate=True), dtype="<f2")
        profiles = numbers.reshape(-1, COLUMNS).astype(np.float64)
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
        counted = [place for place in range(len(self)) if place not in places]
        of_token = np.repeat(np.arange(len(self)), self.sizes)
        sizes = tuple(self.sizes[place] for place in counted)
        return ResponseBlocks(
            self.distances[counted], self.profiles[np.isin(of_token, counted)], sizes
        )


def _read_part_law(values: Any) -> Any:
    of_tokens = set(values) == {"weights"}
    return (
        TypeAdapter(stats.TokenNoise).validate_json(dumps(values))
        if of_tokens
        else read_law(values)
    )


@dataclass(frozen=True, kw_only=True)
class PartNoise(StrictLaw):
    """Honest noise of tokens or sketches: arguments of :class:`assay.stats.ClusterTest`."""

    law: Annotated[stats.TokenNoise | stats.LogNoise, PlainValidator(_read_part_law)]
    spread: ReadSpread
    between: float = 0.0
    effect: Annotated[float, Field(le=EFFECTS[-1])] = 2.0  # scales of far larger ones overflow

    def as_dict(self) -> dict[str, Any]:
        """Return JSON-ready values."""
        return asdict(self) | {
            "law": {"weights": list(self.law.weights)}
            if isinstance(self.law, stats.TokenNoise)
            else law_as_dict(self.law)
        }


@dataclass(frozen=True, kw_only=True)
class ResponseNoise(StrictLaw):
    """Honest noise of claimed tokens (in logits) and of sketches (L2), with its source."""

    tokens: PartNoise
    sketches: PartNoise
    source: str

    def as_dict(self) -> dict[str, Any]:
        """Return JSON-ready values, which :meth:`from_dict` reads back."""
        return {
            "kind": KIND,
            "tokens": self.tokens.as_dict(),
            "sketches": self.sketches.as_dict(),
            "source": self.source,
            "test": RESPONSE_TEST,
        }

    @classmethod
    def from_dict(cls, values: Any) -> Self:
        """Read what :meth:`as_dict` wrote; a CalibrationError if it is malformed."""
        with refusing(
            values,
            "the laws of tokens and sketches with their finite parameters",
            "calibrate-responses",
        ):
            parts = dict(values)
            if parts.pop("kind") != KIND:
                raise ValueError
            check_version(parts.pop("test"), RESPONSE_TEST, "the test of responses")
            noise = TypeAdapter(cls).validate_json(dumps(parts))
            if (type(noise.tokens.law), type(noise.sketches.law)) != (
                stats.TokenNoise,
                stats.LogNoise,
            ):
                raise ValueError
            # Refuses laws of which no test can be made.
            ResponseTest(noise)
        return noise


@dataclass(frozen=True, slots=True)
class ResponseResult(EValueResult):
    """All numbers behind a verdict on responses, from averaged e-values."""

    responses: int
    tokens: ClusterResult
    sketches: ClusterResult


class ResponseTest:
    """The sequential test of responses, with the rates of :class:`assay.stats.ClusterTest`."""

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
