import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from assay.models.configuration import silence_transformers

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "vocab_size": 96,
    "max_position_embeddings": 64,
}


@pytest.fixture
def write_checkpoint(tmp_path):
    """Writes a small trained-looking checkpoint and returns its directory."""

    def write(
        name="checkpoint",
        *,
        architecture="qwen3",
        dtype=torch.bfloat16,
        shard="1GB",
        edit=None,
        **settings,
    ):
        torch.manual_seed(7)
        sizes = {**SIZES, "tie_word_embeddings": True, **settings}
        if architecture == "qwen3":
            module: PreTrainedModel = Qwen3ForCausalLM(Qwen3Config(**sizes))
        else:
            module = LlamaForCausalLM(LlamaConfig(**sizes))
        module = module.to(dtype)
        if edit is not None:
            edit(module)
        with silence_transformers():
            module.save_pretrained(tmp_path / name, max_shard_size=shard)
        return tmp_path / name

    return write


@pytest.fixture
def checkpoint(write_checkpoint):
    return write_checkpoint()
