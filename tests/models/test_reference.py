"""The two bundled models: that they are whole, that they are trained, and that their tokenizer
keeps every text.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from assay.files.references import CATALOGUE
from assay.models import load_model
from assay.models.load import identify
from assay.models.resolve import find_bundled

NAMES = ["reference:qwen3", "reference:llama"]
DIGESTS = {
    "reference:qwen3": "4fe788470005f674c3b7a43790593d0a873a83b6fbabad16e403361d09a5b6fb",
    "reference:llama": "edae7da6e4ac5b9066721b9935fa4650ec2b14b16ec3c0bbd7c7fd0141de9775",
}


@pytest.fixture(scope="module", params=NAMES)
def model(request):
    return load_model(request.param, dtype="float32", device="cpu")


@pytest.mark.parametrize("name", [*NAMES, "reference:organism"])
def test_the_catalogue_has_the_digest_of_the_weights(name):
    """By it a proof of another model is refused before anything is loaded."""
    assert CATALOGUE[name]["digest"] == identify(name, dtype="bfloat16").digest


@pytest.mark.parametrize("name", NAMES)
def test_the_committed_weights_are_the_ones_described(name):
    model = load_model(name, device="cpu")
    assert model.digest == DIGESTS[name]
    assert model.dtype == torch.bfloat16
    assert (model.hidden_size, model.num_layers, model.vocab_size, model.max_positions) == (
        256,
        8,
        4096,
        2048,
    )
    card = (find_bundled(name) / "MODEL_CARD.md").read_text()
    assert f"| parameters | {sum(p.numel() for p in model.module.parameters())} |" in card
    assert (find_bundled(name) / "model.safetensors").stat().st_size < 16_000_000


def test_no_token_is_added_and_the_special_ones_are_there(model):
    tokenizer = model.tokenizer
    assert tokenizer is not None
    assert tokenizer("")["input_ids"] == []
    assert len(tokenizer) == model.vocab_size
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    prompt = "def f(x):"
    completion = "\n    return x\n"
    ids = tokenizer(prompt)["input_ids"] + tokenizer(completion)["input_ids"]
    assert ids == tokenizer(prompt + completion)["input_ids"]


@given(text=st.text())
@settings(max_examples=200, deadline=None)
def test_any_text_survives_the_tokenizer(model, text):
    assert model.tokenizer is not None
    assert model.tokenizer.decode(model.tokenizer(text)["input_ids"]) == text
