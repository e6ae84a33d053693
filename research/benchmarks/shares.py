"""Is a node caught that computes a share of its nonces cheaply, and is an honest one accused in
blocks not calibrated?

Residuals of half precision against float32 are measured under every preset over many blocks. A law
is fitted to nonces of one block, as `assay poc calibrate` does, and judges audits of *other*
blocks: of honest nodes, and of nodes whose residuals are ``multiple`` times larger in a share of
the nonces. Beside ours: an oracle, the sequential likelihood ratio of the cheat's own residuals
over honest ones of all blocks.

    python research/benchmarks/shares.py --device cuda -o research/results/shares.json
"""

import itertools
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context

import numpy as np
from _common import note, parser, publish
from assay_research.clusters.clusters import Oracle, drawn

from assay.models import load_model
from assay.poc import HFEngine, Noise, Round, get_pipeline, prove
from assay.poc.protocol.blocks import block_scale
from assay.poc.verdict import fit_machines
from assay.poc.verdict.honest_noise import fit_noise
from assay.poc.verdict.machine_fit import PAIR_SPREAD, SCALED_SPREAD
from assay.poc.verdict.residuals import residuals
from assay.poc.verdict.sample_plan import sequential_test

MODELS = (
    "reference:qwen3",
    "reference:llama",
    "reference:qwen3 random-all",
    "reference:llama random-all",
)
PRESETS = ("poc-2.0", "artifact", "hardened")
DTYPES = ("bfloat16", "float16")
ALPHA = 1e-3
AUDITED = 64
WITHIN = 150
LAW_SIZES = (256, 1024)
CHEATS = ((0.1, 5.0), (0.1, 10.0), (0.1, 22.0), (0.2, 5.0), (0.5, 5.0), (1.0, 5.0))
BATCH = 128


def measured(name, options):
    """Residuals by preset, dtype and block, over the scale of the block, [N] each."""
    reference, weights = [*name.split(), "trained"][:2]
    results = {}
    for preset in options.presets:
        proofs = {}
        for dtype in ("float32", *options.dtypes):
            models = {
                "weights": weights,
                "block_hash": None if weights == "trained" else "made on the spot",
            }
            model = load_model(reference, dtype=dtype, device=options.device, **models)
            engine = HFEngine(model, batch_size=BATCH, seq_len=options.seq_len)
            for block in range(options.blocks):
                block_hash = f"{options.rounds} {block}"
                round = Round(
                    block_hash=block_hash, public_key="k", preset=preset, seq_len=options.seq_len
                )
                nonces = range(max(LAW_SIZES) if block < options.laws else options.nonces)
                proofs[dtype, block] = prove(model, round, nonces, engine=engine)
        for dtype, block in itertools.product(options.dtypes, range(options.blocks)):
            mine = proofs[dtype, block]
            exact = proofs["float32", block]
            scale = block_scale(mine.round, model.hidden_size)
            results[preset, dtype, block] = residuals(mine.records, exact.records) / scale
        note(f"{name} {preset} measured")
    return results


def noise_of(preset, errors_N):
    """The honest noise as a calibration of two engines has it."""
    pipeline = get_pipeline(preset)
    between = SCALED_SPREAD if pipeline.output == "distance" else PAIR_SPREAD
    fitted = fit_machines(
        {(0, 1): errors_N}, ("", ""), partial(fit_noise, pipeline), between_blocks=between
    )
    return Noise(fitted.law, "one block", fitted.known, None, fitted.scores, fitted.widest)


def cheating(errors_N, share, multiple, audits, length, rng):
    honest_RC = drawn(rng, errors_N, audits, length)
    larger_RC = multiple * drawn(rng, errors_N, audits, length)
    return np.where(rng.random(honest_RC.shape) < share, larger_RC, honest_RC)


def judged(found, options, task):
    """One row of the table: a model, preset, format and size of the law."""
    name, preset, dtype, size = task
    rng = np.random.default_rng(0)
    blocks = [found[preset, dtype, block] for block in range(options.blocks)]
    accused = np.full((options.laws, options.blocks), np.nan)
    caught = {cheat: [] for cheat in CHEATS}
    for law in range(options.laws):
        noise = noise_of(preset, blocks[law][:size])
        test = sequential_test(noise, alpha=ALPHA)
        for block in range(options.blocks):
            if block == law:
                continue
            honest_RC = drawn(rng, blocks[block], options.audits, AUDITED)
            accused[law, block] = test.accusations(honest_RC)[:, -1].mean()
        for block in rng.permutation([b for b in range(options.blocks) if b != law])[:4]:
            for share, multiple in CHEATS:
                nodes_RC = cheating(blocks[block], share, multiple, options.audits, WITHIN, rng)
                caught[share, multiple].append(test.accusations(nodes_RC)[:, -1].mean())
    everything_N = np.concatenate(blocks)
    row = {
        "model": name,
        "preset": preset,
        "dtype": dtype,
        "law_from": size,
        "accused": float(np.nanmean(accused)),
    }
    row |= {"accused_worst_pair": float(np.nanmax(accused)), "cheats": []}
    for share, multiple in CHEATS:
        nodes_RC = np.abs(cheating(everything_N, share, multiple, 2000, WITHIN, rng))
        accuses_RC, _ = Oracle(np.abs(everything_N), nodes_RC.ravel()).simulated(nodes_RC)
        row["cheats"].append(
            {
                "share": share,
                "multiple": multiple,
                "caught": float(np.mean(caught[share, multiple])),
                "oracle": float(accuses_RC[:, -1].mean()),
            }
        )
    return row


def main():
    arguments = parser(__doc__)
    arguments.add_argument("--models", nargs="+", default=list(MODELS))
    arguments.add_argument("--presets", nargs="+", default=list(PRESETS))
    arguments.add_argument("--dtypes", nargs="+", default=list(DTYPES))
    arguments.add_argument("--device", default="cpu")
    arguments.add_argument("--seq-len", type=int, default=256)
    arguments.add_argument("--blocks", type=int, default=40)
    arguments.add_argument(
        "--rounds", default="shares", help="name that the hashes of all blocks begin with"
    )
    arguments.add_argument("--laws", type=int, default=8, help="blocks that a law is fitted to")
    arguments.add_argument(
        "--nonces", type=int, default=256, help="nonces of a block that no law is fitted to"
    )
    arguments.add_argument("--audits", type=int, default=100, help="audits of every pair of blocks")
    arguments.add_argument("--workers", type=int, default=2)
    options = arguments.parse_args()
    rows = []
    for name in options.models:
        results = measured(name, options)
        tasks = list(itertools.product([name], options.presets, options.dtypes, LAW_SIZES))
        with ProcessPoolExecutor(options.workers, mp_context=get_context("forkserver")) as pool:
            rows += pool.map(partial(judged, results, options), tasks)
        for row in rows[-len(tasks) :]:
            first = row["cheats"][0]
            honest = f"accused {row['accused']:.5f}, worst {row['accused_worst_pair']:.3f}"
            cheat = f"10 % at 5: {first['caught']:.3f}, oracle {first['oracle']:.3f}"
            note(
                f"{row['model']} {row['preset']} {row['dtype']} law from {row['law_from']}: "
                f"{honest}; {cheat}"
            )
    settings = {
        "seq_len": options.seq_len,
        "blocks": options.blocks,
        "laws": options.laws,
        "audits": options.audits,
    }
    publish("shares", settings | {"rows": rows}, options.output)


if __name__ == "__main__":
    main()
