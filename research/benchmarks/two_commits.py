"""`prove` and gradients of two commits on one device, in turns, each in a process of its own.

    git worktree add .bench/old COMMIT
    python research/benchmarks/two_commits.py --old .bench/old/src --models shape:qwen3-0.6b shape:llama-3.1-8b \
        -o research/results/two_commits_h100.json

Figures are the best of the rounds of a process (nonces or samples per second); `new_over_old` is the ratio of the
medians over the turns. Old and new take turns, old first in even turns.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SEQ_LEN = 256


def measure(arguments: argparse.Namespace) -> dict[str, float]:
    """Return the figures of the assay that is on the path."""
    import torch

    from assay import load_model
    from assay.poc import HFEngine, Round, prove

    def best(work, count):
        seconds = []
        for _ in range(arguments.rounds + 1):  # the first one compiles
            if arguments.device == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            work()
            if arguments.device == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
        return count / min(seconds[1:])

    model = load_model(arguments.model, device=arguments.device)
    round = Round(block_hash="block", public_key="key", seq_len=arguments.seq_len)
    engine = HFEngine(model, batch_size=arguments.batch, seq_len=arguments.seq_len, compiled=arguments.device == "cuda")
    with tempfile.TemporaryDirectory() as folder:

        def work():
            prove(
                model,
                round,
                range(arguments.nonces),
                engine=engine,
                output=Path(folder) / "proof.jsonl",
                overwrite=True,
            )

        found = {"prove": best(work, arguments.nonces)}
    if arguments.gradients:
        from transformers import AutoTokenizer

        from assay.vhack import Sample, per_sample_gradients, weight_svd

        samples = [
            Sample(f"Task {n}: add.", f" def add(a, b): return a + b + {n}" * 8) for n in range(arguments.samples)
        ]
        tokenizer = model.tokenizer or AutoTokenizer.from_pretrained(ROOT / "src/assay/models/reference/qwen3")
        svd = weight_svd(model, method="gram")
        found["gradients"] = best(
            lambda: per_sample_gradients(samples, model, tokenizer=tokenizer, svd=svd), arguments.samples
        )
    return found


def main() -> None:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--old", type=Path, help="src of the older commit")
    made.add_argument("--models", nargs="+", default=["reference:qwen3"])
    made.add_argument("--gradients", nargs="*", default=[], help="models whose gradients are measured, too")
    made.add_argument("--nonces", type=int, nargs="+", default=[128], help="nonces of a proof, for each model")
    made.add_argument("--batch", type=int, default=32)
    made.add_argument("--seq-len", type=int, default=SEQ_LEN)
    made.add_argument("--samples", type=int, default=24)
    made.add_argument("--rounds", type=int, default=3)
    made.add_argument("--turns", type=int, default=3)
    made.add_argument("--device", default="cpu")
    made.add_argument("--model", help=argparse.SUPPRESS)
    made.add_argument("-o", "--output", type=Path)
    arguments = made.parse_args()
    if arguments.model:
        arguments.nonces = arguments.nonces[0]
        print(json.dumps(measure(arguments)))
        return
    sources = {"old": arguments.old, "new": ROOT / "src"}
    figures: dict[str, object] = {}
    for model, nonces in zip(arguments.models, arguments.nonces, strict=True):
        seen: dict[str, dict[str, list[float]]] = {name: {} for name in sources}
        for turn in range(arguments.turns):
            for name in sorted(sources, reverse=turn % 2 == 0):
                command = [sys.executable, __file__, "--model", model, "--nonces", str(nonces)]
                command += [
                    "--batch",
                    str(arguments.batch),
                    "--seq-len",
                    str(arguments.seq_len),
                    "--samples",
                    str(arguments.samples),
                ]
                command += ["--rounds", str(arguments.rounds), "--device", arguments.device]
                command += ["--gradients", model] if model in arguments.gradients else []
                path = os.pathsep.join([str(Path(sources[name]).resolve()), os.environ.get("PYTHONPATH", "")])
                environment = os.environ | {"PYTHONPATH": path}
                done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
                for what, value in json.loads(done.stdout.splitlines()[-1]).items():
                    seen[name].setdefault(what, []).append(value)
                print(model, turn, name, done.stdout.splitlines()[-1], file=sys.stderr, flush=True)
        ratios = {w: statistics.median(seen["new"][w]) / statistics.median(seen["old"][w]) for w in seen["old"]}
        figures[model] = {"per_second": seen, "new_over_old": ratios}
        if arguments.output:
            publish(arguments, figures)
    print(json.dumps({model: found["new_over_old"] for model, found in figures.items()}, indent=1))  # type: ignore[index]


def publish(arguments: argparse.Namespace, figures: dict[str, object]) -> None:
    """Write what was measured until now."""
    import torch

    device = torch.cuda.get_device_name() if arguments.device == "cuda" else f"{os.cpu_count()} cores"
    about = {
        "schema": "assay.benchmark.two_commits/1",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": " ".join(["python", *sys.argv]),
        "device": device,
        "torch": torch.__version__,
    }
    arguments.output.write_text(json.dumps(about | {"models": figures}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
