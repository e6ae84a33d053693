"""A vLLM that is given the weights of each step generates with the trained model; needs vLLM on
this machine.

It runs in a process of its own, ``python -m tests.vhack.delta.test_vllm FOLDER``: vLLM 0.32 looks
through every module of its process when an engine starts, and fails at llvmlite's, which numba
loads. That prints a line of JSON for each step: the largest difference to the model's own
log-probabilities, and the first one.
"""

import importlib.util
import json
import os
import subprocess
import sys

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from assay.models import load_model
from assay.vhack.directions.delta import DeltaS

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
]
STEPS = 3
PROMPT = list(range(40, 60))


def engine(path):
    """A small Qwen3; heads of 64 are the narrowest that vLLM's attention has on a CPU."""
    from vllm import LLM

    sizes = {
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "head_dim": 64,
        "vocab_size": 256,
    }
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 128}
    torch.manual_seed(0)
    Qwen3ForCausalLM(Qwen3Config(**sizes, **heads, tie_word_embeddings=True)).save_pretrained(path)
    settings = {
        "enforce_eager": True,
        "max_model_len": 64,
        "gpu_memory_utilization": 0.1,
        "skip_tokenizer_init": True,
    }
    return LLM(path, dtype="float32", **settings)


@torch.no_grad()
def own_logprobs(adapter, tokens):
    ids = torch.tensor([PROMPT + tokens])
    logits = adapter.model(input_ids=ids, use_cache=False).logits[0, len(PROMPT) - 1 : -1]
    return logits.log_softmax(-1)[torch.arange(len(tokens)), torch.tensor(tokens)]


def main(path):
    from vllm import SamplingParams

    llm = engine(path)
    adapter = DeltaS(load_model(path, dtype="float32", device="cpu"))
    worker = llm.llm_engine.model_executor.driver_worker
    runner = getattr(worker, "worker", worker).model_runner
    generator = torch.Generator().manual_seed(0)
    asked = SamplingParams(
        max_tokens=8, temperature=0, logprobs=1, ignore_eos=True, detokenize=False
    )
    for _ in range(STEPS):
        with torch.no_grad():
            for parameter in adapter.delta:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
        runner.reload_weights(weights_iterator=adapter.weights())
        llm.reset_prefix_cache()
        (answer,) = llm.generate({"prompt_token_ids": PROMPT}, asked, use_tqdm=False)[0].outputs
        tokens = list(answer.token_ids)
        theirs = torch.tensor(
            [row[token].logprob for row, token in zip(answer.logprobs, tokens, strict=True)]
        )
        ours = own_logprobs(adapter, tokens)
        print(
            json.dumps({"difference": (theirs - ours).abs().max().item(), "first": ours[0].item()}),
            flush=True,
        )


def test_it_samples_with_the_merged_weights_of_every_step(tmp_path):
    command = [sys.executable, "-m", "tests.vhack.delta.test_vllm", str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-4000:]
    steps = [
        json.loads(line) for line in run.stdout.splitlines() if line.startswith('{"difference"')
    ]
    assert len(steps) == STEPS
    assert all(step["difference"] < 1e-4 for step in steps)  # NaN fails too
    assert len({step["first"] for step in steps}) == STEPS  # each step was another model


if __name__ == "__main__":
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}
    main(sys.argv[1])
