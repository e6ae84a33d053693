"""Which laws of one block accuse honest audits of other blocks?

Law by law, on the residuals that `benchmarks/shares.py --residuals` writes.

    python benchmarks/shares.py --device cuda --laws 6 --residuals residuals.npz
    python benchmarks/one_block_laws.py residuals.npz -o benchmarks/results/one_block_laws.json

The models with random weights are left out: none of their pairs is accused in more than .2 % of its audits.
"""

import itertools
from dataclasses import asdict
from pathlib import Path

import numpy as np
from _common import note, parser, publish
from one_nonce import Factors, drawn
from shares import ALPHA, AUDITED, DTYPES, LAW_SIZES, MODELS, PRESETS, name_of, noise_of, read_residuals

from assay.poc.verdict import sequential_test


def main():
    arguments = parser(__doc__)
    arguments.add_argument("residuals", type=Path, help="file that benchmarks/shares.py wrote")
    arguments.add_argument("--blocks", type=int, default=40)
    arguments.add_argument("--laws", type=int, default=6, help="blocks that a law is fitted to")
    arguments.add_argument("--audits", type=int, default=2000, help="audits of every pair of blocks")
    arguments.add_argument("--seed", type=int, default=3)
    options = arguments.parse_args()
    kept = read_residuals(options.residuals)
    rows = []
    for model, preset, dtype, size in itertools.product(MODELS[:2], PRESETS, DTYPES, LAW_SIZES):
        blocks = [kept[name_of(model, preset, dtype, block)] for block in range(options.blocks)]
        rng = np.random.default_rng(options.seed)
        for law in range(options.laws):
            noise = noise_of(preset, blocks[law][:size])
            test = sequential_test(noise, alpha=ALPHA)
            found = [
                Factors(test, errors_N).accused("none", drawn(rng, errors_N.size, options.audits, AUDITED)).mean()
                for block, errors_N in enumerate(blocks)
                if block != law
            ]
            row = {"model": model, "preset": preset, "dtype": dtype, "law_from": size, "block": law}
            row |= {"law": asdict(noise.law), "spread": noise.spread.sd}
            rows.append(row | {"accused": float(np.mean(found)), "accused_worst_pair": float(np.max(found))})
        worst = max(row["accused_worst_pair"] for row in rows[-options.laws :])
        note(f"{model} {preset} {dtype}, law from {size}: worst pair {worst:.4f}")
    settings = {"seed": options.seed, "blocks": options.blocks, "laws": options.laws, "audits": options.audits}
    publish("one_block_laws", settings | {"rows": rows}, options.output)


if __name__ == "__main__":
    main()
