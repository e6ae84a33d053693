"""What the deterministic mode costs `prove` on a CUDA device.

The mode is a process's, and is switched on before the device is used. So two processes hold the same model, one of them
in the mode, and take turns: each proves the same nonces when it is its turn, while the other waits. The figure is the
median of the ratios of neighbouring turns, with their range. With compiled kernels, and with eager ones.

    python research/benchmarks/gpu_deterministic.py -o research/results/gpu_deterministic.json
"""

import hashlib
import json
import statistics
import subprocess
import sys
import time
from contextlib import ExitStack

import torch
from _common import note, parser, publish

from assay.models import load_model
from assay.poc import HFEngine, Round, prove
from assay.poc.engines.hf.engine import be_deterministic

MODELS = ("shape:qwen3-0.6b", "reference:qwen3")
MODES = ("plain", "deterministic")
KERNELS = ("compiled", "eager")


def work(mode, reference, batch_size):
    """Prove for every line on stdin, `KERNELS NONCES`; answer with the seconds and a digest of the distances."""
    if mode == "deterministic":
        be_deterministic()
    model = load_model(reference, dtype="bfloat16", device="cuda")
    engines = {name: HFEngine(model, batch_size=batch_size, compiled=name == "compiled") for name in KERNELS}
    round = Round(block_hash="bench", public_key="k", model=reference)
    for line in sys.stdin:
        kernels, count = line.split()
        torch.cuda.synchronize()
        start = time.perf_counter()
        proof = prove(model, round, range(int(count)), engine=engines[kernels])
        seconds = time.perf_counter() - start
        print(json.dumps([seconds, hashlib.sha256(proof.distances.tobytes()).hexdigest()]), flush=True)


def ask(worker, kernels, count):
    worker.stdin.write(f"{kernels} {count}\n")
    worker.stdin.flush()
    return json.loads(worker.stdout.readline())


def compare(workers, kernels, options):
    """Let both processes take turns; `nonces` is what the plain one does in about the wanted seconds."""
    batch = options.batch_size
    for worker in workers.values():
        ask(worker, kernels, batch)  # what the first batch compiles
    seconds, _ = ask(workers["plain"], kernels, 8 * batch)
    nonces = batch * max(8, int(options.seconds / seconds * 8))
    turns = [{mode: ask(worker, kernels, nonces) for mode, worker in workers.items()} for _ in range(options.rounds)]
    costs = [turn["deterministic"][0] / turn["plain"][0] for turn in turns]
    rates = {mode: nonces / statistics.median(turn[mode][0] for turn in turns) for mode in MODES}
    return {
        "kernels": kernels,
        "nonces": nonces,
        **{f"{mode}_per_second": round(rate, 1) for mode, rate in rates.items()},
        "time_over_plain": round(statistics.median(costs), 4),
        "range": [round(min(costs), 4), round(max(costs), 4)],
        "same_distances": len({digest for turn in turns for _, digest in turn.values()}) == 1,
    }


def measure(reference, options):
    with ExitStack() as stack:
        workers = {}
        for mode in MODES:
            command = [sys.executable, __file__, "--worker", mode, "--model", reference]
            command += ["--batch-size", str(options.batch_size)]
            worker = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            stack.enter_context(worker)
            stack.callback(worker.stdin.close)
            workers[mode] = worker
        for kernels in KERNELS:
            row = {"model": reference, "batch_size": options.batch_size, **compare(workers, kernels, options)}
            note(f"{reference} {kernels}: {row['time_over_plain']} of the plain time, {row['range']}")
            yield row


def main():
    arguments = parser(__doc__)
    arguments.add_argument("--worker", choices=MODES, help="what this file starts by itself")
    arguments.add_argument("--model", help="one model instead of both")
    arguments.add_argument("--batch-size", type=int, default=128)
    arguments.add_argument("--seconds", type=float, default=1.5, help="of one turn")
    arguments.add_argument("--rounds", type=int, default=7)
    options = arguments.parse_args()
    if options.worker:
        return work(options.worker, options.model, options.batch_size)
    models = [options.model] if options.model else MODELS
    rows = [row for reference in models for row in measure(reference, options)]
    return publish("gpu_deterministic", {"rows": rows}, options.output)


if __name__ == "__main__":
    main()
