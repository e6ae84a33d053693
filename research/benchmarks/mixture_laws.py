"""Is an honest mixture accused in blocks that its law has not seen, by the size of the law?

Two engines that round differently ask different experts where two are nearly as good, and a nonce in which they do is
many times as far off as others: a block has few of them. The residuals are those of two ways of attention in bfloat16
on one CPU; a law of one block, as `assay poc calibrate` fits it, judges audits of 256 nonces of the other blocks.

    OMP_NUM_THREADS=1 python benchmarks/mixture_laws.py -o benchmarks/results/mixture_laws.json
"""

import sys
import tempfile
from pathlib import Path

import numpy as np
from _common import note, parser, publish
from shares import ALPHA, noise_of

sys.path.insert(0, str(Path(__file__).parents[1]))

from assay.models import load_model
from assay.poc import HFEngine, Round, prove
from assay.poc.protocol import block_scale
from assay.poc.verdict import residuals, sequential_test
from tests.models.storing import make_mixture

PRESETS, ATTENTION = ("poc-2.0", "hardened"), ("sdpa", "eager")
LAWS = {256: 24, 1024: 6}  # nonces of a law, and how many laws of that size
BLOCKS, AUDITED, AUDITS, BATCH, SEQ_LEN = 24, 256, 40, 128, 64
COUNTS = [max(LAWS) if block < LAWS[max(LAWS)] else AUDITED for block in range(BLOCKS)]
FAR = 8.0  # times the median, beyond which a nonce counts as one with other experts


def measured(checkpoint, preset, named="mixture", counts=COUNTS):
    """Residuals by block, over the scale of the block, [N] each: so many nonces of each block of a name."""
    proofs = {}
    for attention in ATTENTION:
        model = load_model(checkpoint, dtype="bfloat16", device="cpu")
        model.module.set_attn_implementation(attention)
        engine = HFEngine(model, batch_size=BATCH, seq_len=SEQ_LEN)
        for block, count in enumerate(counts):
            round = Round(block_hash=f"{named} {block}", public_key="k", preset=preset, seq_len=SEQ_LEN, model="m")
            proofs[attention, block] = prove(model, round, range(count), engine=engine)
        note(f"{checkpoint.name} {preset} by {attention} measured")
    pairs = [[proofs[attention, block] for attention in ATTENTION] for block in range(len(counts))]
    return [residuals(one.records, other.records) / block_scale(one.round, model.hidden_size) for one, other in pairs]


def judged(preset, blocks, size):
    """Shares of honest audits that laws of so many nonces of one block accuse in the other blocks."""
    rng, accused = np.random.default_rng(0), np.full((LAWS[size], BLOCKS), np.nan)
    for law in range(LAWS[size]):
        test = sequential_test(noise_of(preset, blocks[law][:size]), alpha=ALPHA)
        for block in set(range(BLOCKS)) - {law}:
            audits_RC = np.stack([rng.permutation(blocks[block][:AUDITED]) for _ in range(AUDITS)])
            accused[law, block] = test.accusations(audits_RC)[:, -1].mean()
    by_law = np.nanmean(accused, axis=1)
    figures = {"laws": LAWS[size], "accused": float(by_law.mean()), "worst_law": float(by_law.max())}
    return {"preset": preset, "law_from": size, **figures, "worst_pair": float(np.nanmax(accused))}


def main():
    made = parser(__doc__)
    made.add_argument("--kinds", nargs="+", choices=("qwen3-moe", "mixtral"), default=["qwen3-moe", "mixtral"])
    arguments, rows = made.parse_args(), []
    with tempfile.TemporaryDirectory() as folder:
        for kind in arguments.kinds:
            checkpoint = make_mixture(kind, Path(folder) / kind, head_dim=64)
            for preset in PRESETS:
                blocks = measured(checkpoint, preset)
                audited = np.abs([errors_N[:AUDITED] for errors_N in blocks])
                far = (audited > FAR * np.median(audited)).sum(axis=1)
                counts = {"far_nonces_of_a_block": [int(far.min()), float(far.mean()), int(far.max())]}
                rows += [{"model": kind, **judged(preset, blocks, size), **counts} for size in LAWS]
    publish(
        "mixture_laws",
        {"seq_len": SEQ_LEN, "audited": AUDITED, "audits_of_a_pair": AUDITS, "rows": rows},
        arguments.output,
    )


if __name__ == "__main__":
    main()
