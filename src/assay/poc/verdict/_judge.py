"""The judge: received values against recomputed ones of the same nonces, and how far honest engines differ."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from assay import stats
from assay.errors import CalibrationError, UsageError
from assay.poc.protocol import DistanceRecord, Header, Pins, Proof, Record, VectorRecord
from assay.reports import JsonObject, read_json

Law = stats.NoiseLaw

MARGIN = 2.0
"""Factor of the stated defaults over the measured noise, so that they hold for models and machines not measured."""

# The smallest multiple of the honest noise that counts as another computation. Vectors show a
# multiple in twelve numbers at once, and cheaper models come closer to them: half is enough.
EFFECT = {"distance": 4.0, "vector": 2.0}

P_FLIP = 5e-4  # honest mismatch rate that the published rule assumes
COUNT_ALPHA = 0.01
DIST_THRESHOLD = 0.02  # published defaults of the vector count test
P_MISMATCH = 0.001

DEFAULT_LAWS = Path(__file__).with_name("default_noise.json")  # written by benchmarks/default_noise.py --install
EXIT_CODES: dict[stats.Verdict, int] = {"honest": 0, "fraud": 1, "undecided": 2}


@dataclass(frozen=True)
class Noise:
    """The honest law and where it comes from, in words."""

    law: Law
    source: str

    @property
    def size(self) -> float:
        """A typical honest residual: sigma of a distance, or the median L2 distance of two vectors."""
        return self.law.sigma if isinstance(self.law, stats.ScaleNoise) else math.exp(self.law.mu)

    def as_dict(self) -> dict[str, Any]:
        """Return JSON-ready values."""
        return {**law_as_dict(self.law), "source": self.source}


def default_noise(output: str, prover_dtype: str, validator_dtype: str) -> Noise:
    """Return the stated default for a pair of dtypes, as measured by benchmarks/default_noise.py.

    Args:
        output: Family of noise: :attr:`assay.poc.Pipeline.noise`.
        prover_dtype: Dtype of one engine.
        validator_dtype: Dtype of the other engine; the order does not matter.

    Raises:
        CalibrationError: No default was measured for this pair.
    """
    pair = "/".join(sorted((prover_dtype, validator_dtype)))
    laws = _defaults()["laws"].get(output, {})
    found = laws.get(pair)
    if found is None:
        raise CalibrationError(
            f"no default noise between {prover_dtype} and {validator_dtype}",
            wanted="one of " + ", ".join(laws),
            do="measure it with `assay poc calibrate A.jsonl B.jsonl` and pass --calibration",
        )
    return Noise(law_from_dict(found), f"default for {pair}, of the bundled models")


def law_as_dict(law: Law) -> dict[str, Any]:
    """Return the parameters of a law with its kind."""
    return {"kind": "scale" if isinstance(law, stats.ScaleNoise) else "log", **asdict(law)}


def law_from_dict(values: Any) -> Law:
    """Read a law back.

    Raises:
        CalibrationError: The values are not a law, or a parameter is not a finite number.
    """
    try:
        parameters = dict(values)
        kind = {"scale": stats.ScaleNoise, "log": stats.LogNoise}[parameters.pop("kind")]
        if not all(type(value) in (int, float) and math.isfinite(value) for value in parameters.values()):
            raise ValueError
        law: Law = kind(**parameters)
        return law
    except (TypeError, ValueError, OverflowError, KeyError, AttributeError, UsageError):
        raise CalibrationError(
            f"noise {values!r:.120}",
            wanted="a kind, scale or log, with its finite parameters",
            do="write the file with `assay poc calibrate`",
        ) from None


@cache
def _defaults() -> JsonObject:
    return read_json(DEFAULT_LAWS)


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """The result of a verification.

    Args:
        verdict: Outcome of the sequential test: honest, fraud, or undecided.
        reason: Numbers that decided, in one sentence.
        checked: Number of recomputed nonces.
        proved: Number of nonces in the proof.
        sequential: Sequential test on the residuals (distances) or on their logarithms (vectors).
        count: Published rule: flips across r_target, or vectors further off than the threshold.
        noise: Honest noise that was assumed, and where it comes from.
        residuals: Received minus recomputed distance, or L2 distance of the vectors, per checked nonce.
        nonces: Nonces that were checked.
        sample_seed: Number that draws the same sample again.
        header: Header of the proof, every value of which agrees with the pins.
        pins: Values that the validator gave.
    """

    verdict: stats.Verdict
    reason: str
    checked: int
    proved: int
    sequential: stats.SequentialResult
    count: stats.CountTest
    noise: Noise
    residuals: tuple[float, ...]
    nonces: tuple[int, ...]
    sample_seed: int
    header: Header
    pins: Pins

    @property
    def honest(self) -> bool:
        """Whether the verdict is honest."""
        return self.verdict == "honest"

    @property
    def fraud(self) -> bool:
        """Whether the verdict is fraud."""
        return self.verdict == "fraud"

    @property
    def unpinned(self) -> tuple[str, ...]:
        """Names of the values that were taken on the prover's word, by the names of :class:`Pins`."""
        return self.pins.unpinned(self.header)

    @property
    def exit_code(self) -> int:
        """0 for an honest proof of which nothing was taken on the prover's word, 1 for fraud, 2 for anything else."""
        return 2 if self.honest and self.unpinned else EXIT_CODES[self.verdict]

    def as_dict(self) -> dict[str, Any]:
        """Return the verdict as JSON-ready values; a residual that is not a number is null."""
        header = self.header
        values = asdict(self) | {"noise": self.noise.as_dict()}
        values["residuals"] = [value if math.isfinite(value) else None for value in self.residuals]
        del values["header"], values["pins"]
        stated = {name: getattr(header.round, name) for name in ("block_hash", "public_key", "model", "preset")}
        stated |= {"digest": header.digest, "dtype": header.fingerprint.dtype}
        believed = {"pinned": self.pins.given, "unpinned": self.unpinned}
        return {"schema": "assay.poc.verdict/1", **values, **stated, **believed}


def sequential_test(law: Law, *, alpha: float = 1e-3, beta: float = 1e-2) -> stats.SequentialTest:
    """Return a fresh test of residuals against an honest law, at the effect of what the law describes.

    Every verdict comes from this test: that of `verify`, of the service, and of the experiments.

    Args:
        law: Honest noise of distances, or of vectors.
        alpha: Bound on the chance that an honest node is ever accused.
        beta: Bound on the chance that noise of :data:`EFFECT` times the honest size is called honest.

    Raises:
        UsageError: A rate is not in (0, 1), or the law is too wide for invented values to stand out.
    """
    effect = EFFECT["distance" if isinstance(law, stats.ScaleNoise) else "vector"]
    return stats.SequentialTest(law, alpha=alpha, beta=beta, effect=effect)


def residuals(received: Sequence[Record], recomputed: Sequence[Record]) -> np.ndarray:
    """Return received minus recomputed distance, or the L2 distance of the vectors, [N] in float64.

    A missing or non-finite value gives NaN, which every test counts as a mismatch.
    """
    return np.array([_residual(a, b) for a, b in zip(received, recomputed, strict=True)])


def judge(
    proof: Proof,
    received: Sequence[Record],
    recomputed: Sequence[Record],
    noise: Noise,
    *,
    pins: Pins | None = None,
    test: stats.SequentialTest | None = None,
    seed: int = 0,
) -> Verdict:
    """Judge received records against recomputed ones of the same nonces.

    Args:
        proof: Proof that the received records are a sample of.
        received: Records of the sample.
        recomputed: Records of the same nonces in the same order.
        noise: Honest noise between the two engines.
        pins: Values that the validator gave, with which the header agrees; nothing when None.
        test: Fresh test that takes the residuals; one of the honest law at the usual error rates when None.
        seed: Number that drew the sample.
    """
    header = proof.header
    errors = residuals(received, recomputed)
    result = (test or sequential_test(noise.law)).update(errors).result
    if header.pipeline.output == "vector":
        count = count_mismatches(errors)
    else:
        pairs = [
            (a.distance, b.distance)
            for a, b in zip(received, recomputed, strict=True)
            if isinstance(a, DistanceRecord) and isinstance(b, DistanceRecord) and header.is_valid(a)
        ]
        count = published_rule([a for a, _ in pairs], [b for _, b in pairs], header.round.r_target)
    return Verdict(
        verdict=result.verdict,
        reason=_reason(result),
        checked=len(received),
        proved=proof.footer.records,
        sequential=result,
        count=count,
        noise=noise,
        residuals=tuple(float(value) for value in errors),
        nonces=tuple(record.nonce for record in received),
        sample_seed=seed,
        header=header,
        pins=pins or Pins(),
    )


def _residual(a: Record, b: Record) -> float:
    if isinstance(a, DistanceRecord) and isinstance(b, DistanceRecord):
        return a.distance - b.distance
    if isinstance(a, VectorRecord) and isinstance(b, VectorRecord) and a.vector.shape == b.vector.shape:
        return float(np.linalg.norm(a.vector.astype(np.float64) - b.vector.astype(np.float64)))
    return math.nan


def _reason(result: stats.SequentialResult) -> str:
    if result.verdict == "fraud":
        return f"e-value e^{result.log_e_max:.1f} passes 1/{result.alpha:g}: honest noise does not give such residuals"
    share = f"an invented share above {result.junk_share_excluded:.1%} is excluded"
    if result.verdict == "honest":
        return f"evidence e^{result.log_evidence_honest:.1f} against {result.effect:g} times the honest noise; {share}"
    return f"{result.n} nonces are too few to decide at error rates {result.alpha:g} and {result.beta:g}: check more"


def published_rule(received: Sequence[float], recomputed: Sequence[float], r_target: float) -> stats.CountTest:
    """Apply the published rule to nonces that were claimed valid.

    A mismatch is a received distance at or above ``r_target``, or a recomputed one above it. A value
    that is not finite is a mismatch. Fraud if a binomial test of the count against 5e-4 gives p < 0.01.
    """
    pairs = zip(received, recomputed, strict=True)
    mismatches = sum(not (a < r_target and b <= r_target) for a, b in pairs)
    return stats.count_test(mismatches, len(received), P_FLIP, COUNT_ALPHA)


def count_mismatches(
    distances: np.ndarray,
    *,
    threshold: float = DIST_THRESHOLD,
    p_mismatch: float = P_MISMATCH,
    alpha: float = COUNT_ALPHA,
) -> stats.CountTest:
    """Count vectors [N] whose L2 distance is above the threshold or not finite, and test the count."""
    mismatches = int(np.count_nonzero(~(distances <= threshold)))
    return stats.count_test(mismatches, len(distances), p_mismatch, alpha)
