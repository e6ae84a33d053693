"""δS gradients: one sample after the other through adapters, against one backward pass per batch, in one run.

The sequential way is the one in which the method was first described: a hook per matrix adds the adapter's output, and
24 samples of 250 to 710 tokens go through one by one. Both ways take turns, after a warm-up of each; times are the best
of the rounds. Errors are relative, between the two ways. A plain forward and backward pass of every sample, which any
exact way needs, is timed beside them.

    python benchmarks/vhack_gradients.py --device cpu --dtype float32 -o benchmarks/results/vhack_gradients_cpu.json
    python benchmarks/vhack_gradients.py --device cuda --models reference:qwen3 shape:qwen3-4b -o result.json
"""

import time

import torch
from _common import note, parser, publish
from _vhack import load, plain, samples, sequential, timed, worst_error

from assay.vhack import per_sample_gradients, weight_svd


def compare(reference, options):
    model, tokenizer = load(reference, options.device, options.dtype)
    svd = weight_svd(model, method="gram")
    chosen = samples(tokenizer, options.samples)
    tokens = [len(tokenizer(one.prompt + one.completion)["input_ids"]) for one in chosen]
    clock = time.process_time if options.processor_time else time.perf_counter

    def turn(work, seconds):
        result, taken, memory = timed(options.device, work, clock)
        seconds.append(taken)
        return result, memory

    sequential(model, tokenizer, chosen[:2], svd)
    per_sample_gradients(model, tokenizer, chosen, svd=svd)
    bare, loop, batched = [], [], []
    for round in range(options.rounds):
        note(f"{reference}: round {round + 1}")
        turn(lambda: plain(model, tokenizer, chosen), bare)
        wanted, loop_memory = turn(lambda: sequential(model, tokenizer, chosen, svd), loop)
        found, memory = turn(lambda: per_sample_gradients(model, tokenizer, chosen, svd=svd), batched)
    return {
        "dtype": str(model.dtype),
        "factors": str(svd.dtype),
        "modules": len(svd),
        "samples": len(chosen),
        "tokens": sum(tokens),
        "clock": "processor" if options.processor_time else "wall",
        "plain_seconds": bare,
        "sequential_seconds": loop,
        "batched_seconds": batched,
        "times_faster": min(loop) / min(batched),
        "error": worst_error(found, wanted),
        "sequential_peak_gb": loop_memory,
        "batched_peak_gb": memory,
        **({"settings": settings(model, tokenizer, chosen, svd, options)} if options.device == "cuda" else {}),
    }


def settings(model, tokenizer, chosen, svd, options):
    """Time and memory with other batch sizes, and with checkpointing."""
    cases = {
        "2048 tokens": {"max_tokens": 2048},
        "4096 tokens": {"max_tokens": 4096},
        "16384 tokens": {"max_tokens": 16384},
        "checkpointing": {"checkpointing": True},
    }
    rows = {}
    for name, case in cases.items():

        def work(case=case):
            return per_sample_gradients(model, tokenizer, chosen, svd=svd, **case)

        work()
        _, seconds, memory = timed(options.device, work)
        rows[name] = {"seconds": seconds, "peak_gb": memory}
    return rows


def main():
    made = parser(__doc__)
    made.add_argument("--models", nargs="+", default=["reference:qwen3", "reference:llama"])
    made.add_argument("--device", default="cpu")
    made.add_argument("--dtype", help="of the model; as stored when left out")
    made.add_argument("--samples", type=int, default=24)
    made.add_argument("--processor-time", action="store_true", help="for a busy machine; with OMP_NUM_THREADS=1")
    made.add_argument("--rounds", type=int, default=3)
    options = made.parse_args()
    figures = {reference: compare(reference, options) for reference in options.models}
    publish("vhack_gradients", {"threads": torch.get_num_threads(), "models": figures}, options.output)


if __name__ == "__main__":
    main()
