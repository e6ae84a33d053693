"""Which experts a mixture asks for the positions of nonces: hooks on the routers of vLLM's worker and of transformers.

Legend of shapes: L layers, R rows (positions of all nonces, one nonce after the other), E experts.
"""

import asyncio
import os

import numpy as np
import torch

from assay import poc
from assay.poc import HFEngine


def allow_hooks():
    """Let vLLM's worker run the functions of this file; to be called before the engine is made."""
    os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"


def watch(worker):
    """Keep, inside vLLM's worker, which experts are asked from now on."""
    asked = worker.assay_asked = {}
    top = worker.model_runner.model.config.num_experts_per_tok
    for name, part in worker.model_runner.model.named_modules():
        if name.endswith(".gate"):
            part.register_forward_hook(keep(asked, name, top))


def take(worker):
    """Return what was kept since the last time, as bytes of one row per layer."""
    found = [np.packbits(torch.cat(rows).numpy()).tobytes() for rows in worker.assay_asked.values()]
    worker.assay_asked.clear()
    return found


def keep(asked, name, top):
    """Return a forward hook of a router whose first output is its logits [R, E]."""

    def hook(_module, _inputs, outputs):
        logits_RE = outputs[0].float()
        chosen_RE = torch.zeros(logits_RE.shape, dtype=torch.bool)
        chosen_RE.scatter_(1, logits_RE.topk(top).indices.cpu(), value=True)
        asked.setdefault(name, []).append(chosen_RE)

    return hook


def inside(engine, round, nonces, experts):
    """Return the experts [L, R, E] that vLLM asks for the nonces of a round."""

    def call(method):
        work = engine._client._llm.collective_rpc(method)
        return asyncio.run_coroutine_threadsafe(work, engine._loop).result()[0]

    if not hasattr(engine, "watched"):
        call(watch)
        engine.watched = True
    call(take)
    poc.prove(engine.model, round, nonces, engine=engine)
    rows = len(nonces) * round.seq_len
    layers = [np.unpackbits(np.frombuffer(one, np.uint8))[: rows * experts] for one in call(take)]
    return np.array(layers, bool).reshape(len(layers), rows, experts)


def beside(model, round, nonces):
    """Return the experts [L, R, E] that transformers asks for the nonces of a round."""
    asked, config = {}, model.module.config
    routers = [(name, part) for name, part in model.module.named_modules() if hasattr(part, "top_k")]
    hooks = [
        part.register_forward_hook(keep(asked, name, config.num_experts_per_tok))
        for name, part in routers
        if "Router" in type(part).__name__
    ]
    engine = HFEngine(model, batch_size=8, seq_len=round.seq_len)
    try:
        poc.prove(model, round, nonces, engine=engine)
    finally:
        for hook in hooks:
            hook.remove()
    return np.stack([torch.cat(rows).numpy()[: len(nonces) * round.seq_len] for rows in asked.values()])


def flips(one, other):
    """Return the shares of positions for which other experts are asked: in a layer, and in any of all layers."""
    flipped_LR = (one != other).any(axis=-1)
    return {"in_a_layer": float(flipped_LR.mean()), "in_any_layer": float(flipped_LR.any(axis=0).mean())}
