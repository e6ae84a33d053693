"""δS gradients: one sample after the other through adapters, against one backward pass per batch, in one run.

The sequential way is the one in which the method was first described: a hook per matrix adds the adapter's output, and
24 samples of 250 to 710 tokens go through one by one. Both ways take turns, after a warm-up of each; times are the best
of the rounds. Errors are relative, between the two ways. A plain forward and backward pass of every sample, which any
exact way needs, is timed beside them, and so is every part of the recipe left out.

    python benchmarks/vhack_gradients.py --device cpu --dtype float32 -o benchmarks/results/vhack_gradients_cpu.json
    python benchmarks/vhack_gradients.py --device cuda --models shape:qwen3-4b --settings --profile 40 -o result.json
"""

import time
from dataclasses import asdict, replace

import torch
from _common import note, parser, publish
from _vhack import load, pairs, plain, samples, sequential, timed, worst_error

from assay.vhack import extract, pair_gradients, per_sample_gradients, weight_svd
from assay.vhack.gradients import per_sample as _gradients
from assay.vhack.gradients.replica import Recipe, recipe_for


def compare(reference, options):
    """The figures of one model, again with every part that is added."""
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
    per_sample_gradients(chosen, model, tokenizer=tokenizer, svd=svd)
    bare, loop, batched = [], [], []
    for round in range(options.rounds):
        note(f"{reference}: round {round + 1}")
        turn(lambda: plain(model, tokenizer, chosen), bare)
        wanted, loop_memory = turn(lambda: sequential(model, tokenizer, chosen, svd), loop)
        found, memory = turn(lambda: per_sample_gradients(chosen, model, tokenizer=tokenizer, svd=svd), batched)
    figures = {
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
        "recipe": asdict(recipe_for(model.module)),
    }
    note(f"{figures}")
    yield figures
    parts = {
        "profile": (options.profile, lambda: profile(model, tokenizer, chosen, svd, options)),
        "settings": (options.settings, lambda: settings(model, tokenizer, chosen, svd, wanted, options)),
        "pairs": (options.pairs, lambda: many(model, tokenizer, svd, options)),
    }
    for name, (asked, measure) in parts.items():
        if asked:
            figures[name] = measure()
            yield figures


def recipes(usual):
    """The recipe with parts left out or put in."""
    nothing = Recipe(packed=False, fused=False, factored=False, late=False, together=usual.together)
    return {
        "nothing": nothing,
        "packed only": replace(nothing, packed=True),
        "fused only": replace(nothing, fused=True),
        "not fused": replace(usual, fused=False),
        "not late": replace(usual, late=False),
        "other factored": replace(usual, factored=not usual.factored),
        "usual": usual,
    }


def settings(model, tokenizer, chosen, svd, wanted, options):
    """Time, memory and error with other recipes, other batch sizes, and with checkpointing."""
    usual = recipe_for(model.module)
    cases = {f"recipe: {name}": ({}, recipe) for name, recipe in recipes(usual).items()}
    for tokens in (2048, 5500, 8192, 16384):
        cases[f"{tokens} tokens"] = ({"max_tokens": tokens}, usual)
    cases["checkpointing"] = ({"checkpointing": True}, usual)
    rows = {}
    for name, (case, recipe) in cases.items():
        _gradients.recipe_for = lambda _, recipe=recipe: recipe

        def work(case=case):
            return per_sample_gradients(chosen, model, tokenizer=tokenizer, svd=svd, **case)

        try:
            work()
            seconds = []
            for _ in range(options.rounds):
                found, taken, memory = timed(options.device, work)
                seconds.append(taken)
            rows[name] = {"seconds": seconds, "peak_gb": memory, "error": worst_error(found, wanted)}
        except Exception as error:
            rows[name] = {"failed": f"{type(error).__name__}: {error}"}
        note(f"{name}: {rows[name]}")
    _gradients.recipe_for = recipe_for
    return rows


def many(model, tokenizer, svd, options):
    """The basis of many pairs with the factors at hand, and a basis of twelve from nothing."""
    some = pairs(tokenizer, options.pairs)
    found, seconds, memory = timed(options.device, lambda: pair_gradients(some, model, tokenizer=tokenizer, svd=svd))
    _, axes_seconds, _ = timed(options.device, found.basis)
    whole = {}
    if options.device == "cuda":
        few = pairs(tokenizer, 12)
        _, taken, peak = timed(options.device, lambda: extract(few, model, tokenizer=tokenizer, n_heldout=0))
        whole = {"extraction_of_12": {"seconds": taken, "peak_gb": peak}}
    rows = {
        "pairs": options.pairs,
        "gradient_seconds": seconds,
        "axes_seconds": axes_seconds,
        "peak_gb": memory,
    } | whole
    note(str(rows))
    return rows


def profile(model, tokenizer, chosen, svd, options):
    """Where the time of the device goes: seconds per kind of operation or kernel, the longest first."""
    from torch.profiler import ProfilerActivity

    on_gpu = options.device == "cuda"
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with torch.profiler.profile(activities=kinds) as recorded:
        per_sample_gradients(chosen, model, tokenizer=tokenizer, svd=svd)
        if on_gpu:
            torch.cuda.synchronize()
    unit = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    rows = sorted(recorded.key_averages(), key=lambda row: -getattr(row, unit))[: options.profile]
    return [{"name": row.key[:120], "seconds": getattr(row, unit) / 1e6, "count": row.count} for row in rows]


def main():
    made = parser(__doc__)
    made.add_argument("--models", nargs="+", default=["reference:qwen3", "reference:llama"])
    made.add_argument("--device", default="cpu")
    made.add_argument("--dtype", help="of the model; as stored when left out")
    made.add_argument("--samples", type=int, default=24)
    made.add_argument("--processor-time", action="store_true", help="for a busy machine; with OMP_NUM_THREADS=1")
    made.add_argument("--rounds", type=int, default=3)
    made.add_argument("--settings", action="store_true", help="also other recipes and batch sizes")
    made.add_argument(
        "--pairs", type=int, default=0, help="also a basis of so many pairs, and on a GPU one from nothing"
    )
    made.add_argument("--profile", type=int, default=0, help="also this many rows of a profile")
    options = made.parse_args()
    figures = {}
    for reference in options.models:
        for measured in compare(reference, options):
            figures[reference] = measured
            publish("vhack_gradients", {"threads": torch.get_num_threads(), "models": figures}, options.output)


if __name__ == "__main__":
    main()
