"""`prove` and gradients of two commits on one device, or of this one with and without the
deterministic mode.

Both ways take turns, each in a process of its own, which sees its assay first on the path.

    git worktree add .bench/old COMMIT
    python research/benchmarks/two_commits.py --old .bench/old/src \
      --models shape:qwen3-0.6b shape:llama-3.1-8b \
        -o research/results/two_commits_h100.json
    python research/benchmarks/two_commits.py --deterministic --device cuda --batch 128 \
      --nonces 3072 \
        --models shape:qwen3-0.6b -o research/results/gpu_deterministic.json

Figures are the best of the rounds of a process (nonces, samples, or factors of the whole model per
second); the ratio is that of the medians over the turns. The first way begins in even turns.
"""

import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from _common import ROOT, note, parser, publish, wall_seconds


def measure(chosen, model, nonces, way):
    """Return the figures of the assay that is on the path."""
    from assay import load_model
    from assay.poc import HFEngine, Round, prove

    if way == "deterministic":
        from assay.poc.engines.hf.engine import be_deterministic

        be_deterministic()

    def best(work, count):
        return count / min(
            [wall_seconds(work) for _ in range(chosen.rounds + 1)][1:]
        )  # the first one compiles

    loaded = load_model(model, device=chosen.device)
    round = Round(block_hash="block", public_key="key", seq_len=chosen.seq_len)
    compiled = chosen.device == "cuda" and not chosen.eager
    engine = HFEngine(loaded, batch_size=chosen.batch, seq_len=chosen.seq_len, compiled=compiled)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "proof.jsonl"
        proofs = []

        def work():
            proofs[:] = [
                prove(loaded, round, range(nonces), engine=engine, output=path, overwrite=True)
            ]

        rates = {"prove": best(work, nonces)}
    digest = hashlib.sha256(proofs[0].distances.tobytes()).hexdigest()
    if model in chosen.gradients:
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
        rates["factors"] = best(lambda: weight_svd(loaded, method="gram"), 1)
        rates["gradients"] = best(
            lambda: per_sample_gradients(samples, loaded, tokenizer=tokenizer, svd=svd),
            chosen.samples,
        )
    return {"per_second": rates, "distances": digest}


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
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--turns", type=int, default=3)
    options.add_argument("--device", default="cpu")
    options.add_argument("--eager", action="store_true", help="without compiled kernels")
    options.add_argument("--worker", nargs=3, help="what this file starts by itself")
    chosen = options.parse_args()
    if chosen.worker:
        method, model, nonces = chosen.worker
        print(json.dumps(measure(chosen, model, int(nonces), method)))
        return
    sources = {"old": chosen.old, "new": ROOT / "src"}
    if chosen.deterministic:
        sources = dict.fromkeys(("plain", "deterministic"), ROOT / "src")
    figures = {}
    for model, nonces in zip(chosen.models, chosen.nonces, strict=True):
        seen = {method: {} for method in sources}
        digests = set()
        for turn in range(chosen.turns):
            for method in sources if turn % 2 == 0 else reversed(sources):
                path = os.pathsep.join(
                    [str(Path(sources[method]).resolve()), os.environ.get("PYTHONPATH", "")]
                )
                command = [sys.executable, *sys.argv, "--worker", method, model, str(nonces)]
                finished = subprocess.run(
                    command,
                    env=os.environ | {"PYTHONPATH": path},
                    stdout=subprocess.PIPE,
                    text=True,
                    check=True,
                )
                result = json.loads(finished.stdout.splitlines()[-1])
                note(f"{model} {turn} {method} {result}")
                digests.add(result["distances"])
                for task, value in result["per_second"].items():
                    seen[method].setdefault(task, []).append(value)
        first, second = seen.values()
        ratios = {
            task: statistics.median(second[task]) / statistics.median(first[task]) for task in first
        }
        figures[model] = {
            "per_second": seen,
            "_over_".join(reversed(seen)): ratios,
            "same_distances": len(digests) == 1,
        }
    publish("two_commits", {"device": chosen.device, "models": figures}, chosen.output)


if __name__ == "__main__":
    main()
