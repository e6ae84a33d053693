"""What other presets cost an honest node: nonces per second of `prove` over those of `poc-2.0`, in
one run.

The presets prove in turns on one engine, whose kernels are those of `prove`, and every round of
turns gives one ratio; the order alternates. A row has the median ratio of each preset with its
quartiles.

    python research/benchmarks/presets.py \
      --models shape:qwen3-0.6b shape:llama-3.2-1b shape:llama-3.1-8b \
        --dtypes bfloat16 float16 -o research/results/presets_h200.json
"""

import statistics

from _common import note, parser, publish, round_to, wall_seconds

from assay.models import load_model
from assay.poc import HFEngine, Round, prove
from assay.poc.engines.hf.compiled_forward import worth_compiling

FIRST = "poc-2.0"


def measure(reference, dtype, options):
    """Return nonces per second of every preset, and what they are over those of the first."""
    model = load_model(reference, dtype=dtype, device=options.device)
    engine = HFEngine(model, batch_size=options.batch_size, compiled=worth_compiling(model))
    cases = [FIRST, *options.presets]

    def seconds(preset, batches):
        round = Round(block_hash="bench", public_key="k", preset=preset)
        nonces = range(batches * options.batch_size)
        return wall_seconds(lambda: prove(model, round, nonces, engine=engine))

    for preset in cases:
        seconds(preset, 2)
    times = {preset: [] for preset in cases}
    for turn in range(options.rounds):
        for preset in cases if turn % 2 else reversed(cases):
            times[preset].append(seconds(preset, options.batches))
    row = {"model": reference, "dtype": dtype, "library": engine.fingerprint.library}
    nonces = options.batches * options.batch_size
    row["nonces_per_second"] = {
        preset: round_to(nonces / statistics.median(times[preset])) for preset in cases
    }
    for preset in options.presets:
        ratios = [first / own for own, first in zip(times[preset], times[FIRST], strict=True)]
        row[f"{preset} over {FIRST}, quartiles"] = [
            round_to(one) for one in statistics.quantiles(ratios, n=4)
        ]
    note(f"{row}")
    return row


def main():
    made = parser(__doc__)
    made.add_argument("--models", nargs="+", default=["reference:qwen3"])
    made.add_argument("--dtypes", nargs="+", default=["bfloat16"])
    made.add_argument("--presets", nargs="+", default=["hardened"])
    made.add_argument("--device")
    made.add_argument("--batch-size", type=int, default=128)
    made.add_argument("--batches", type=int, default=8)
    made.add_argument("--rounds", type=int, default=8)
    options = made.parse_args()
    cases = [measure(model, dtype, options) for model in options.models for dtype in options.dtypes]
    shape = {
        "batch_size": options.batch_size,
        "seq_len": 256,
        "batches": options.batches,
        "rounds": options.rounds,
    }
    publish("presets", shape | {"cases": cases}, options.output)


if __name__ == "__main__":
    main()
