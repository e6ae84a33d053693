"""Simulated audits: error rates and power of the residual test. Run it to print the tables of docs/statistics.md.

python -m tests.stats.simulate
"""

import math

import numpy as np

from assay.stats import LogNoise, ScaleNoise, SequentialTest
from assay.stats.noise import JUNK_SIGMA

SIGMA = 1e-5
SCALE = ScaleNoise(SIGMA)
LOG = LogNoise(math.log(0.07), 0.5)


def student(dof=6, scale=SIGMA):
    return lambda rng, n: rng.standard_t(dof, n) * scale


def normal(scale):
    return lambda rng, n: rng.normal(0, scale, n)


def log_normal(centre, sd):
    return lambda rng, n: np.exp(rng.normal(math.log(centre), sd, n))


def partly(share, other, draw):
    """Each value comes from ``other`` with probability ``share``."""
    return lambda rng, n: np.where(rng.random(n) < share, other(rng, n), draw(rng, n))


def shared_scale(rng, n, batch=32, dof=6):
    """Normal noise whose scale is drawn once for a batch; each value alone is Student's t."""
    scales = np.sqrt(dof / rng.chisquare(dof, -(-n // batch)))
    return rng.normal(0, SIGMA, n) * np.repeat(scales, batch)[:n]


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
        taken = next((i for i in range(most) if test.update(values[i : i + 1]).verdict != "undecided"), most - 1) + 1
        outcomes.append((test.verdict, taken))
    return outcomes


def main():
    print("Nonces to a decision: node, median, 99 %, share of each verdict")
    nodes = {
        "honest": (SCALE, student()),
        "bit-identical": (SCALE, lambda rng, n: np.zeros(n)),
        "4 times": (SCALE, student(scale=4 * SIGMA)),
        "10 times": (SCALE, normal(10 * SIGMA)),
        "30 times": (SCALE, normal(30 * SIGMA)),
        "invented": (SCALE, normal(JUNK_SIGMA)),
        "vectors, honest": (LOG, log_normal(0.07, 0.5)),
        "vectors, cheaper model": (LOG, log_normal(0.24, 0.4)),
    }
    for name, (law, draw) in nodes.items():
        outcomes = nonces_to_decide(law, draw, repeats=2000)
        median, last = np.quantile([n for _, n in outcomes], [0.5, 0.99])
        verdicts = [verdict for verdict, _ in outcomes]
        shares = {v: verdicts.count(v) / len(verdicts) for v in sorted(set(verdicts))}
        print(f"  {name:24} {median:4.0f} {last:4.0f}  {shares}")
    print("Caught within 300 nonces when 2 % are invented, by sigma")
    for sigma in (1e-5, 1e-4, 5e-4):
        draw = partly(0.02, normal(JUNK_SIGMA), student(scale=sigma))
        print(f"  {sigma:g}  {share_accused(ScaleNoise(sigma), draw, 300, 2000):.4f}")
    print("Honest nodes accused within 256 nonces, alpha = 0.001")
    truths = {
        "as calibrated": student(),
        "1.2 times larger": student(scale=1.2 * SIGMA),
        "2 times larger": student(scale=2 * SIGMA),
        "4 degrees of freedom": student(4),
        "3 degrees of freedom": student(3),
        "scale shared by batches": shared_scale,
    }
    for name, draw in truths.items():
        print(f"  {name:24} {share_accused(SCALE, draw, 256, 5000):.4f}")
    print(f"  {'3, calibrated with 3':24} {share_accused(ScaleNoise(SIGMA, dof=3), student(3), 256, 5000):.4f}")


if __name__ == "__main__":
    main()
