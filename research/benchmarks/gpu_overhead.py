"""What the transforms cost models of 7.3 M parameters on a CUDA device, whose forward pass is short; in one run.

`serial` is the figure of the experiments (`assay.research`): a batch with an approach over a batch of inputs and
forward pass alone, waiting for the device each time, less one. `prove` is the same for whole proofs, where the next
batch runs meanwhile: the time of a batch of `prove`, records included, over that of inputs and forward pass, which are
queued one after the other without waiting, less one. Both with eager kernels, as the experiments had them, and with
compiled ones, as `prove` has them by itself. Medians of rounds in turns.

`texts` is what the host takes to write and hash the seed texts of a batch, all at once and one by one, and the rates of
`prove` with both.

    python benchmarks/gpu_overhead.py -o benchmarks/results/gpu_overhead.json
"""

import statistics
import time

import torch
from _common import note, parser, publish

from assay.models import load_model
from assay.poc import PIPELINES, HFEngine, Round, prove
from assay.poc.engines.hf import worth_compiling
from assay.poc.protocol._round import NONCE_TEXTS
from assay.research.approaches._approaches import overheads
from assay.streams import seeds

MODELS = ("reference:qwen3", "reference:llama")
PRESETS = ("poc-2.0", "artifact")
SIZES = (32, 128)
REFLECTIONS = 8


def seconds(function):
    """Time of a call, until the device is done."""
    start = time.perf_counter()
    function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def one_by_one(round, stream, nonces, *, count=1, k=0):
    """The texts of many nonces as they were written before: every one from its template."""
    given = {"block": round.block_hash, "key": round.public_key, "k": k}
    return [NONCE_TEXTS[stream].format(**given, nonce=n, index=i) for n in nonces for i in range(count)]


def medians(timed, rounds):
    """Median seconds of several things that take turns, after a first time that does not count."""
    times = {name: [] for name in timed}
    for _ in range(rounds + 1):
        for name, function in timed.items():
            times[name].append(seconds(function))
    return {name: statistics.median(values[1:]) for name, values in times.items()}


def measure(model, size, compiled, options):
    engine = HFEngine(model, batch_size=size, compiled=compiled)
    rounds = {preset: Round(block_hash="bench", public_key="k", preset=preset) for preset in PRESETS}
    pipelines = [PIPELINES[preset] for preset in PRESETS]
    nonces = range(size * options.batches)

    def plain():
        for start in range(0, len(nonces), size):
            engine._run(engine.inputs(rounds["poc-2.0"], nonces[start : start + size]), None)

    def slowly():
        usual, Round.texts = Round.texts, one_by_one
        try:
            prove(model, rounds["poc-2.0"], nonces, engine=engine)
        finally:
            Round.texts = usual

    timed = {"plain": plain, "texts one by one": slowly}
    timed |= {preset: lambda r=r: prove(model, r, nonces, engine=engine) for preset, r in rounds.items()}
    times = medians(timed, options.rounds)
    serial = overheads(engine, rounds["poc-2.0"], pipelines, options.batches)
    row = {
        "model": model.reference,
        "kernels": "compiled" if compiled else "eager",
        "batch_size": size,
        "plain_nonces_per_second": round(len(nonces) / times["plain"]),
        "prove_nonces_per_second": {preset: round(len(nonces) / times[preset]) for preset in PRESETS},
        "one_by_one_nonces_per_second": round(len(nonces) / times["texts one by one"]),
        "serial_overhead": {preset: round(serial[preset], 4) for preset in PRESETS},
        "prove_overhead": {preset: round(times[preset] / times["plain"] - 1, 4) for preset in PRESETS},
    }
    note(str(row))
    return row


def host_of_texts(size, repeats=200):
    """Milliseconds of the host for the seeds of one batch of preset poc-2.0: inputs, signs and reflections."""
    round = Round(block_hash="0x" + "ab" * 32, public_key="k" * 44)
    wanted = (("inputs", 1), ("signs", 1), ("reflection", REFLECTIONS))
    nonces = range(100_000, 100_000 + size)

    def best(texts):
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            for name, count in wanted:
                seeds(texts(name, nonces, count=count))
            times.append(time.perf_counter() - start)
        return float(f"{min(times) * 1e3:.4f}")

    slow = best(lambda *given, **more: one_by_one(round, *given, **more))
    return {"batch_size": size, "one_by_one_ms": slow, "at_once_ms": best(round.texts)}


def main():
    arguments = parser(__doc__)
    arguments.add_argument("--device", default="cuda")
    arguments.add_argument("--batches", type=int, default=60, help="of every timing")
    arguments.add_argument("--rounds", type=int, default=5)
    options = arguments.parse_args()
    rows = []
    for reference in MODELS:
        model = load_model(reference, dtype="bfloat16", device=options.device)
        for compiled in (False, True) if worth_compiling(model) else (False,):
            rows += [measure(model, size, compiled, options) for size in SIZES]
    figures = {"dtype": "bfloat16", "seq_len": 256, "cases": rows, "texts": [host_of_texts(size) for size in SIZES]}
    publish("gpu_overhead", figures, options.output)


if __name__ == "__main__":
    main()
