"""What Proof of Compute costs beside the forward pass, on the CPU, in one run.

Three loops over the same model, dtype and batch shape take turns: `prove` as users call it, the bare forward over
inputs that exist already, and inputs plus transform without the forward. The figures are medians over rounds.

    python research/benchmarks/prove_overhead.py -o research/results/prove_overhead.json
"""

import statistics
import time

import torch
from _common import note, parser, publish

from assay.models import load_model
from assay.models.decoder import backbone
from assay.poc import HFEngine, Round, get_pipeline, prove
from assay.poc.protocol.transforms import Transform

MODELS = ("reference:qwen3", "reference:llama")


def seconds(function):
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def measure(reference, dtype, batch_size, batches, rounds):
    model = load_model(reference, dtype=dtype, device="cpu")
    round = Round(block_hash="bench", public_key="k", model=reference)
    engine = HFEngine(model, batch_size=batch_size, seq_len=round.seq_len)
    nonces = range(batch_size * batches)
    inputs = engine.inputs(round, range(batch_size))
    states = engine.read(inputs)
    body = backbone(model.module)
    sizes = {"hidden_size": model.hidden_size, "vocab_size": model.vocab_size}
    arguments = {**sizes, "device": model.device, "trained_head": engine.trained_head}

    def bare():
        with torch.inference_mode():
            for _ in range(batches):
                body(inputs_embeds=inputs, use_cache=False)

    def around():
        transform = Transform(round, get_pipeline(round.preset), **arguments)
        for start in range(0, len(nonces), batch_size):
            batch = nonces[start : start + batch_size]
            engine.inputs(round, batch)
            transform(states, batch).cpu().numpy()

    timed = {"prove": lambda: prove(model, round, nonces, engine=engine), "bare": bare, "around": around}
    for function in timed.values():
        function()
    times = {name: [] for name in timed}
    for _ in range(rounds):
        for name, function in timed.items():
            times[name].append(seconds(function))
    ratio = statistics.median(b / p for b, p in zip(times["bare"], times["prove"], strict=True))
    share = statistics.median(a / p for a, p in zip(times["around"], times["prove"], strict=True))
    note(f"{reference} {dtype}: prove is {ratio:.3f} of the bare forward's speed; inputs and transform {share:.2%}")
    return {
        "model": reference,
        "dtype": dtype,
        "batch_size": batch_size,
        "seq_len": round.seq_len,
        "prove_nonces_per_second": len(nonces) / statistics.median(times["prove"]),
        "bare_nonces_per_second": len(nonces) / statistics.median(times["bare"]),
        "prove_over_bare": ratio,
        "inputs_and_transform_share": share,
    }


def main():
    arguments = parser(__doc__)
    arguments.add_argument("--batch-size", type=int, default=32)
    arguments.add_argument("--batches", type=int, default=4)
    arguments.add_argument("--rounds", type=int, default=7)
    options = arguments.parse_args()
    rows = [
        measure(reference, dtype, options.batch_size, options.batches, options.rounds)
        for reference in MODELS
        for dtype in ("bfloat16", "float32")
    ]
    figures = {
        "cases": rows,
        "smallest_prove_over_bare": min(row["prove_over_bare"] for row in rows),
        "largest_inputs_and_transform_share": max(row["inputs_and_transform_share"] for row in rows),
    }
    publish("prove_overhead", figures, options.output)


if __name__ == "__main__":
    main()
