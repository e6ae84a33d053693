"""Honest noise of responses: the laws of their tokens and their sketches, and the test of both.

The e-value of responses is the average E = (E_tokens + E_sketches)/2. Tokens and sketches come from the same states, so
their e-values are not independent and must not be multiplied. A response is a cluster of values
(:class:`assay.stats.ClusterTest`). The verdict is honest when each part that has seen values excludes its cheats.

Suffixes: B blocks of 32 tokens, N tokens, G columns of a profile.
"""

import base64
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import accumulate
from types import MappingProxyType
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from assay import stats
from assay.errors import CalibrationError, UsageError
from assay.poc.protocol.pipelines import SKETCH_EVERY
from assay.poc.verdict.noise import (
    Noise,
    check_version,
    law_as_dict,
    read_fields,
    read_law,
    read_named,
    read_number,
    read_source,
    read_spread,
    sequential_test,
)
from assay.stats.clusters import ClusterResult
from assay.stats.noise import Spread
from assay.stats.sequential import Verdict, decide
from assay.stats.tokens import COLUMNS, LEAST_LOG

KIND = "responses"
TEST = 1
"""Version of the test of responses: its cheats, their weights and its scales."""

FloatArray = npt.NDArray[np.float64]
PartLaw = stats.TokenNoise | stats.LogNoise


@dataclass(frozen=True, eq=False)
class ResponseBlocks:
    """The evidence of a response in blocks of 32 tokens, which the ledger calls its nonces.

    Args:
        distances: L2 distance of the sketch of every block, [B]; NaN where there is no sketch.
        profiles: Profiles of the tokens of all blocks, [N, G]; without a row where tokens say nothing.
        sizes: Number of the tokens of every block.
    """

    distances: FloatArray
    profiles: FloatArray
    sizes: tuple[int, ...]

    @classmethod
    def whole(cls, distances: npt.ArrayLike, profiles_NG: npt.ArrayLike) -> Self:
        """Return the evidence of a whole response.

        Raises:
            UsageError: The tokens do not fill the blocks.
        """
        found, profiles = np.asarray(distances, dtype=np.float64), np.asarray(profiles_NG, dtype=np.float64)
        tokens, blocks = len(profiles), len(found)
        if profiles.shape[1:] != (COLUMNS,) or (tokens and math.ceil(tokens / SKETCH_EVERY) != blocks):
            raise UsageError(
                f"profiles of shape {profiles.shape} in {blocks} blocks",
                wanted=f"{COLUMNS} columns for each of {SKETCH_EVERY} tokens a block, or no tokens",
                do="pass the evidence of one whole response",
            )
        starts = range(0, SKETCH_EVERY * blocks, SKETCH_EVERY)
        return cls(found, profiles, tuple(min(SKETCH_EVERY, max(0, tokens - start)) for start in starts))

    @classmethod
    def parse(cls, distances: Sequence[float | None], text: str | None) -> Self:
        """Return the evidence that an entry of a ledger holds.

        Raises:
            ValueError: The text does not hold profiles of these blocks.
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
        return base64.b64encode(self.profiles.astype("<f2").tobytes()).decode() if len(self.profiles) else None

    @property
    def ends(self) -> list[int]:
        """Number of tokens up to the end of every block."""
        return list(accumulate(self.sizes))

    def __len__(self) -> int:
        return len(self.sizes)

    def without(self, places: Collection[int]) -> "ResponseBlocks":
        """Return the evidence without some of the blocks."""
        kept = [place for place in range(len(self)) if place not in places]
        of_token = np.repeat(np.arange(len(self)), self.sizes)
        sizes = tuple(self.sizes[place] for place in kept)
        return ResponseBlocks(self.distances[kept], self.profiles[np.isin(of_token, kept)], sizes)


@dataclass(frozen=True, kw_only=True)
class PartNoise:
    """Honest noise of the tokens or of the sketches of responses.

    Args:
        law: Law of one value.
        spread: Law of the scale of a machine over that of ``law``.
        between: Spread of ln scale between the responses of one machine.
        effect: Smallest multiple of the noise that an honest verdict excludes.
        named: Laws of known cheats by name.
    """

    law: PartLaw
    spread: Spread
    between: float = 0.0
    effect: float = 2.0
    named: Mapping[str, PartLaw] = field(default_factory=lambda: MappingProxyType({}))

    def scaled(self, factor: float) -> "PartNoise":
        """Return the noise ``factor`` times larger, that of the known cheats included."""
        named = {name: law.scaled(factor) for name, law in self.named.items()}
        return replace(self, law=self.law.scaled(factor), named=named)

    def test(self, *, alpha: float, beta: float) -> stats.ClusterTest:
        """Return a fresh test of this noise."""
        return stats.ClusterTest(
            self.law,
            spread=self.spread,
            between=self.between,
            named=self.named,
            alpha=alpha,
            beta=beta,
            effect=self.effect,
        )

    def as_dict(self) -> dict[str, Any]:
        """Return JSON-ready values, which :meth:`from_dict` reads back."""
        values: dict[str, Any] = {"law": _law_as_dict(self.law), "spread": asdict(self.spread)}
        values |= {"between": self.between, "effect": self.effect}
        return values | ({"named": {name: _law_as_dict(law) for name, law in self.named.items()}} if self.named else {})

    @classmethod
    def from_dict(cls, values: Any, read: Callable[[Any], PartLaw]) -> Self:
        """Read what :meth:`as_dict` wrote, with the reader of its laws.

        Raises:
            ValueError: A value is not of its kind. TypeError, KeyError and UsageError mean the same.
        """
        return read_fields(cls, values, law=read, spread=read_spread, named=lambda laws: read_named(laws, read))


@dataclass(frozen=True, kw_only=True)
class ResponseNoise:
    """Honest noise of responses.

    Args:
        tokens: Noise of claimed tokens, in units of the logits.
        sketches: Noise of sketches, as L2 distances.
        source: Where it comes from, in words.
    """

    tokens: PartNoise
    sketches: PartNoise
    source: str

    def scaled(self, factor: float) -> "ResponseNoise":
        """Return the noise ``factor`` times larger."""
        return replace(self, tokens=self.tokens.scaled(factor), sketches=self.sketches.scaled(factor))

    def as_dict(self) -> dict[str, Any]:
        """Return JSON-ready values, which :meth:`from_dict` reads back."""
        parts = {"tokens": self.tokens.as_dict(), "sketches": self.sketches.as_dict()}
        return {"kind": KIND, **parts, "source": self.source, "test": TEST}

    @classmethod
    def from_dict(cls, values: Any) -> Self:
        """Read what :meth:`as_dict` wrote.

        Raises:
            CalibrationError: The values are not the noise of responses, or are for another version of the test.
        """
        try:
            parts = dict(values)
            if parts.pop("kind") != KIND:
                raise ValueError
            check_version(parts.pop("test"), TEST, "the test of responses")
            made = read_fields(
                cls,
                parts,
                tokens=lambda part: PartNoise.from_dict(part, _read_token_law),
                sketches=lambda part: PartNoise.from_dict(part, _read_sketch_law),
                source=read_source,
            )
            ResponseTest(made)  # refuses laws of which no test can be made
        except (TypeError, ValueError, KeyError, AttributeError, OverflowError, UsageError):
            raise CalibrationError(
                f"noise {values!r:.120}",
                wanted="the laws of tokens and sketches with their finite parameters",
                do="write the file with `assay poc calibrate-responses`",
            ) from None
        return made


@dataclass(frozen=True, slots=True, kw_only=True)
class ResponseResult:
    """All numbers behind a verdict on responses; the logarithms are natural ones.

    Args:
        verdict: Verdict by :func:`assay.stats.sequential.decide`.
        n: Number of blocks of 32 tokens.
        responses: Number of responses.
        log_e_value: Logarithm of the average of the e-values of tokens and sketches.
        log_e_max: Running maximum of that over the blocks.
        log_evidence_honest: Least evidence of the parts that have seen values.
        tokens: Numbers of the test of tokens.
        sketches: Numbers of the test of sketches.
    """

    verdict: Verdict
    n: int
    responses: int
    log_e_value: float
    log_e_max: float
    log_evidence_honest: float
    tokens: ClusterResult
    sketches: ClusterResult


class ResponseTest:
    """The test of responses: feed it one response after the other, read the verdict at any time.

    Args:
        noise: Honest noise of responses.
        alpha: Bound on the chance that an honest node is ever accused.
        beta: Bound on the chance that a cheat which an honest verdict excludes is called honest.

    Raises:
        UsageError: A rate is out of range.
    """

    def __init__(self, noise: ResponseNoise, *, alpha: float = 1e-3, beta: float = 1e-2) -> None:
        self.noise, self.alpha, self.beta = noise, alpha, beta
        self.tokens = noise.tokens.test(alpha=alpha, beta=beta)
        self.sketches = noise.sketches.test(alpha=alpha, beta=beta)
        self._log_e = self._log_e_max = 0.0
        self._n = self._responses = 0

    def update(self, response: ResponseBlocks) -> Self:
        """Take the evidence of one response."""
        if len(response):
            seen = np.isfinite(response.distances)
            tokens_B = self.tokens.take(response.profiles, response.ends)
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
        tokens, sketches = self.tokens.result, self.sketches.result
        evidence = min((part.log_evidence_honest for part in (tokens, sketches) if part.n), default=0.0)
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


AnyNoise = Noise | ResponseNoise
"""Honest noise of proofs or of responses."""


def noise_from_dict(values: Any) -> AnyNoise:
    """Read the noise of proofs or of responses.

    Raises:
        CalibrationError: The values are not a noise.
    """
    of_responses = isinstance(values, Mapping) and values.get("kind") == KIND
    return ResponseNoise.from_dict(values) if of_responses else Noise.from_dict(values)


def new_test(noise: AnyNoise, *, alpha: float, beta: float) -> stats.SequentialTest | ResponseTest:
    """Return a fresh test of residuals, or of responses, against honest noise."""
    if isinstance(noise, ResponseNoise):
        return ResponseTest(noise, alpha=alpha, beta=beta)
    return sequential_test(noise, alpha=alpha, beta=beta)


def _law_as_dict(law: PartLaw) -> dict[str, Any]:
    return {"weights": list(law.weights)} if isinstance(law, stats.TokenNoise) else law_as_dict(law)


def _read_token_law(values: Any) -> stats.TokenNoise:
    return read_fields(stats.TokenNoise, values, weights=lambda weights: tuple(map(read_number, weights)))


def _read_sketch_law(values: Any) -> stats.LogNoise:
    law = read_law(values)
    if not isinstance(law, stats.LogNoise):
        raise ValueError("a law of another kind")
    return law
