"""`prove`, factors and gradients of two commits on one device, or of this one with and without the
deterministic mode.

Each way has a process that sees its assay first on the path, loads the model once and waits. They
take turns task by task, so that a machine that slows down slows both. The first way begins in even
turns; what runs first after another task can be 5 % slower, so a ratio is of two turns, one of each
order. Published are the median of the ratios and its 95 % interval by ranks.

    git worktree add .bench/old COMMIT
    python research/benchmarks/two_commits.py --old .bench/old/src \
      --models shape:qwen3-0.6b shape:llama-3.1-8b \
        -o research/results/two_commits_h100.json
    python research/benchmarks/two_commits.py --deterministic --device cuda --batch 128 \
      --nonces 3072 \
        --models shape:qwen3-0.6b -o research/results/gpu_deterministic.json

Figures are nonces, samples, or factors of the whole model per second. A turn before the others, in
which kernels are compiled, does not count. An interrupt ends the turns, and those that were whole
are published.
"""

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from _common import ROOT, median_interval, note, paired_ratios, parser, publish, wall_seconds


def prove_task(chosen, loaded, nonces, folder):
    """Return the task that proves, and gives the digest of the distances."""
    from assay.poc import HFEngine, Round, prove

    round = Round(block_hash="block", public_key="key", seq_len=chosen.seq_len)
    compiled = chosen.device == "cuda" and not chosen.eager
    engine = HFEngine(loaded, batch_size=chosen.batch, seq_len=chosen.seq_len, compiled=compiled)
    path = Path(folder) / "proof.jsonl"

    def task():
        proof = prove(loaded, round, range(nonces), engine=engine, output=path, overwrite=True)
        return hashlib.sha256(proof.distances.tobytes()).hexdigest()

    return task


def gradient_tasks(chosen, loaded):
    """Return the tasks that compute factors and gradients, and how many of each."""
    from transformers import AutoTokenizer

    from assay.vhack import Sample, per_sample_gradients, weight_svd

    samples = [
        Sample(f"Task {n}: add.", f" def add(a, b): return a + b + {n}" * 8)
        for n in range(chosen.samples)
    ]
    tokenizer = loaded.tokenizer or AutoTokenizer.from_pretrained(
        ROOT / "src/assay/models/reference/qwen3"
    )
    svd = weight_svd(loaded, method="gram")

    def factors():
        weight_svd(loaded, method="gram")

    def gradients():
        per_sample_gradients(samples, loaded, tokenizer=tokenizer, svd=svd)

    return {"factors": (factors, 1), "gradients": (gradients, chosen.samples)}


def work(chosen, way, model, nonces):
    """Run the task that each line of stdin names, and print its rate and what it gives."""
    from assay import load_model

    if way == "deterministic":
        from assay.poc.engines.hf.engine import be_deterministic

        be_deterministic()
    loaded = load_model(model, device=chosen.device)
    with tempfile.TemporaryDirectory() as folder:
        tasks = {"prove": (prove_task(chosen, loaded, nonces, folder), nonces)}
        if model in chosen.gradients:
            tasks |= gradient_tasks(chosen, loaded)
        print(json.dumps(list(tasks)), flush=True)
        for line in sys.stdin:
            task, count = tasks[line.strip()]
            results = []
            seconds = wall_seconds(lambda task=task, results=results: results.append(task()))
            print(json.dumps([count / seconds, results[0]]), flush=True)


class Worker:
    """The process of one way, with a model."""

    def __init__(self, way, source, model, nonces):
        path = os.pathsep.join([str(Path(source).resolve()), os.environ.get("PYTHONPATH", "")])
        self._process = subprocess.Popen(
            [sys.executable, *sys.argv, "--worker", way, model, str(nonces)],
            env=os.environ | {"PYTHONPATH": path},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
            start_new_session=True,  # an interrupt is for the parent alone
        )

    def wait(self):
        """Wait until the model is loaded; return the names of the tasks."""
        return json.loads(self._process.stdout.readline())

    def run(self, task):
        """Return the rate of a task, and what it gives."""
        self._process.stdin.write(task + "\n")
        return json.loads(self._process.stdout.readline())

    def close(self):
        """End the process."""
        self._process.stdin.close()
        self._process.wait()


def compare(sources, model, nonces, turns):
    """Return the rates of both ways, their ratios, and whether the distances are equal."""
    workers = {way: Worker(way, source, model, nonces) for way, source in sources.items()}
    first, second = workers
    tasks, _ = (worker.wait() for worker in workers.values())
    rates = {way: {task: [] for task in tasks} for way in workers}
    digests = set()
    try:
        for turn in range(-1, turns):
            results = {}
            for task in tasks:
                for way in workers if turn % 2 == 0 else reversed(workers):
                    results[way, task], digest = workers[way].run(task)
                    if digest:
                        digests.add(digest)
            if turn >= 0:
                for (way, task), rate in results.items():
                    rates[way][task].append(rate)
            note(f"{model}: {turn + 1} of {turns} turns")
    except KeyboardInterrupt:
        note("interrupted: the turns so far count")
    for worker in workers.values():
        worker.close()
    ratios = {
        task: median_interval(paired_ratios(rates[first][task], rates[second][task]))
        for task in rates[first]
    }
    return {
        "per_second": rates,
        f"{second}_over_{first}": ratios,
        "same_distances": len(digests) == 1,
    }


def main():
    options = parser(__doc__)
    options.add_argument("--old", type=Path, help="src of the older commit")
    options.add_argument(
        "--deterministic",
        action="store_true",
        help="compare the deterministic mode with the plain one",
    )
    options.add_argument("--models", nargs="+", default=["reference:qwen3"])
    options.add_argument(
        "--gradients",
        nargs="*",
        default=[],
        help="models whose factors and gradients are measured, too",
    )
    options.add_argument(
        "--nonces", type=int, nargs="+", default=[128], help="nonces of a proof, for each model"
    )
    options.add_argument("--batch", type=int, default=32)
    options.add_argument("--seq-len", type=int, default=256)
    options.add_argument("--samples", type=int, default=24)
    options.add_argument("--turns", type=int, default=12, help="an even number")
    options.add_argument("--device", default="cpu")
    options.add_argument("--eager", action="store_true", help="without compiled kernels")
    options.add_argument("--worker", nargs=3, help="what this file starts by itself")
    chosen = options.parse_args()
    if chosen.worker:
        way, model, nonces = chosen.worker
        work(chosen, way, model, int(nonces))
        return
    sources = {"old": chosen.old, "new": ROOT / "src"}
    if chosen.deterministic:
        sources = dict.fromkeys(("plain", "deterministic"), ROOT / "src")
    figures = {
        model: compare(sources, model, nonces, chosen.turns)
        for model, nonces in zip(chosen.models, chosen.nonces, strict=True)
    }
    publish("two_commits", {"device": chosen.device, "models": figures}, chosen.output)


if __name__ == "__main__":
    main()
