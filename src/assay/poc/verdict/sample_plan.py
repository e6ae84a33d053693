"""The test of residuals that gives every verdict, and how many nonces it needs."""

from copy import copy
from functools import lru_cache

import numpy as np

from assay import stats
from assay.poc.verdict.honest_noise import Noise, unpack_scores
from assay.stats.e_values import CHEAP
from assay.stats.sequential import EXCLUDED

# Smallest multiple of the honest noise that counts as another computation, where no measurement
# gives one. A vector shows a multiple in twelve numbers at once, and cheaper models come closer to
# it, so half is enough.
EFFECT = {"distance": 4.0, "vector": 2.0}
ALPHA = 1e-3
# usual bounds on the chance that an honest node is ever accused, and a cheat called honest
BETA = 1e-2
# Numbers of nonces among which a verifier chooses, where its caller does not choose.
SAMPLES = (32, 48, 64, 96, 128)
LARGEST_SAMPLE = SAMPLES[-1]
WANTED_POWER = 0.95  # at which a smaller sample is enough
_TRIALS = 300
_LONGEST = 1024  # nonces of a simulated node: more accuse no less
_GRID = 4001  # points at which a law is inverted


def sequential_test(
    noise: Noise, *, alpha: float = ALPHA, beta: float = BETA
) -> stats.SequentialTest:
    """Return a fresh residual test, with the rates of :class:`assay.stats.SequentialTest`.

    Every verdict comes from this test: in `verify`, the service, the validator and the experiments.

    Raises:
        UsageError: A rate is not in (0, 1), or the law is too wide for invented values to stand
            out.
    """
    # A test replaces its numbers, and changes no array.
    return copy(_untouched_test(noise, alpha, beta))


@lru_cache(maxsize=256)
def _untouched_test(noise: Noise, alpha: float, beta: float) -> stats.SequentialTest:
    """Return the test that others are copies of: pricing its bets takes milliseconds, and lives are
    many.
    """
    effect = (
        noise.effect or EFFECT["distance" if isinstance(noise.law, stats.ScaleNoise) else "vector"]
    )
    honest, widest = (
        unpack_scores(text) * noise.size if text else None for text in (noise.scores, noise.widest)
    )
    return stats.SequentialTest(
        noise.law,
        spread=noise.spread,
        honest=honest,
        widest=widest,
        alpha=alpha,
        beta=beta,
        effect=effect,
    )


@lru_cache(maxsize=256)
def plan_sample(
    noise: Noise | None, proved: int, sample: int | None, alpha: float, beta: float
) -> tuple[int, float | None]:
    """Return how many nonces a verifier recomputes, and the power that this has.

    The power is the chance that the test accuses a node that computes a tenth of its nonces at 5 ×
    the honest noise. It is simulated under the law itself, with fixed seeds; its standard error is
    at most 3 points; that of a larger sample is of 1024 nonces. Where no ``sample`` is asked for,
    it is the first of :data:`SAMPLES` with a power of 95 %, else the last, and at most the nonces
    that were ``proved``. Without a law there is no power, and the least number is enough. Results
    are kept: 50 ms less for another proof.
    """
    if noise is None:
        return min(SAMPLES[0], proved) if sample is None else sample, None
    rng = np.random.default_rng(0)
    law = noise.law
    shape = _TRIALS, min(LARGEST_SAMPLE, proved) if sample is None else min(sample, _LONGEST)
    # Honest residuals are drawn through the inverse of the survival function on a grid.
    grid = np.geomspace(law.size * 1e-4, law.size * 1e6, _GRID)
    honest_RC = np.interp(rng.random(shape), 1 - law.survival(grid), grid)
    cheap_RC = rng.random(shape) < EXCLUDED[0][0]
    test = sequential_test(noise, alpha=alpha, beta=beta)
    power_C = test.accusations(np.where(cheap_RC, CHEAP * honest_RC, honest_RC)).mean(axis=0)
    enough = (
        count for count in SAMPLES if count <= power_C.size and power_C[count - 1] >= WANTED_POWER
    )
    size = next(enough, power_C.size) if sample is None else sample
    return size, float(power_C[:size][-1])
