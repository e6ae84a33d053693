"""Simulated audits: the tables of error rates and power of the residual test in docs/statistics.md,
in 90 seconds.

python research/benchmarks/residual_test.py
"""

import argparse

import _common  # noqa: F401  puts the checkout on the path
import numpy as np

from assay.stats import ScaleNoise
from assay.stats.noise_laws import JUNK_SIGMA
from tests.stats.simulate import SCALE, SIGMA, nonces_to_decide, normal, share_accused, student


def shared_scale(rng, n, batch=32, dof=6):
    """Normal noise whose scale is drawn once for a batch; each value alone is Student's t."""
    scales = np.sqrt(dof / rng.chisquare(dof, -(-n // batch)))
    return rng.normal(0, SIGMA, n) * np.repeat(scales, batch)[:n]


def main():
    argparse.ArgumentParser(description=__doc__).parse_args()
    print("Nonces to a decision: node, median, 99 %, share of each verdict")
    nodes = {
        "honest": (SCALE, student()),
        "4 times": (SCALE, student(scale=4 * SIGMA)),
        "10 times": (SCALE, normal(10 * SIGMA)),
        "invented": (SCALE, normal(JUNK_SIGMA)),
    }
    for name, (law, draw) in nodes.items():
        outcomes = nonces_to_decide(law, draw, repeats=2000)
        median, last = np.quantile([n for _, n in outcomes], [0.5, 0.99])
        verdicts = [verdict for verdict, _ in outcomes]
        shares = {v: verdicts.count(v) / len(verdicts) for v in sorted(set(verdicts))}
        print(f"  {name:24} {median:4.0f} {last:4.0f}  {shares}")
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
    print(
        f"  {'3, calibrated with 3':24} "
        f"{share_accused(ScaleNoise(SIGMA, dof=3), student(3), 256, 5000):.4f}"
    )


if __name__ == "__main__":
    main()
