"""Simulated audits: error rates and power of the residual test."""

import math

import numpy as np
from scipy import special, stats

from assay.stats import LogNoise, ScaleNoise, SequentialTest

SIGMA = 1e-5
SCALE = ScaleNoise(SIGMA)
LOG = LogNoise(math.log(0.07), 0.5)


def student(dof=6, scale=SIGMA):
    return lambda rng, n: rng.standard_t(dof, n) * scale


def normal(scale):
    return lambda rng, n: rng.normal(0, scale, n)


def partly(share, other, draw):
    """Each value comes from ``other`` with probability ``share``."""
    return lambda rng, n: np.where(rng.random(n) < share, other(rng, n), draw(rng, n))


def share_accused(law, draw, n, lifetimes, seed=5, **rates):
    """Share of lifetimes of n nonces in which the node is accused at any time."""
    rng = np.random.default_rng(seed)
    values_RC = np.stack([draw(rng, n) for _ in range(lifetimes)])
    return float(SequentialTest(law, effect=4.0, **rates).accusations(values_RC)[:, -1].mean())


def honest_weights_of_accused_cheats(law, n, lifetimes, seed=8, **rates):
    """Weights [R] whose mean is the probability that an honest node is accused within n nonces.

    A rate of one in a thousand shows in few honest lifetimes. So cheats of many kinds are
    simulated, and each that is accused counts with its likelihood ratio, honest over the mixture of
    these kinds, up to the accusation (importance sampling). Densities are those of scipy.
    """
    kinds = [(share, multiple) for share in (0.05, 0.2, 1.0) for multiple in (2, 4, 8, 32, 128)]
    rng = np.random.default_rng(seed)
    values_RC = np.empty((lifetimes, n))
    for row, kind in enumerate(rng.integers(len(kinds), size=lifetimes)):
        share, multiple = kinds[kind]
        cheap = partly(share, student(law.dof, multiple * law.sigma), student(law.dof, law.sigma))
        values_RC[row] = cheap(rng, n)
    honest_RC = stats.t.pdf(values_RC / law.sigma, law.dof) / law.sigma
    log_ratios_KRC = []
    for share, multiple in kinds:
        scale = multiple * law.sigma
        cheap_RC = stats.t.pdf(values_RC / scale, law.dof) / scale
        ratio_RC = (1 - share) + share * cheap_RC / honest_RC
        log_ratios_KRC.append(np.log(ratio_RC).cumsum(axis=1))
    log_mixture_RC = special.logsumexp(log_ratios_KRC, axis=0) - math.log(len(kinds))
    accused_RC = SequentialTest(law, effect=4.0, **rates).accusations(values_RC)
    at_accusation_R = log_mixture_RC[np.arange(lifetimes), accused_RC.argmax(axis=1)]
    return np.where(accused_RC[:, -1], np.exp(-at_accusation_R), 0.0)


def nonces_to_decide(law, draw, most=64, repeats=200, seed=6, **rates):
    """Verdicts and the number of nonces to each, when one stops at the first decision."""
    rng = np.random.default_rng(seed)
    outcomes = []
    for _ in range(repeats):
        test = SequentialTest(law, effect=4.0, **rates)
        values = draw(rng, most)
        count = 0
        while test.verdict == "undecided" and count < most:
            test.update(values[count : count + 1])
            count += 1
        outcomes.append((test.verdict, count))
    return outcomes
