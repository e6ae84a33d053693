"""r_target in closed form and measured: d = 8192 (poc-2.0), and vectors of 12 and 64 coordinates.

For each bundled model and three valid rates: the quantile of the distances of N nonces in each of M blocks together,
with its interval, beside the chord law's. With poc-2.0 a block has a factor of its own, so every row of it is given
three times: with the blocks' own spread, with the factors that the model and the heads predict, and block by block.
There, `blocks_inside` counts the blocks whose interval holds the closed form under an assumed effective dimension, with
predicted factors, and by the nonces alone. For vectors, the distance to the target of the block in R^k counts.

    python benchmarks/r_target.py --nonces 512 --blocks 24 --seq-len 16 -o benchmarks/results/r_target.json
"""

import math
from dataclasses import replace

import numpy as np
from _common import note, parser, publish

from assay.models import load_model
from assay.poc import HFEngine, Round, get_pipeline, measure_block_factor
from assay.poc.protocol._pipelines import Step
from assay.poc.verdict._targets import distances_from, r_target_from
from assay.research.runs._states import published

MODELS = ("reference:qwen3", "reference:llama")
RATES = (0.1, 0.2, 0.5905)


def haar(k):
    """The artifact pipeline with k coordinates: pick k, k − 1 reflections."""
    unit = Step("unit")
    return replace(
        get_pipeline("artifact"), name=f"artifact k={k}", hidden=(unit, Step("pick", k), Step("rotate", k - 1), unit)
    )


def block_by_block(distances, factors, rate, size):
    """Say how each block's own interval and offset fare in the three ways."""
    ways = {
        "assumed": [r_target_from([d], rate, size) for d in distances],
        "with_factors": [r_target_from([d], rate, size, factors=[f]) for d, f in zip(distances, factors, strict=True)],
        "nonces_alone": [r_target_from([d], rate, size, effective_dimension=math.inf) for d in distances],
    }
    return {
        "blocks_inside": {name: sum(found.agrees for found in rows) for name, rows in ways.items()},
        "sd_of_offsets": {
            name: float(np.std([found.off_in_standard_errors for found in rows])) for name, rows in ways.items()
        },
        "valid_rates": [float((d < ways["assumed"][0].r_target).mean()) for d in distances],
    }


def main():
    arguments = parser(__doc__)
    arguments.add_argument("--nonces", type=int, default=512, help="per block")
    arguments.add_argument("--blocks", type=int, default=24)
    arguments.add_argument("--seq-len", type=int, default=16)
    arguments.add_argument("--batch-size", type=int, default=32)
    arguments.add_argument("--dtype", default="float32")
    arguments.add_argument("--device")
    options = arguments.parse_args()
    pipelines = [get_pipeline("poc-2.0"), haar(12), haar(64)]
    rows = []
    for reference in MODELS:
        model = load_model(reference, dtype=options.dtype, device=options.device)
        engine = HFEngine(model, batch_size=options.batch_size, seq_len=options.seq_len)
        found = {pipeline.name: [] for pipeline in pipelines}
        factors = []
        for number in range(options.blocks):
            round = Round(block_hash=f"block_{number}", public_key="node_A", seq_len=options.seq_len)
            values = published(engine, round, pipelines, range(options.nonces))
            for name, of_block in values.items():
                found[name].append(distances_from(of_block, round))
            factors.append(measure_block_factor(model, replace(round, public_key="states")))
        note(reference)
        for pipeline in pipelines:
            size, distances = pipeline.output_size(model.hidden_size, model.vocab_size), found[pipeline.name]
            for rate in RATES:
                row = {"model": reference, "pipeline": pipeline.name}
                if pipeline.output == "vector":
                    row |= r_target_from(distances, rate, size, effective_dimension=math.inf).as_dict()
                else:
                    row |= r_target_from(distances, rate, size).as_dict()
                    row["with_factors"] = r_target_from(distances, rate, size, factors=factors).as_dict()
                    row |= block_by_block(distances, factors, rate, size)
                rows.append(row)
                note(f"{reference} {pipeline.name} {rate}: {row['measured']:.5f} for {row['r_target']:.5f}")
    figures = {
        "nonces_per_block": options.nonces,
        "blocks": options.blocks,
        "seq_len": options.seq_len,
        "batch_size": options.batch_size,
        "dtype": options.dtype,
        "rows": rows,
        "largest_offset_in_standard_errors": max(abs(row["off_in_standard_errors"]) for row in rows),
        "inside_the_interval": sum(row["agrees"] for row in rows) / len(rows),
    }
    publish("r_target", figures, options.output)


if __name__ == "__main__":
    main()
