"""Simulated audits: error rates and power of the residual test."""

import math

import numpy as np

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


def nonces_to_decide(law, draw, most=64, repeats=200, seed=6, **rates):
    """Verdicts and the number of nonces to each, when one stops at the first decision."""
    rng = np.random.default_rng(seed)
    outcomes = []
    for _ in range(repeats):
        test = SequentialTest(law, effect=4.0, **rates)
        values = draw(rng, most)
        taken = (
            next(
                (i for i in range(most) if test.update(values[i : i + 1]).verdict != "undecided"),
                most - 1,
            )
            + 1
        )
        outcomes.append((test.verdict, taken))
    return outcomes
