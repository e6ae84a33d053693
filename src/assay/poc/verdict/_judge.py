"""The judge: received values against recomputed ones of the same nonces."""

import math
from collections.abc import Sequence

import numpy as np

from assay import stats
from assay.poc.protocol import Header, Proof, Record
from assay.poc.verdict._noise import Noise
from assay.poc.verdict._verdict import Verdict, count_mismatches, seed_rule

__all__ = ["EFFECT", "judge", "new_test", "residuals"]

# The smallest multiple of the honest noise that counts as another computation. Vectors show a
# multiple in twelve numbers at once, and cheaper models come closer to them: half is enough.
EFFECT = {"distance": 4.0, "vector": 2.0}


def residuals(received: Sequence[Record], recomputed: Sequence[Record]) -> np.ndarray:
    """Return received minus recomputed distance, or the L2 distance of the vectors, [N] in float64.

    A missing or non-finite value gives NaN, which every test counts as a mismatch.
    """
    if any(record.vector is not None for record in recomputed):
        pairs = [(a.vector, b.vector) for a, b in zip(received, recomputed, strict=True)]
        return np.array([_l2(a, b) for a, b in pairs])
    return np.array([a.distance - b.distance for a, b in zip(received, recomputed, strict=True)])


def judge(
    proof: Proof,
    received: Sequence[Record],
    recomputed: Sequence[Record],
    noise: Noise,
    *,
    seed: int = 0,
    alpha: float = 1e-3,
    beta: float = 1e-2,
) -> Verdict:
    """Judge received records against recomputed ones of the same nonces."""
    header = proof.header
    errors = residuals(received, recomputed)
    test = new_test(header, noise, alpha, beta).update(errors)
    if header.pipeline.output == "vector":
        count = count_mismatches(errors)
    else:
        claimed = [i for i, record in enumerate(received) if header.is_valid(record)]
        count = seed_rule(
            [received[i].distance for i in claimed], [recomputed[i].distance for i in claimed], header.round.r_target
        )
    result = test.result
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
    )


def new_test(header: Header, noise: Noise, alpha: float, beta: float) -> stats.SequentialTest:
    """Return a fresh sequential test of residuals against the honest noise, at the effect of the published output."""
    return stats.SequentialTest(noise.law, alpha=alpha, beta=beta, effect=EFFECT[header.pipeline.output])


def _l2(a: np.ndarray | None, b: np.ndarray | None) -> float:
    if a is None or b is None or a.shape != b.shape:
        return math.nan
    return float(np.linalg.norm(a.astype(np.float64) - b.astype(np.float64)))


def _reason(result: stats.SequentialResult) -> str:
    if result.verdict == "fraud":
        return f"e-value e^{result.log_e_max:.1f} passes 1/{result.alpha:g}: honest noise does not give such residuals"
    share = f"an invented share above {result.junk_share_excluded:.1%} is excluded"
    if result.verdict == "honest":
        return f"evidence e^{result.log_evidence_honest:.1f} against {result.effect:g} times the honest noise; {share}"
    return f"{result.n} nonces are too few to decide at error rates {result.alpha:g} and {result.beta:g}: check more"
