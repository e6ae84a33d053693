"""The judge: received values against recomputed ones of the same nonces."""

import math
from collections.abc import Sequence

import numpy as np

from assay import stats
from assay.poc.protocol import DistanceRecord, Pins, Proof, Record, VectorRecord
from assay.poc.verdict._noise import Law, Noise
from assay.poc.verdict._verdict import Verdict, count_mismatches, published_rule

__all__ = ["EFFECT", "judge", "residuals", "sequential_test"]

# The smallest multiple of the honest noise that counts as another computation. Vectors show a
# multiple in twelve numbers at once, and cheaper models come closer to them: half is enough.
EFFECT = {"distance": 4.0, "vector": 2.0}


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
