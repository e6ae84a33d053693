"""How many honest lives are convicted on fresh residuals of three models, and how many that compute
a tenth cheaply.

Each model computes the nonces of some blocks in bfloat16, float16 and float32, and in the first two
by other kernels too. A validator judges in float32, by residuals or by scores with the third format
as their control, or by the other kernels in the node's format, with both others as controls. A law
comes from a third of the blocks, drawn anew for each, and judges lives in the others. An honest
life is 24 audits of 16 nonces, each of another block; a cheat's is `--cheat`: in a tenth of its
nonces, what it publishes is five times as far from float32's as an honest node's of its format.
Lives of shuffled nonces have no difference between blocks.

Pass: of honest lives at most .0001 convicted, .003 under the worst law; of cheats 99 % with all but
    `poc-2.0`.

    python research/benchmarks/lives.py -o research/results/lives.json
"""

from concurrent.futures import ProcessPoolExecutor
from itertools import combinations, groupby, product
from multiprocessing import get_context
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
from assay.poc.verdict.build_noise import describe_machines
from assay.poc.verdict.control import Control
from assay.poc.verdict.machine_fit import fit_build
from assay.poc.verdict.sample_plan import sequential_test

MODELS = ("reference:qwen3", "reference:llama", "pretrained:smollm2")
PRESETS = ("poc-2.0", "hardened", "tokens-1")
BUILDS = ("bfloat16", "float16", "float32", "bfloat16 eager", "float16 eager")
CHEAP = 5.0  # distance of a cheap nonce from that of float32, over an honest one
NONCES = 64
LAWS = 4
LIVES = 280
CHEATS = 40  # the last two under each law
ALPHA = 1e-3
HONEST = (24, 16)  # audits of an honest life, and nonces of each


def published(records):
    """Return what records publish, [N, K]."""
    return np.array(
        [
            np.atleast_1d(record.vector if record.vector is not None else record.distance)
            for record in records
        ]
    )


def apart(one_BNK, other_BNK):
    """Return residuals [B, N]: of vectors their distance, of distances their difference."""
    difference_BNK = one_BNK - other_BNK
    return (
        difference_BNK[..., 0]
        if difference_BNK.shape[2] == 1
        else np.linalg.norm(difference_BNK, axis=2)
    )


def cheap(honest_BNK, exact_BNK):
    """Return what is published by a node that errs :data:`CHEAP` times as much, [B, N, K]."""
    made_BNK = exact_BNK + CHEAP * (honest_BNK - exact_BNK)
    return (
        made_BNK
        if made_BNK.shape[2] == 1
        else made_BNK / np.linalg.norm(made_BNK, axis=2, keepdims=True)
    )


def compute(reference, preset, frame, options):
    """Return what every build publishes, [B, N, K] over the scale of the block, its fingerprint,
    and what is known.
    """
    pipeline = get_pipeline(preset)
    values = {}
    engines = {}
    if pipeline.framed and not frame.exists():
        measure_frame(load_model(reference, device="cpu")).save(frame)
    of_all = {"public_key": "k", "preset": preset, "seq_len": options.seq_len}
    rounds = [Round(block_hash=f"fresh-{i}", **of_all) for i in range(options.blocks)]
    for name in BUILDS:
        dtype, _, kernels = name.partition(" ")
        model = load_model(reference, dtype=dtype, device=options.device).with_frame(
            frame if pipeline.framed else None
        )
        model.module.config._attn_implementation = kernels or "sdpa"
        engine = HFEngine(model, batch_size=32, seq_len=options.seq_len)
        proofs = [prove(model, round, range(NONCES), engine=engine) for round in rounds]
        values[name] = np.stack([published(proof.records) for proof in proofs]).astype(np.float64)
        engines[name], size = engine.fingerprint, model.module.config.hidden_size
    size = size if pipeline.output == "distance" and pipeline.head == "random" else 0
    scales_B = np.array([block_scale(round, size) if size else 1.0 for round in rounds])
    values = {name: made_BNK / scales_B[:, None, None] for name, made_BNK in values.items()}
    return values, engines, {"digest": model.digest, "hidden_size": size}


def lives(values_BN, blocks, shape, count, rng, *, cheap_BN=None):
    """Draw lives: residuals [L, A, C], of which a tenth are cheap, and the block and nonces of
    every audit.
    """
    audits, checked = shape
    of_block = np.stack([rng.permutation(blocks)[:audits] for _ in range(count)])
    nonces = rng.permuted(np.tile(np.arange(NONCES), (count, audits, 1)), axis=2)[:, :, :checked]
    values = values_BN[of_block[:, :, None], nonces]
    if cheap_BN is not None:
        values = np.where(
            rng.random(values.shape) < 0.1, cheap_BN[of_block[:, :, None], nonces], values
        )
    return values, of_block, nonces


def convicted(noise, drawn):
    """Return which lives are convicted: those that come under suspicion are lived audit by
    audit.
    """
    values, of_block, nonces = drawn
    test = sequential_test(noise, alpha=ALPHA * 0.9)  # the share of the first test
    suspected = test.accusations(values.reshape(len(values), -1))[:, -1]
    is_convicted = np.zeros(len(values), dtype=bool)
    for row in np.flatnonzero(suspected):
        life = Life(alpha=ALPHA, beta=1e-2)
        for value, block, places in zip(values[row], of_block[row], nonces[row], strict=True):
            life.update(noise, value, block=str(block), positions=places, batch_size=32)
            is_convicted[row] |= life.evidence.verdict == "fraud"
    return float(suspected.mean()), is_convicted


def cells(cell):
    """Return what is seen under every law of a model and preset."""
    return list(rows_of(*cell))


def rows_of(reference, preset, options):
    """Yield what is seen under one law after the other."""
    with TemporaryDirectory() as folder:
        values, engines, engines_known = compute(
            reference, preset, Path(folder) / "frame.safetensors", options
        )
    pipeline = get_pipeline(preset)
    blocks = options.blocks
    pairs = (("bfloat16", "float16"), ("float16", "bfloat16"))
    judges = [(name, ("float32", validator_dtype)) for name, validator_dtype in pairs]
    judges += [
        (name, (f"{name} eager", "float32", validator_dtype)) for name, validator_dtype in pairs
    ]
    for name, judge in judges:
        prover, *again = judge
        of_all = [values[validator_dtype] for validator_dtype in judge]
        node_EBN, cheap_EBN = (
            np.stack([apart(node, validator_dtype) for validator_dtype in of_all])
            for node in (values[name], cheap(values[name], values["float32"]))
        )
        between_PBN = np.stack([apart(*pair) for pair in combinations(of_all, 2)])
        machines = describe_machines([engines[name], engines[prover]])
        for law in range(LAWS):
            for shuffled in (False, True):
                rng = np.random.default_rng(law)
                order = rng.permutation(blocks * NONCES) if shuffled else np.arange(blocks * NONCES)
                node, cheat, between = (
                    values_of_kind.reshape(len(values_of_kind), -1)[:, order].reshape(
                        values_of_kind.shape
                    )
                    for values_of_kind in (node_EBN, cheap_EBN, between_PBN)
                )
                chosen = rng.permutation(blocks)
                of_law = chosen[: blocks // 3]
                others = chosen[blocks // 3 :]
                of_laws = [
                    values_of_kind[:, of_law].reshape(len(values_of_kind), -1)
                    for values_of_kind in (node, between)
                ]
                formats = [build.partition(" ")[0] for build in judge]
                ways = {"residuals": (None, node[0], cheat[0])} if len(again) == 1 else {}
                if control := Control.measured([of_laws], of=formats[0], dtypes=formats[1:]):
                    flat = [
                        [
                            values_of_kind.reshape(len(values_of_kind), -1)
                            for values_of_kind in (residuals, between)
                        ]
                        for residuals in (node, cheat)
                    ]
                    scores = (control.scores(*two).reshape(node[0].shape) for two in flat)
                    ways[("scores", "two controls")[len(again) - 1]] = control, *scores
                for method, (used, values_BN, cheap_BN) in ways.items():
                    measured = {(0, 1): values_BN[of_law].ravel()}
                    build = fit_build(measured, machines, pipeline, **engines_known, control=used)
                    noise = build.noise_between("", engines[prover])
                    suspected, is_convicted = convicted(
                        noise, lives(values_BN, others, HONEST, LIVES, rng)
                    )
                    drawn = lives(values_BN, others, options.cheat, CHEATS, rng, cheap_BN=cheap_BN)
                    _, caught = convicted(noise, drawn)
                    row = {
                        "model": reference,
                        "preset": preset,
                        "formats": [name, prover],
                        "values": method,
                        "law": law,
                    }
                    sizes = np.abs(values_BN)
                    tails = (
                        (np.quantile(sizes, [0.99, 1]) / np.median(sizes)).tolist()
                        if np.median(sizes)
                        else None
                    )
                    row |= {
                        "shuffled": shuffled,
                        "lives": LIVES,
                        "suspected": suspected,
                        "tails": tails,
                    }
                    yield row | {
                        "convicted": int(is_convicted.sum()),
                        "caught": float(caught.mean()),
                    }


def main():
    options_parser = parser(__doc__)
    found = []
    options_parser.add_argument("--models", nargs="+", default=MODELS)
    options_parser.add_argument("--presets", nargs="+", default=PRESETS)
    options_parser.add_argument("--seq-len", type=int, default=256)
    options_parser.add_argument("--blocks", type=int, default=48)
    options_parser.add_argument(
        "--cheat", type=int, nargs=2, default=(20, 8), help="audits of its life, and nonces of each"
    )
    options_parser.add_argument("--device", default="cpu")
    options_parser.add_argument(
        "--at-once", type=int, default=1, help="models and presets, each in a process of its own"
    )
    options = options_parser.parse_args()
    every = [(*cell, options) for cell in product(options.models, options.presets)]
    with ProcessPoolExecutor(options.at_once, mp_context=get_context("spawn")) as pool:
        for (reference, preset, _), rows in zip(every, pool.map(cells, every), strict=True):
            found += rows
            convicted_cells = sum(cell["convicted"] for cell in found)
            note(f"{reference}, {preset}: {convicted_cells} convicted so far")
    table = []
    key = itemgetter("preset", "values", "shuffled")
    for (preset, method, shuffled), group in groupby(sorted(found, key=key), key):
        counts, caught = zip(*((cell["convicted"], cell["caught"]) for cell in group), strict=True)
        row = {
            "preset": preset,
            "values": method,
            "shuffled": shuffled,
            "laws": len(counts),
            "lives": LIVES * len(counts),
        }
        row |= {"convicted": sum(counts), "worst_law": max(counts) / LIVES}
        table.append(row | {"least_caught": min(caught), "caught": float(np.mean(caught))})
    of_all = {"blocks": options.blocks, "positions": options.seq_len, "cheat": options.cheat}
    publish("lives", of_all | {"table": table, "laws": found}, options.output)


if __name__ == "__main__":
    main()
