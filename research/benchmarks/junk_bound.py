"""How much junk can be seen in distances at all: the residual test beside the best test there is.

A node invents 2 % of its distances (the constant √2, the best there is); its other residuals follow the honest law.
The oracle is the e-value of the likelihood ratio that knows the share and both laws. A test of exactly so many
distances may find what it misses (known_cheats.py).

    python benchmarks/junk_bound.py -o benchmarks/results/junk_bound.json
"""

import numpy as np
from _common import note, parser, publish

from assay import stats

SIGMAS = (1e-5, 5e-5, 1e-4, 1.5e-4, 3e-4, 5e-4)
# What the red team fitted to honest distances against float32: bfloat16 and float16, the larger of two models.
FITTED = (1.31e-4, 1.74e-5)
SHARE, CHECKED, ALPHA, DOF = 0.02, 300, 1e-3, 6.0


def measure(sigma, tails, trials, rng):
    """Share caught within the checked nonces by the test, by the oracle, and by the oracle for normal tails."""
    law = stats.ScaleNoise(sigma, tails)
    noise = sigma * rng.standard_t(tails, (trials, CHECKED))
    junk = rng.random(noise.shape) < SHARE
    residuals = np.abs(np.where(junk, rng.normal(0, stats.JUNK_SIGMA, noise.shape), noise))
    test = stats.SequentialTest(law, effect=4.0, alpha=ALPHA)
    invented = -((residuals / stats.JUNK_SIGMA) ** 2) / 2 - np.log(stats.JUNK_SIGMA * np.sqrt(2 * np.pi))
    ratio = invented - law.log_density(residuals, 1.0)
    path = np.cumsum(np.logaddexp(np.log1p(-SHARE), np.log(SHARE) + ratio), axis=1)
    row = {
        "sigma": sigma,
        "degrees_of_freedom": tails,
        "test": float(test.accusations(residuals)[:, -1].mean()),
        "oracle": float((path.max(axis=1) >= -np.log(ALPHA)).mean()),
    }
    note(str(row))
    return row


def main():
    arguments = parser(__doc__)
    arguments.add_argument("--trials", type=int, default=10_000)
    options = arguments.parse_args()
    rng = np.random.default_rng(0)
    cases = [measure(sigma, tails, options.trials, rng) for tails in (DOF, 30.0) for sigma in SIGMAS]
    cases += [measure(sigma, DOF, options.trials, rng) for sigma in FITTED]
    figures = {"share": SHARE, "checked": CHECKED, "alpha": ALPHA, "trials": options.trials, "cases": cases}
    publish("junk_bound", figures, options.output)


if __name__ == "__main__":
    main()
