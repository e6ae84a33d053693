"""How often is an honest node accused where residuals have heavy tails, by the size of the calibration?

The residuals are those of `poc-2.0` distances in float16 against float32, measured here. A law is fitted to some of
them (`fit_scale_noise`, a Student's t with 6 degrees of freedom at its upper bound), and audits of others are judged by
it; both are drawn with replacement. *Junk*: 2 % of 300 nonces are invented values.

    OMP_NUM_THREADS=2 python benchmarks/heavy_tails.py -o benchmarks/results/heavy_tails.json
"""

import numpy as np
from _common import note, parser, publish
from scipy import stats as distributions

from assay.models import load_model
from assay.poc import Round, prove
from assay.stats import SequentialTest, fit_scale_noise

ALPHA, AUDITED, JUDGED, SHARE = 1e-3, 64, 300, 0.02
SIZES, AUDITS = (64, 192, 512, 1024), 8


def residuals(reference, count):
    """Distances in float16 less those in float32, [count]."""
    round = Round(block_hash="tails", public_key="k", model=reference)
    one, other = (
        prove(load_model(reference, dtype=dtype, device="cpu"), round, range(count)).distances.astype(float)
        for dtype in ("float16", "float32")
    )
    return one - other


def measure(reference, options):
    measured_N = residuals(reference, options.nonces)
    rng = np.random.default_rng(0)
    row = {
        "model": reference,
        "nonces": options.nonces,
        "largest": float(np.abs(measured_N).max()),
        "likeliest_dof": float(distributions.t.fit(measured_N, floc=0)[0]),
    }
    for size in SIZES:
        accused = caught = 0
        for _ in range(options.fits):
            law = fit_scale_noise(rng.choice(measured_N, size)).law
            for _ in range(AUDITS):
                accused += SequentialTest(law, alpha=ALPHA).update(rng.choice(measured_N, AUDITED)).verdict == "fraud"
            invented_N = np.where(rng.random(JUDGED) < SHARE, rng.normal(0, law.junk_sigma, JUDGED), 0)
            claimed_N = rng.choice(measured_N, JUDGED) + invented_N
            caught += SequentialTest(law, alpha=ALPHA).update(claimed_N).verdict == "fraud"
        row[str(size)] = {"accused": accused / options.fits / AUDITS, "junk_caught": caught / options.fits}
    note(f"{reference}: {row}")
    return row


def main():
    arguments = parser(__doc__)
    arguments.add_argument("--models", nargs="+", default=["reference:qwen3", "reference:llama"])
    arguments.add_argument("--nonces", type=int, default=1024)
    arguments.add_argument("--fits", type=int, default=2000, help="laws of each size, eight audits with each")
    options = arguments.parse_args()
    rows = [measure(reference, options) for reference in options.models]
    publish("heavy_tails", {"fits": options.fits, "audits": AUDITS * options.fits, "rows": rows}, options.output)


if __name__ == "__main__":
    main()
