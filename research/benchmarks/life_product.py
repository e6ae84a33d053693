"""Honest lives accused under six laws in a row: e-values of the laws multiplied, against tests that share alpha.

    python benchmarks/life_product.py --lives 1500

The scale of a machine is drawn once for its life, from the spread that the laws themselves state, so every law alone is
right. What it tells under one law it tells again under the next one, and a product counts it twice.
"""

import argparse
import json
import math

import numpy as np

from assay.poc.verdict import Life, Noise, sequential_test
from assay.stats import LogNoise, Spread

LAW, LAWS, CHECKED, ALPHA = LogNoise(-3.0, 0.5), 6, 96, 0.05


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lives", type=int, default=1500)
    parser.add_argument("--spreads", type=float, nargs="+", default=[0.0, 0.2, 0.35])
    chosen = parser.parse_args()
    for spread in chosen.spreads:
        print(json.dumps({"spread": spread, "alpha": ALPHA, "lives": chosen.lives, **accused(spread, chosen.lives)}))


def accused(spread: float, lives: int) -> dict[str, float]:
    """Return the share of honest lives that each way accuses."""
    rng = np.random.default_rng(7)
    grid = np.exp(np.linspace(LAW.mu - 9 * LAW.sd, math.log(2.0), 20_000))
    scale_R1 = np.exp(spread * rng.standard_t(30, (lives, 1)))
    values_RC = scale_R1 * np.interp(-rng.uniform(size=(lives, LAWS * CHECKED)), -LAW.survival(grid), grid)
    multiplied = shared = 0
    for values_C in values_RC:
        life, before, largest = Life(alpha=ALPHA, beta=0.01), 0.0, 0.0
        for number, part in enumerate(np.split(values_C, LAWS)):
            noise = Noise(LAW, f"calibration {number}", Spread(spread))
            alone = sequential_test(noise, alpha=ALPHA).update(part).result
            before, largest = before + alone.log_e_value, max(largest, before + alone.log_e_max)
            life.update(noise, part)
        multiplied += largest >= -math.log(ALPHA)
        shared += life.evidence.verdict == "fraud"
    return {"multiplied": multiplied / lives, "shared": shared / lives}


if __name__ == "__main__":
    main()
