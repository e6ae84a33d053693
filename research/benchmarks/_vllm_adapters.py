"""Chat with a LoRA adapter beside nonces: an adapter of random weights, and requests that use it until they end."""

import asyncio
import json
from contextlib import contextmanager

import torch
from safetensors.torch import save_file

RANK = 8
TARGETS = ("q_proj", "v_proj")
TOKENS = 16


def make(config, folder):
    """Write an adapter for a checkpoint of this configuration; return its directory."""
    path = folder / "adapter"
    if path.exists():
        return path
    path.mkdir()
    heads = {"q_proj": config.num_attention_heads, "v_proj": config.num_key_value_heads}
    draw, tensors = torch.Generator().manual_seed(0), {}
    for layer in range(config.num_hidden_layers):
        for name in TARGETS:
            place = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            shapes = {"A": (RANK, config.hidden_size), "B": (heads[name] * config.head_dim, RANK)}
            for part, shape in shapes.items():
                weight = 0.3 * torch.randn(shape, generator=draw)
                tensors[f"{place}.lora_{part}.weight"] = weight.to(torch.bfloat16)
    save_file(tensors, path / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": 2 * RANK, "bias": "none"}
    (path / "adapter_config.json").write_text(json.dumps(settings | {"target_modules": list(TARGETS)}))
    return path


async def answer(engine, name, adapter=None):
    """Return the tokens of one request, with an adapter or without."""
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest
    from vllm.sampling_params import RequestOutputKind

    kind = RequestOutputKind.FINAL_ONLY
    sampling = SamplingParams(max_tokens=TOKENS, temperature=0.0, detokenize=False, ignore_eos=True, output_kind=kind)
    prompt = {"type": "token", "prompt_token_ids": list(range(20, 52))}
    used = None if adapter is None else LoRARequest("adapter", 1, str(adapter))
    async for output in engine._client._llm.generate(prompt, sampling, name, lora_request=used):
        found = list(output.outputs[0].token_ids)
    return found


@contextmanager
def chat(engine, adapter, said):
    """Ask with the adapter, one request after the other, while the context is open.

    ``said`` gets the number of answers, how many of them are those that the adapter gave alone, and whether it changes
    what the model says at all.
    """

    def run(coroutine):
        return asyncio.run_coroutine_threadsafe(coroutine, engine._loop)

    plain = run(answer(engine, "plain")).result()
    alone = run(answer(engine, "alone", adapter)).result()
    answers, ended = [], asyncio.Event()

    async def ask():
        while not ended.is_set():
            answers.append(await answer(engine, f"chat-{len(answers)}", adapter))

    asking = run(ask())
    try:
        yield
    finally:
        engine._loop.call_soon_threadsafe(ended.set)
        asking.result()
        same = sum(found == alone for found in answers)
        said |= {"answers": len(answers), "as_alone": same, "changes_the_tokens": plain != alone}
