import pytest
import torch
from assay_research.study.plan import StudySettings
from transformers import LlamaConfig, LlamaForCausalLM

from assay.models import Model, load_model
from assay.vhack import weight_svd


@pytest.fixture(scope="package")
def small():
    """Two layers with random weights, and the tokenizer of the bundled model."""
    bundled = load_model("reference:llama", dtype="float32", device="cpu")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        tie_word_embeddings=True,
        initializer_range=0.15,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        eos_token_id=2,
        pad_token_id=0,
    )
    module = LlamaForCausalLM(config).eval()
    return Model(module, bundled.tokenizer, "small", "0" * 64, "trained")


@pytest.fixture(scope="package")
def svd(small):
    return weight_svd(small)


@pytest.fixture
def settings():
    return StudySettings(
        steps=3,
        prompts=2,
        rollouts=3,
        prompt_tokens=120,
        new_tokens=10,
        log_every=1,
        pool=6,
        evaluation=1,
        families=("arithmetic",),
        difficulty=(1, 1),
    )
