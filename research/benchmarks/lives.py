"""How many honest lives are convicted on fresh residuals of three models, and how many that compute a tenth cheaply.

Each model computes the nonces of some blocks in bfloat16, float16 and float32, and in the first two by other kernels
too. A validator judges in float32, by residuals or by scores with the third format as their control, or by the other
kernels in the node's format, with both others as controls. A law comes from a third of the blocks, drawn anew for each,
and judges lives in the others. An honest life is 24 audits of 16 nonces, each of another block; a cheat's is `--cheat`,
of which a tenth of the residuals is five times larger. Lives of shuffled nonces have no difference between blocks.

Pass: of honest lives at most .0001 convicted, .003 under the worst law; of cheats 99 % with all but `poc-2.0`.

    python research/benchmarks/lives.py -o research/results/lives.json
"""

from itertools import combinations, groupby, product
from operator import itemgetter
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from _common import note, parser, publish

from assay.models import load_model
from assay.poc import Round, get_pipeline, measure_frame, prove
from assay.poc.engines.hf.engine import HFEngine
from assay.poc.protocol.blocks import block_scale
from assay.poc.verdict import Life
from assay.poc.verdict.calibration import describe_machines, fit_build
from assay.poc.verdict.judge import residuals
from assay.poc.verdict.noise import Control, sequential_test

MODELS = ("reference:qwen3", "reference:llama", "pretrained:smollm2")
PRESETS = ("poc-2.0", "hardened", "tokens-1")
BUILDS = ("bfloat16", "float16", "float32", "bfloat16 eager", "float16 eager")
NONCES, LAWS, LIVES, CHEATS = 64, 4, 280, 40  # the last two under each law
ALPHA, HONEST = 1e-3, (24, 16)  # audits of an honest life, and nonces of each


def compute(reference, preset, frame, options):
    """Return the residuals [B, N] of two builds by their names, over the scale of the block, and the fingerprints."""
    pipeline, records, engines = get_pipeline(preset), {}, {}
    if pipeline.framed and not frame.exists():
        measure_frame(load_model(reference, device="cpu")).save(frame)
    of_all = {"public_key": "k", "preset": preset, "seq_len": options.seq_len}
    rounds = [Round(block_hash=f"fresh-{i}", **of_all) for i in range(options.blocks)]
    for name in BUILDS:
        dtype, _, kernels = name.partition(" ")
        model = load_model(reference, dtype=dtype, device=options.device).with_frame(frame if pipeline.framed else None)
        model.module.config._attn_implementation = kernels or "sdpa"
        engine = HFEngine(model, batch_size=32, seq_len=options.seq_len)
        records[name] = [prove(model, round, range(NONCES), engine=engine).records for round in rounds]
        engines[name], size = engine.fingerprint, model.module.config.hidden_size
    size = size if pipeline.output == "distance" and pipeline.head == "random" else 0
    scales = [block_scale(round, size) if size else 1.0 for round in rounds]
    apart = {}
    for pair in combinations(BUILDS, 2):
        both = zip(*(records[name] for name in pair), scales, strict=True)
        apart[frozenset(pair)] = np.stack([residuals(a, b) / scale for a, b, scale in both])
    return apart, engines, {"digest": model.digest, "hidden_size": size}


def lives(values_BN, blocks, shape, count, rng, *, cheat):
    """Draw lives: residuals [L, A, C], and the block and nonces of every audit."""
    audits, checked = shape
    of_block = np.stack([rng.permutation(blocks)[:audits] for _ in range(count)])
    nonces = rng.permuted(np.tile(np.arange(NONCES), (count, audits, 1)), axis=2)[:, :, :checked]
    values = values_BN[of_block[:, :, None], nonces]
    if cheat:
        values = np.minimum(values * np.where(rng.random(values.shape) < 0.1, 5.0, 1.0), 2.0)
    return values, of_block, nonces


def convicted(noise, drawn):
    """Return which lives are convicted: those that come under suspicion are lived audit by audit."""
    values, of_block, nonces = drawn
    test = sequential_test(noise, alpha=ALPHA * 0.9)  # the share of the first test
    suspected = test.accusations(values.reshape(len(values), -1))[:, -1]
    found = np.zeros(len(values), dtype=bool)
    for row in np.flatnonzero(suspected):
        life = Life(alpha=ALPHA, beta=1e-2)
        for one, block, places in zip(values[row], of_block[row], nonces[row], strict=True):
            life.update(noise, one, block=str(block), positions=places, batch_size=32)
            found[row] |= life.evidence.verdict == "fraud"
    return float(suspected.mean()), found


def cells(reference, preset, folder, options):
    """Yield what is seen under every law of a model and preset."""
    apart, engines, known = compute(reference, preset, folder / f"{reference[-5:]}.safetensors", options)
    pipeline, blocks = get_pipeline(preset), options.blocks
    pairs = (("bfloat16", "float16"), ("float16", "bfloat16"))
    judges = [(name, ("float32", other)) for name, other in pairs]
    judges += [(name, (f"{name} eager", "float32", other)) for name, other in pairs]
    for name, judge in judges:
        own, *again = judge
        node_EBN = np.stack([apart[frozenset((name, other))] for other in judge])
        between_PBN = np.stack([apart[frozenset(pair)] for pair in combinations(judge, 2)])
        machines = describe_machines([engines[name], engines[own]])
        for law in range(LAWS):
            for shuffled in (False, True):
                rng = np.random.default_rng(law)
                order = rng.permutation(blocks * NONCES) if shuffled else np.arange(blocks * NONCES)
                node, between = (
                    one.reshape(len(one), -1)[:, order].reshape(one.shape) for one in (node_EBN, between_PBN)
                )
                chosen = rng.permutation(blocks)
                of_law, others = chosen[: blocks // 3], chosen[blocks // 3 :]
                of_laws = [one[:, of_law].reshape(len(one), -1) for one in (node, between)]
                formats = [build.partition(" ")[0] for build in judge]
                ways = {"residuals": (None, node[0])} if len(again) == 1 else {}
                if control := Control.measured([of_laws], of=formats[0], dtypes=formats[1:]):
                    scores = control.scores(*(one.reshape(len(one), -1) for one in (node, between)))
                    ways[("scores", "two controls")[len(again) - 1]] = control, scores.reshape(node[0].shape)
                for way, (used, values_BN) in ways.items():
                    measured = {(0, 1): values_BN[of_law].ravel()}
                    build = fit_build(measured, machines, pipeline, **known, control=used)
                    noise = build.between("", engines[own])
                    suspected, found = convicted(noise, lives(values_BN, others, HONEST, LIVES, rng, cheat=False))
                    _, caught = convicted(noise, lives(values_BN, others, options.cheat, CHEATS, rng, cheat=True))
                    row = {"model": reference, "preset": preset, "formats": [name, own], "values": way, "law": law}
                    middle, ends = np.median(values_BN), np.quantile(values_BN, [0.99, 1])
                    tails = (ends / middle).tolist() if middle else None
                    row |= {"shuffled": shuffled, "lives": LIVES, "suspected": suspected, "tails": tails}
                    yield row | {"convicted": int(found.sum()), "caught": float(caught.mean())}


def main():
    made, found = parser(__doc__), []
    made.add_argument("--models", nargs="+", default=MODELS)
    made.add_argument("--presets", nargs="+", default=PRESETS)
    made.add_argument("--seq-len", type=int, default=16)
    made.add_argument("--blocks", type=int, default=48)
    made.add_argument("--cheat", type=int, nargs=2, default=(10, 16), help="audits of its life, and nonces of each")
    made.add_argument("--device", default="cpu")
    options = made.parse_args()
    with TemporaryDirectory() as folder:
        for reference, preset in product(options.models, options.presets):
            found += cells(reference, preset, Path(folder), options)
            note(f"{reference}, {preset}: {sum(one['convicted'] for one in found)} convicted so far")
    table = []
    key = itemgetter("preset", "values", "shuffled")
    for (preset, way, shuffled), group in groupby(sorted(found, key=key), key):
        counts, caught = zip(*((one["convicted"], one["caught"]) for one in group), strict=True)
        row = {"preset": preset, "values": way, "shuffled": shuffled, "laws": len(counts), "lives": LIVES * len(counts)}
        row |= {"convicted": sum(counts), "worst_law": max(counts) / LIVES}
        table.append(row | {"least_caught": min(caught), "caught": float(np.mean(caught))})
    of_all = {"blocks": options.blocks, "positions": options.seq_len, "cheat": options.cheat}
    publish("lives", of_all | {"table": table, "laws": found}, options.output)


if __name__ == "__main__":
    main()
