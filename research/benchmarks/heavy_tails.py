"""How often is an honest node accused where residuals have heavy tails, by the size of the calibration?

The residuals are those of half precision against float32 under every preset, measured here. A law is fitted to some of
them as `assay poc calibrate` does, and audits of 64 others are judged by it; both are drawn with replacement. *Junk*:
2 % of 300 nonces are invented. *Default*: the stated law of the pair of formats instead of a fitted one.

    OMP_NUM_THREADS=2 python benchmarks/heavy_tails.py -o benchmarks/results/heavy_tails.json
    python benchmarks/heavy_tails.py --device cuda --nonces 16384 -o benchmarks/results/heavy_tails.json
"""

import itertools
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import numpy as np
from _common import note, parser, publish
from scipy import stats as distributions

from assay.models import load_model
from assay.poc import HFEngine, Round, get_pipeline, prove
from assay.poc.verdict import default_noise, fitted_noise, residuals, sequential_test

ALPHA, AUDITED, JUDGED, SHARE = 1e-3, 64, 300, 0.02
SIZES, AUDITS, JUNKED = (30, 64, 192, 1024, 4096), 20, 2  # audits with each law, and those of nodes with some junk


def measured(reference, preset, options):
    """Residuals of the first nonces of one round in each dtype against float32, [N] each."""
    proofs = {}
    for dtype in ("float32", *options.dtypes):
        model = load_model(reference, dtype=dtype, device=options.device)
        round = Round(block_hash="tails", public_key="k", model=reference, preset=preset)
        engine = HFEngine(model, batch_size=options.batch_size, seq_len=round.seq_len)
        proofs[dtype] = prove(model, round, range(options.nonces), engine=engine).records
    return {dtype: residuals(proofs[dtype], proofs["float32"]) for dtype in options.dtypes}


def junk(pipeline, law, honest_RC, rng):
    """The residuals of nodes that invent 2 % of their nonces, [R, C]."""
    if pipeline.output == "distance":
        invented_RC = honest_RC + rng.normal(0, law.junk_sigma, honest_RC.shape)
    else:
        half = (pipeline.vector_size - 1) / 2
        invented_RC = 2 * np.sqrt(rng.beta(half, half, honest_RC.shape))
    return np.where(rng.random(honest_RC.shape) < SHARE, invented_RC, honest_RC)


def judged(preset, dtype, errors_N, size, fits):
    """Shares of honest audits accused and of nodes with junk caught; laws are from ``size`` nonces, or the default."""
    rng, pipeline = np.random.default_rng(0), get_pipeline(preset)
    noise = default_noise(pipeline.noise, dtype, "float32")
    accused, caught = [], []
    for _ in range(fits):
        if size:
            noise = fitted_noise(pipeline, rng.choice(errors_N, size), "measured here")
        test = sequential_test(noise, alpha=ALPHA)
        accused.append(test.accusations(rng.choice(errors_N, (AUDITS, AUDITED)))[:, -1].mean())
        nodes_RC = junk(pipeline, noise.law, rng.choice(errors_N, (JUNKED, JUDGED)), rng)
        caught.append(test.accusations(nodes_RC)[:, -1].mean())
    return {"accused": float(np.mean(accused)), "junk_caught": float(np.mean(caught))}


def described(errors_N, output):
    """The noise itself: its size and how heavy its tail is."""
    row = {"rms": float(np.sqrt(np.mean(errors_N**2))), "largest": float(np.abs(errors_N).max())}
    row["largest_over_median"] = row["largest"] / float(np.median(np.abs(errors_N)))
    if output == "distance":
        row["likeliest_dof"] = float(distributions.t.fit(errors_N, floc=0)[0])
    return row


def main():
    arguments = parser(__doc__)
    arguments.add_argument("--models", nargs="+", default=["reference:qwen3", "reference:llama"])
    arguments.add_argument("--dtypes", nargs="+", default=["float16", "bfloat16"])
    arguments.add_argument("--presets", nargs="+", default=["poc-2.0", "artifact", "hardened"])
    arguments.add_argument("--device", default="cpu")
    arguments.add_argument("--batch-size", type=int, default=32)
    arguments.add_argument("--nonces", type=int, default=1024)
    arguments.add_argument("--fits", type=int, default=2000, help="laws of each size, twenty audits with each")
    options = arguments.parse_args()
    rows, waiting = [], []
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        for reference, preset in itertools.product(options.models, options.presets):
            for dtype, errors_N in measured(reference, preset, options).items():
                row = {"model": reference, "preset": preset, "dtype": dtype, "nonces": options.nonces}
                rows.append(row | described(errors_N, get_pipeline(preset).output))
                for size in (*SIZES, None):
                    found = pool.submit(judged, preset, dtype, errors_N, size, options.fits)
                    waiting.append((rows[-1], str(size or "default"), found))
        for row, size, found in waiting:
            row[size] = found.result()
            note(f"{row['model']} {row['preset']} {row['dtype']}, {size}: {row[size]}")
    counts = {"fits": options.fits, "audits": AUDITS * options.fits, "junk_audits": JUNKED * options.fits}
    publish("heavy_tails", {**counts, "rows": rows}, options.output)


if __name__ == "__main__":
    main()
