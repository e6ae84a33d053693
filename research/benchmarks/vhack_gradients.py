"""δS gradients: one sample after the other through adapters, against one backward pass per batch,
in one run.

The sequential way is the one in which the method was first described: a hook per matrix adds the
adapter's output, and 24 samples of 250 to 710 tokens go through one by one. Both ways take turns,
after a warm-up of each; times are the best of the rounds. Errors are relative, between the two
ways. A plain forward and backward pass of every sample, which any exact way needs, is timed beside
them.

With `--pairs` also a whole extraction of so many pairs: weight SVD, digest, gradients of both sides
and axes, each with its time and memory, and from nothing. Samples and pairs are pieces of Python
source; their content does not matter here.

    python research/benchmarks/vhack_gradients.py --dtype float32 \
      -o research/results/vhack_gradients_cpu.json
    python research/benchmarks/vhack_gradients.py --device cuda --models shape:qwen3-4b \
      --pairs 12 249 -o result.json
"""

import argparse
import inspect
import random
import time

import torch
from _common import note, parser, publish, timed
from torch.nn import functional

from assay.models import load_model
from assay.vhack import (
    Pair,
    Sample,
    extract,
    pair_gradients,
    per_sample_gradients,
    target_modules,
    weight_svd,
    weights_digest,
)

LENGTHS = (250, 710)
PROMPT_SHARE = 0.6


def texts(tokenizer, count, seed=0):
    """Yield pieces of the Python standard library, as (prompt, completion) with a drawn number of
    tokens.
    """
    rng = random.Random(seed)
    lines = inspect.getsource(argparse).splitlines(keepends=True)
    per_line = [len(tokenizer(line, add_special_tokens=False)["input_ids"]) for line in lines]

    def piece(tokens):
        start = at = rng.randrange(len(lines) // 2)
        while tokens > 0 and at < len(lines):
            tokens -= per_line[at]
            at += 1
        return "".join(lines[start:at])

    for _ in range(count):
        tokens = rng.randint(*LENGTHS)
        yield piece(int(tokens * PROMPT_SHARE)), piece(int(tokens * (1 - PROMPT_SHARE)))


def pairs_of(tokenizer, count):
    """Return pairs whose sides have such lengths."""
    sides = list(texts(tokenizer, 2 * count, seed=1))
    return [
        Pair(prompt, hack, clean + "# \n", group=str(index % 6))
        for index, ((prompt, hack), (_, clean)) in enumerate(
            zip(sides[::2], sides[1::2], strict=True)
        )
    ]


def one_by_one(model, tokenizer, samples):
    """Yield token ids and the loss of the completion of every sample; the caller runs the backward
    pass.
    """
    for parameter in model.module.parameters():
        parameter.requires_grad_(False)
    for sample in samples:
        prompt = tokenizer(sample.prompt, add_special_tokens=False)["input_ids"]
        completion = tokenizer(sample.completion, add_special_tokens=False)["input_ids"]
        ids = torch.tensor([prompt + completion], device=model.device)
        embeds = model.module.get_input_embeddings()(ids).requires_grad_()
        logits = model.module(inputs_embeds=embeds, use_cache=False).logits[0, len(prompt) - 1 : -1]
        yield functional.cross_entropy(logits.float(), ids[0, len(prompt) :])


def plain(model, tokenizer, samples):
    """Run forward and backward of the bare model, one sample after the other."""
    for loss in one_by_one(model, tokenizer, samples):
        loss.backward()


def sequential(model, tokenizer, samples, svd):
    """Return gradients of adapters: a hook adds ``((x Vhᵀ) · δS) Uᵀ``, and a backward pass fills
    δS.grad.
    """
    delta = {name: torch.zeros_like(svd[name].values, requires_grad=True) for name in svd}
    bucket = {name: [] for name in svd}
    hooks = [
        linear.register_forward_hook(adapter(svd[name], delta[name]))
        for name, linear in target_modules(model).items()
    ]
    for loss in one_by_one(model, tokenizer, samples):
        loss.backward()
        for name, knob in delta.items():
            bucket[name].append(knob.grad.detach().cpu().float().clone())
            knob.grad = None
    for hook in hooks:
        hook.remove()
    return {name: torch.stack(rows) for name, rows in bucket.items()}


def adapter(factors, knob):
    def hook(_, arguments, output):
        return output + ((arguments[0] @ factors.right.T) * knob.to(output.dtype)) @ factors.left.T

    return hook


def peak_gb():
    """Return the peak of device memory since it was last asked for, what was there included; None
    without a GPU.
    """
    if not torch.cuda.is_available():
        return None
    peak = torch.cuda.max_memory_allocated() / 1e9
    torch.cuda.reset_peak_memory_stats()
    return peak


def worst_error(found, wanted):
    """Return the largest relative error of one sample over all modules, and of one module over all
    samples.
    """
    by_module = max(float((found[n] - wanted[n]).norm() / wanted[n].norm()) for n in wanted)
    errors = torch.cat([found[name] - wanted[name] for name in wanted], 1).norm(dim=1)
    return {
        "module": by_module,
        "sample": float((errors / torch.cat(list(wanted.values()), 1).norm(dim=1)).max()),
    }


def compare(model, tokenizer, options):
    """Return the figures of both ways."""
    svd = weight_svd(model, method="gram")
    chosen = [Sample(*text) for text in texts(tokenizer, options.samples)]
    clock = time.process_time if options.processor_time else time.perf_counter
    ways = {
        "plain": lambda: plain(model, tokenizer, chosen),
        "sequential": lambda: sequential(model, tokenizer, chosen, svd),
        "batched": lambda: per_sample_gradients(chosen, model, tokenizer=tokenizer, svd=svd),
    }
    sequential(model, tokenizer, chosen[:2], svd)
    ways["batched"]()
    seconds = {name: [] for name in ways}
    results = {}
    memory = {}
    for _ in range(options.rounds):
        for name, way in ways.items():
            peak_gb()
            seconds_taken, results[name] = timed(way, clock)
            seconds[name].append(seconds_taken)
            memory[name] = peak_gb()
    return {
        "dtype": str(model.dtype),
        "factors": str(svd.dtype),
        "modules": len(svd),
        "samples": len(chosen),
        "tokens": sum(
            len(tokenizer(sample.prompt + sample.completion)["input_ids"]) for sample in chosen
        ),
        "clock": "processor" if options.processor_time else "wall",
        **{f"{name}_seconds": seconds_of for name, seconds_of in seconds.items()},
        "times_faster": min(seconds["sequential"]) / min(seconds["batched"]),
        "error": worst_error(results["batched"], results["sequential"]),
        "peak_gb": memory,
    }


def extraction(model, tokenizer, count):
    """Return time and memory of the parts of an extraction of so many pairs, and of one from
    nothing.
    """
    pairs = pairs_of(tokenizer, count)
    figures = {"pairs": count}

    def part(name, work):
        peak_gb()
        seconds, result = timed(work)
        figures[name] = {"seconds": seconds, "peak_gb": peak_gb()}
        return result

    svd = part("svd", lambda: weight_svd(model))
    part("digest", lambda: weights_digest(model))
    gradients = part(
        "gradients", lambda: pair_gradients(pairs, model, tokenizer=tokenizer, svd=svd)
    )
    part("axes", gradients.basis)
    part("from_nothing", lambda: extract(pairs, model, tokenizer=tokenizer, n_heldout=0))
    note(str(figures))
    return figures


def main():
    options_parser = parser(__doc__)
    options_parser.add_argument(
        "--models", nargs="+", default=["reference:qwen3", "reference:llama"]
    )
    options_parser.add_argument("--device", default="cpu")
    options_parser.add_argument("--dtype", help="of the model; as stored when left out")
    options_parser.add_argument("--samples", type=int, default=24)
    options_parser.add_argument(
        "--processor-time", action="store_true", help="for a busy machine; with OMP_NUM_THREADS=1"
    )
    options_parser.add_argument("--rounds", type=int, default=3)
    options_parser.add_argument(
        "--pairs", type=int, nargs="*", default=[], help="also extractions of so many pairs"
    )
    options = options_parser.parse_args()
    figures = {}
    for reference in options.models:
        model = load_model(reference, device=options.device, dtype=options.dtype)
        # A shape has no tokenizer of its own, so it borrows one whose ids its vocabulary holds.
        tokenizer = model.tokenizer or load_model("reference:qwen3", device="cpu").tokenizer
        figures[reference] = compare(model, tokenizer, options)
        note(str(figures[reference]))
        if options.pairs:
            figures[reference]["extractions"] = [
                extraction(model, tokenizer, count) for count in options.pairs
            ]
        publish(
            "vhack_gradients",
            {"threads": torch.get_num_threads(), "models": figures},
            options.output,
        )


if __name__ == "__main__":
    main()
