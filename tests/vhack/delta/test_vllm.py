"""A vLLM that is given the weights of each step generates with the trained model; needs vLLM on this machine."""

import importlib.util

import pytest
import torch

from assay.models import load_model
from assay.vhack.delta import DeltaS

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
    pytest.mark.filterwarnings("ignore"),
]


@pytest.fixture
def engine(monkeypatch, tmp_path):
    """A small Qwen3 in a vLLM of this process; heads of 64 are the narrowest that its attention has on a CPU."""
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    from transformers import Qwen3Config, Qwen3ForCausalLM
    from vllm import LLM

    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "head_dim": 64, "vocab_size": 256}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 128}
    torch.manual_seed(0)
    Qwen3ForCausalLM(Qwen3Config(**sizes, **heads, tie_word_embeddings=True)).save_pretrained(tmp_path)
    settings = {"enforce_eager": True, "max_model_len": 64, "gpu_memory_utilization": 0.1, "skip_tokenizer_init": True}
    return LLM(str(tmp_path), dtype="float32", **settings), tmp_path


def test_it_samples_with_the_merged_weights_of_every_step(engine):
    from vllm import SamplingParams

    llm, path = engine
    model = load_model(path, dtype="float32", device="cpu")
    adapter = DeltaS(model)
    worker = llm.llm_engine.model_executor.driver_worker
    runner = getattr(worker, "worker", worker).model_runner
    generator = torch.Generator().manual_seed(0)
    asked = SamplingParams(max_tokens=8, temperature=0, logprobs=1, ignore_eos=True, detokenize=False)
    first = []
    for _ in range(3):
        with torch.no_grad():
            for parameter in adapter.delta:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
        runner.reload_weights(weights_iterator=adapter.weights())
        llm.reset_prefix_cache()
        ids = list(range(40, 60))
        (answer,) = llm.generate({"prompt_token_ids": ids}, asked, use_tqdm=False)[0].outputs
        tokens = list(answer.token_ids)
        with torch.no_grad():
            logits = adapter.model(input_ids=torch.tensor([ids + tokens]), use_cache=False).logits[0, len(ids) - 1 : -1]
        wanted = logits.log_softmax(-1)[torch.arange(len(tokens)), torch.tensor(tokens)]
        theirs = torch.tensor([row[token].logprob for row, token in zip(answer.logprobs, tokens, strict=True)])
        torch.testing.assert_close(theirs, wanted, rtol=0, atol=1e-4)
        first.append(float(wanted[0]))
    assert len(set(first)) == 3  # each step was another model
