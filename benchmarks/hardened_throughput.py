"""What the hardened preset costs an honest node: nonces per second beside `poc-2.0`, in one run.

Both presets prove in turn on the same model, dtype and batch shape; every pair of turns gives one ratio, and the order
within a pair alternates. The figure is the median ratio, with its quartiles.

    python benchmarks/hardened_throughput.py -o benchmarks/results/hardened_throughput.json
"""

import statistics
import time

from _common import note, parser, publish

from assay.models import load_model
from assay.poc import HFEngine, Round, prove

PRESETS = ("poc-2.0", "hardened")


def seconds(model, engine, preset, nonces):
    round = Round(block_hash="bench", public_key="k", preset=preset, seq_len=engine.seq_len)
    start = time.perf_counter()
    prove(model, round, range(nonces), engine=engine)
    return time.perf_counter() - start


def measure(reference, dtype, options):
    model = load_model(reference, dtype=dtype, device=options.device)
    engine = HFEngine(model, batch_size=options.batch_size, seq_len=options.seq_len)
    nonces = options.batch_size * options.batches
    for preset in PRESETS:
        seconds(model, engine, preset, options.batch_size)
    times = {preset: [] for preset in PRESETS}
    for turn in range(options.rounds):
        for preset in PRESETS if turn % 2 else reversed(PRESETS):
            times[preset].append(seconds(model, engine, preset, nonces))
    ratios = [a / b for a, b in zip(*times.values(), strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    note(f"{reference} {dtype}: hardened proves {middle:.3f} ({low:.3f} to {high:.3f}) times as fast as poc-2.0")
    return {
        "model": reference,
        "dtype": dtype,
        "batch_size": options.batch_size,
        "seq_len": options.seq_len,
        "nonces_per_second": {preset: nonces / statistics.median(values) for preset, values in times.items()},
        "hardened_over_poc": middle,
        "quartiles": [low, high],
    }


def main():
    arguments = parser(__doc__)
    arguments.add_argument("--models", nargs="+", default=["reference:qwen3", "reference:llama"])
    arguments.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    arguments.add_argument("--device")
    arguments.add_argument("--batch-size", type=int, default=32)
    arguments.add_argument("--seq-len", type=int, default=256)
    arguments.add_argument("--batches", type=int, default=1)
    arguments.add_argument("--rounds", type=int, default=6)
    options = arguments.parse_args()
    rows = [measure(reference, dtype, options) for reference in options.models for dtype in options.dtypes]
    figures = {"cases": rows, "smallest_hardened_over_poc": min(row["hardened_over_poc"] for row in rows)}
    publish("hardened_throughput", figures, options.output)


if __name__ == "__main__":
    main()
