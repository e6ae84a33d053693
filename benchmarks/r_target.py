"""r_target in closed form and measured: d = 8192 (poc-2.0), and vectors of 12 and 64 coordinates.

For each bundled model, the distances of N nonces of three blocks together; for three valid rates, the quantile with its
interval, beside the chord law's. For vectors, the distance to the target of the block in R^k counts.

    python benchmarks/r_target.py --nonces 2048 --seq-len 16 -o benchmarks/results/r_target.json
"""

from dataclasses import replace

import numpy as np
from _common import note, parser, publish

from assay.models import load_model
from assay.poc import HFEngine, Round, get_pipeline
from assay.poc.protocol._pipelines import Step
from assay.poc.verdict._targets import distances_from, r_target_from
from assay.research.runs._states import published

BLOCKS = ("block_alpha", "block_beta", "block_gamma")
MODELS = ("reference:qwen3", "reference:llama")
RATES = (0.1, 0.2, 0.5905)


def haar(k):
    """The artifact pipeline with k coordinates: pick k, k − 1 reflections."""
    unit = Step("unit")
    return replace(
        get_pipeline("artifact"), name=f"artifact k={k}", hidden=(unit, Step("pick", k), Step("rotate", k - 1), unit)
    )


def main():
    arguments = parser(__doc__)
    arguments.add_argument("--nonces", type=int, default=2048, help="per block")
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
        for block in BLOCKS:
            round = Round(block_hash=block, public_key="node_A", seq_len=options.seq_len)
            values = published(engine, round, pipelines, range(options.nonces))
            for name, of_block in values.items():
                found[name].append(distances_from(of_block, round))
            note(f"{reference} {block}")
        for pipeline in pipelines:
            size = pipeline.output_size(model.hidden_size, model.vocab_size)
            pooled = np.concatenate(found[pipeline.name])
            for rate in RATES:
                row = {"model": reference, "pipeline": pipeline.name, **r_target_from(pooled, rate, size).as_dict()}
                rows.append(row)
                note(f"{reference} {pipeline.name} {rate}: {row['measured']:.5f} for {row['r_target']:.5f}")
    figures = {
        "nonces_per_block": options.nonces,
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
