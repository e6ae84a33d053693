"""What laws from few nonces accuse: with the tail that the sample shows, and with the wide one that assay takes.

Laws are fitted to samples of a known law, and judge fresh audits of 64 nonces of the same law, so every accusation is
an error. Under the null there is no difference between blocks or machines. Rule, fixed before: below 1024 nonces the
tail is at least as heavy as `WIDE_DOF` and `WIDE_TAIL`; it holds if no family accuses more than 0.1 % on average.

    cd research
    python benchmarks/few_nonces.py -o results/few_nonces.json
"""

import math

import numpy as np
from _common import parser, publish

from assay import stats
from assay.poc import Noise, get_pipeline
from assay.poc.verdict.calibration import PAIR_SPREAD, SCALED_SPREAD
from assay.poc.verdict.noise import fit_noise, sequential_test
from assay.stats.noise import Spread

AUDITED = 64
SIGMA, MEDIAN = 1.8e-4, 0.06  # as on SmolLM2-135M at 16 positions
FAMILIES = {
    "distances, t of 2": ("poc-2.0", stats.ScaleNoise(SIGMA, 2.0)),
    "distances, t of 3": ("poc-2.0", stats.ScaleNoise(SIGMA, 3.0)),
    "distances, t of 6": ("poc-2.0", stats.ScaleNoise(SIGMA, 6.0)),
    "vectors, sd 0.7 and tail from 0.75": ("artifact", stats.LogNoise(math.log(MEDIAN), 0.7, tail=0.75)),
    "vectors, sd 0.7 and tail from 2": ("artifact", stats.LogNoise(math.log(MEDIAN), 0.7, tail=2.0)),
}


def draw(law, shape, rng):
    """Residuals of a law, without sign."""
    grid = np.geomspace(law.size * 1e-4, law.size * 1e6, 4001)
    return np.minimum(np.interp(rng.random(shape), 1 - law.survival(grid), grid), 2.0)


def accused(pipeline, law, nonces, wide, options):
    """Shares of honest audits that laws from so many nonces accuse, one share a law."""
    rng, shares = np.random.default_rng(0), []
    between = SCALED_SPREAD if pipeline.output == "distance" else PAIR_SPREAD
    for _ in range(options.laws):
        fit = fit_noise(pipeline, draw(law, nonces, rng), wide=wide)
        test = sequential_test(Noise(fit.law, "simulated", Spread(math.hypot(fit.error, between))))
        shares.append(float(test.accusations(draw(law, (options.audits, AUDITED), rng))[:, -1].mean()))
    return shares


def main():
    arguments = parser(__doc__)
    arguments.add_argument("--laws", type=int, default=12)
    arguments.add_argument("--audits", type=int, default=500)
    options = arguments.parse_args()
    rows = []
    for name, (preset, law) in FAMILIES.items():
        for nonces, wide in ((256, False), (256, True), (1024, False)):
            shares = accused(get_pipeline(preset), law, nonces, wide, options)
            row = {"null": name, "nonces": nonces, "wide": wide, "accused": float(np.mean(shares))}
            rows.append(row | {"worst_law": max(shares)})
            print(rows[-1], flush=True)
    settings = {"laws": options.laws, "audits": options.audits, "audited": AUDITED}
    publish("few_nonces", settings | {"rows": rows}, options.output)


if __name__ == "__main__":
    main()
