"""How often is an honest node accused where residuals have heavy tails, by the size of the calibration?

The residuals are those of `poc-2.0` distances in half precision against float32, measured here. A law is fitted to some
of them (`fit_scale_noise`, a Student's t with 6 degrees of freedom at its upper bound), and audits of others are judged
by it; both are drawn with replacement. *Junk*: 2 % of 300 nonces are invented values.

    OMP_NUM_THREADS=2 python benchmarks/heavy_tails.py -o benchmarks/results/heavy_tails.json
    python benchmarks/heavy_tails.py --device cuda --nonces 16384 -o benchmarks/results/heavy_tails.json
"""

import numpy as np
from _common import note, parser, publish
from scipy import stats as distributions

from assay.models import load_model
from assay.poc import HFEngine, Round, prove
from assay.stats import SequentialTest, fit_scale_noise

ALPHA, AUDITED, JUDGED, SHARE = 1e-3, 64, 300, 0.02
SIZES, AUDITS, JUNKED = (30, 64, 192, 1024, 4096), 20, 2  # audits with each law, and those of nodes with some junk


def distances(reference, dtype, options):
    """Distances of the first nonces of one round, [N]."""
    model = load_model(reference, dtype=dtype, device=options.device)
    round = Round(block_hash="tails", public_key="k", model=reference)
    engine = HFEngine(model, batch_size=32, seq_len=round.seq_len)
    return prove(model, round, range(options.nonces), engine=engine).distances.astype(float)


def measure(reference, options):
    exact_N = distances(reference, "float32", options)
    for dtype in options.dtypes:
        yield judged(reference, dtype, distances(reference, dtype, options) - exact_N, options)


def judged(reference, dtype, measured_N, options):
    """How often laws from samples of each size accuse audits of the rest."""
    rng = np.random.default_rng(0)
    row = {
        "model": reference,
        "dtype": dtype,
        "nonces": options.nonces,
        "rms": float(np.sqrt(np.mean(measured_N**2))),
        "largest": float(np.abs(measured_N).max()),
        "likeliest_dof": float(distributions.t.fit(measured_N, floc=0)[0]),
    }
    for size in SIZES:
        accused, caught = [], []
        for _ in range(options.fits):
            law = fit_scale_noise(rng.choice(measured_N, size)).law
            test = SequentialTest(law, alpha=ALPHA)
            accused.append(test.accusations(rng.choice(measured_N, (AUDITS, AUDITED)))[:, -1].mean())
            shape = (JUNKED, JUDGED)
            invented_RC = np.where(rng.random(shape) < SHARE, rng.normal(0, law.junk_sigma, shape), 0)
            caught.append(test.accusations(rng.choice(measured_N, shape) + invented_RC)[:, -1].mean())
        row[str(size)] = {"accused": float(np.mean(accused)), "junk_caught": float(np.mean(caught))}
    note(f"{row}")
    return row


def main():
    arguments = parser(__doc__)
    arguments.add_argument("--models", nargs="+", default=["reference:qwen3", "reference:llama"])
    arguments.add_argument("--dtypes", nargs="+", default=["float16", "bfloat16"])
    arguments.add_argument("--device", default="cpu")
    arguments.add_argument("--nonces", type=int, default=1024)
    arguments.add_argument("--fits", type=int, default=2000, help="laws of each size, twenty audits with each")
    options = arguments.parse_args()
    rows = [row for reference in options.models for row in measure(reference, options)]
    counts = {"fits": options.fits, "audits": AUDITS * options.fits, "junk_audits": JUNKED * options.fits}
    publish("heavy_tails", {**counts, "rows": rows}, options.output)


if __name__ == "__main__":
    main()
