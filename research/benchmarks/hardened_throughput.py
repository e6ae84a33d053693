"""What the hardened preset costs an honest node: nonces per second beside `poc-2.0`, in one run.

Both presets prove in turn on the same model and batch shape, in every dtype; every round of turns gives one ratio of
each kind, and the order alternates. A figure is the median ratio, with its quartiles. *Over the first dtype* compares
with `poc-2.0` and with the same preset in the first dtype of the list: what it costs to change the number format too.
Kernels are those of `prove`, compiled where there is CUDA, unless `--engine` says otherwise.

    python benchmarks/hardened_throughput.py -o benchmarks/results/hardened_throughput.json
    python benchmarks/hardened_throughput.py --models shape:qwen3-0.6b --dtypes bfloat16 float16 --batch-size 128 \
        --batches 16 --rounds 10 -o benchmarks/results/hardened_throughput_h200_qwen3-0.6b.json
    python benchmarks/hardened_throughput.py --models shape:llama-3.2-1b --dtypes bfloat16 float16 --batch-size 128 \
        --batches 8 --rounds 8 -o benchmarks/results/hardened_throughput_h200_llama-3.2-1b.json
    python benchmarks/hardened_throughput.py --engine vllm --dtypes float32 --batches 4 \
        -o benchmarks/results/hardened_throughput_vllm.json   # with the python that has vLLM
"""

import statistics
import time
from contextlib import ExitStack

from _common import note, parser, publish

from assay.models import load_model
from assay.poc import HFEngine, Round, prove
from assay.poc.engines.hf import worth_compiling

PRESETS = ("poc-2.0", "hardened")


def seconds(engine, preset, nonces):
    round = Round(block_hash="bench", public_key="k", preset=preset, seq_len=engine.seq_len)
    start = time.perf_counter()
    prove(engine.model, round, range(nonces), engine=engine)
    return time.perf_counter() - start


def make_engine(reference, dtype, options, stack):
    shape = {"batch_size": options.batch_size, "seq_len": options.seq_len}
    if options.engine == "vllm":
        from assay.poc.engines.vllm import VLLMEngine

        limits = {"gpu_memory_utilization": 0.8 / len(options.dtypes), "max_model_len": 2 * options.seq_len}
        limits |= {"max_num_batched_tokens": options.batched_tokens} if options.batched_tokens else {}
        return stack.enter_context(VLLMEngine(reference, dtype=dtype, **shape, **limits))
    model = load_model(reference, dtype=dtype, device=options.device)
    compiled = worth_compiling(model) if options.engine == "auto" else options.engine == "compiled"
    return HFEngine(model, **shape, compiled=compiled)


def measure(reference, options):
    """One row per dtype."""
    with ExitStack() as stack:
        return compare(
            reference, {dtype: make_engine(reference, dtype, options, stack) for dtype in options.dtypes}, options
        )


def compare(reference, engines, options):
    """Let the engines prove in turn."""
    nonces = options.batch_size * options.batches
    cases = [(dtype, preset) for dtype in options.dtypes for preset in PRESETS]
    for dtype, preset in cases:
        seconds(engines[dtype], preset, 2 * options.batch_size)
    times = {case: [] for case in cases}
    for turn in range(options.rounds):
        for dtype, preset in cases if turn % 2 else reversed(cases):
            times[dtype, preset].append(seconds(engines[dtype], preset, nonces))

    def over(case, other):
        return [b / a for a, b in zip(times[case], times[other], strict=True)]

    first, rows = options.dtypes[0], []
    for dtype in options.dtypes:
        low, middle, high = statistics.quantiles(over((dtype, "hardened"), (dtype, "poc-2.0")), n=4)
        row = {
            "model": reference,
            "dtype": dtype,
            "batch_size": options.batch_size,
            "seq_len": options.seq_len,
            "library": engines[dtype].fingerprint.as_dict()["library"],
            "nonces_per_second": {preset: nonces / statistics.median(times[dtype, preset]) for preset in PRESETS},
            "hardened_over_poc": middle,
            "quartiles": [low, high],
        }
        if dtype != first:
            against = {preset: over((dtype, "hardened"), (first, preset)) for preset in PRESETS}
            row["hardened_over_first_dtype"] = {
                preset: dict(zip(("low", "middle", "high"), statistics.quantiles(found, n=4), strict=True))
                for preset, found in against.items()
            }
        note(f"{row}")
        rows.append(row)
    return rows


def main():
    arguments = parser(__doc__)
    arguments.add_argument("--models", nargs="+", default=["reference:qwen3", "reference:llama"])
    arguments.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    arguments.add_argument("--engine", choices=("auto", "eager", "compiled", "vllm"), default="auto")
    arguments.add_argument("--batched-tokens", type=int, help="positions of a step of vLLM")
    arguments.add_argument("--device")
    arguments.add_argument("--batch-size", type=int, default=32)
    arguments.add_argument("--seq-len", type=int, default=256)
    arguments.add_argument("--batches", type=int, default=1)
    arguments.add_argument("--rounds", type=int, default=6)
    options = arguments.parse_args()
    rows = [row for reference in options.models for row in measure(reference, options)]
    figures = {"cases": rows, "smallest_hardened_over_poc": min(row["hardened_over_poc"] for row in rows)}
    publish("hardened_throughput", figures, options.output)


if __name__ == "__main__":
    main()
