"""What the benchmarks of v_hack share: texts of set lengths, the sequential way, a clock that waits for the device."""

import argparse
import inspect
import random
import time

import torch
from torch.nn import functional

from assay.models import load_model
from assay.vhack import Pair, Sample, target_modules

LENGTHS = (250, 710)
PROMPT_SHARE = 0.6


def texts(tokenizer, count, lengths=LENGTHS, seed=0):
    """Pieces of the Python standard library, as (prompt, completion) with a drawn number of tokens."""
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
        tokens = rng.randint(*lengths)
        yield piece(int(tokens * PROMPT_SHARE)), piece(int(tokens * (1 - PROMPT_SHARE)))


def samples(tokenizer, count, lengths=LENGTHS):
    return [Sample(prompt, completion) for prompt, completion in texts(tokenizer, count, lengths)]


def pairs(tokenizer, count, lengths=LENGTHS):
    """Pairs whose sides have such lengths; what they say does not matter for time and memory."""
    sides = list(texts(tokenizer, 2 * count, lengths, seed=1))
    return [
        Pair(prompt, hack, clean + "# \n", group=str(index % 6))
        for index, ((prompt, hack), (_, clean)) in enumerate(zip(sides[::2], sides[1::2], strict=True))
    ]


def load(reference, device, dtype):
    """The model, and a tokenizer: a shape has none of its own, so it borrows one whose ids its vocabulary holds."""
    model = load_model(reference, device=device, dtype=dtype)
    return model, model.tokenizer or load_model("reference:qwen3", device="cpu").tokenizer


def sequential(model, tokenizer, samples, svd):
    """One sample after the other through adapters: a hook adds ``((x Vhᵀ) · δS) Uᵀ``, a backward pass fills δS.grad."""
    module = model.module
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    delta = {name: torch.zeros_like(svd[name].values, requires_grad=True) for name in svd}
    bucket = {name: [] for name in svd}
    hooks = [
        linear.register_forward_hook(adapter(svd[name], delta[name])) for name, linear in target_modules(model).items()
    ]
    for sample in samples:
        for knob in delta.values():
            knob.grad = None
        prompt = tokenizer(sample.prompt, add_special_tokens=False)["input_ids"]
        completion = tokenizer(sample.completion, add_special_tokens=False)["input_ids"]
        ids = torch.tensor([prompt + completion], device=model.device)
        logits = module(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1]
        functional.cross_entropy(logits.float(), ids[0, len(prompt) :]).backward()
        for name, knob in delta.items():
            bucket[name].append(knob.grad.detach().cpu().float().clone())
    for hook in hooks:
        hook.remove()
    return {name: torch.stack(rows) for name, rows in bucket.items()}


def adapter(factors, knob):
    def hook(_, arguments, output):
        return output + ((arguments[0] @ factors.right.T) * knob.to(output.dtype)) @ factors.left.T

    return hook


def plain(model, tokenizer, samples):
    """Forward and backward of the bare model, one sample after the other: what any exact way has to do at least."""
    module = model.module
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    for sample in samples:
        prompt = tokenizer(sample.prompt, add_special_tokens=False)["input_ids"]
        completion = tokenizer(sample.completion, add_special_tokens=False)["input_ids"]
        ids = torch.tensor([prompt + completion], device=model.device)
        inputs = module.get_input_embeddings()(ids).requires_grad_()
        logits = module(inputs_embeds=inputs, use_cache=False).logits[0, len(prompt) - 1 : -1]
        functional.cross_entropy(logits.float(), ids[0, len(prompt) :]).backward()


def timed(device, work, clock=time.perf_counter):
    """The result, its seconds, and the peak of device memory in GB (CUDA only), what was there before included."""
    on_gpu = torch.device(device).type == "cuda"
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    start = clock()
    result = work()
    if on_gpu:
        torch.cuda.synchronize()
    seconds = clock() - start
    return result, seconds, torch.cuda.max_memory_allocated() / 1e9 if on_gpu else None


def worst_error(found, wanted):
    """The largest relative error of one sample over all modules, and of one module over all samples."""
    by_module = max(float((found[n] - wanted[n]).norm() / wanted[n].norm()) for n in wanted)
    errors = torch.cat([found[name] - wanted[name] for name in wanted], 1).norm(dim=1)
    return {"module": by_module, "sample": float((errors / torch.cat(list(wanted.values()), 1).norm(dim=1)).max())}
