"""The two bundled models: that they are whole, that they are trained, and that their tokenizer keeps every text."""

import hashlib
import sysconfig
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from assay.models import Model, load_model
from assay.models.resolve import find_bundled

NAMES = ["reference:qwen3", "reference:llama"]
DIGESTS = {
    "reference:qwen3": "4fe788470005f674c3b7a43790593d0a873a83b6fbabad16e403361d09a5b6fb",
    "reference:llama": "edae7da6e4ac5b9066721b9935fa4650ec2b14b16ec3c0bbd7c7fd0141de9775",
}
WINDOW = 512


@pytest.fixture(scope="module", params=NAMES)
def model(request: pytest.FixtureRequest) -> Model:
    return load_model(request.param, dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def held_out_text() -> str:
    """Files of this machine's standard library whose names the training rule holds out."""
    root = Path(sysconfig.get_path("stdlib"))
    paths = [path for path in (root / "ast.py", root / "http" / "cookiejar.py") if path.is_file()]
    for path in paths:
        assert int.from_bytes(hashlib.sha256(path.name.encode()).digest()[:4], "big") % 100 == 0
    return "".join(path.read_text("utf-8") for path in paths)


def windows(model: Model, text: str) -> torch.Tensor:
    """The first twenty windows [B, T + 1] of a text, each starting with the last token of the one before."""
    assert model.tokenizer is not None
    ids = torch.tensor(model.tokenizer(text)["input_ids"][: 20 * WINDOW + 1])
    return torch.stack([ids[i : i + WINDOW + 1] for i in range(0, len(ids) - WINDOW, WINDOW)])


@torch.inference_mode()
def loss(model: Model, tokens_BT: torch.Tensor) -> float:
    logits_BTV = model.module(input_ids=tokens_BT[:, :-1], use_cache=False).logits.float()
    return functional.cross_entropy(logits_BTV.flatten(0, 1), tokens_BT[:, 1:].flatten()).item()


def unigram_entropy(tokens_BT: torch.Tensor) -> float:
    share = torch.bincount(tokens_BT[:, 1:].flatten()).double()
    share = share[share > 0] / share.sum()
    return -(share * share.log()).sum().item()


@pytest.mark.parametrize("name", NAMES)
def test_the_committed_weights_are_the_ones_described(name: str) -> None:
    model = load_model(name, device="cpu")
    assert model.digest == DIGESTS[name]
    assert model.dtype == torch.bfloat16
    assert (model.hidden_size, model.num_layers, model.vocab_size, model.max_positions) == (256, 8, 4096, 2048)
    card = (find_bundled(name) / "MODEL_CARD.md").read_text()
    assert f"| parameters | {sum(p.numel() for p in model.module.parameters())} |" in card
    assert (find_bundled(name) / "model.safetensors").stat().st_size < 16_000_000


def test_they_are_trained(model: Model, held_out_text: str) -> None:
    tokens_BT = windows(model, held_out_text)
    assert len(tokens_BT) >= 10
    assert loss(model, tokens_BT) < unigram_entropy(tokens_BT) - 2


def test_a_completion_is_python(model: Model) -> None:
    assert model.tokenizer is not None
    prompt = model.tokenizer("def main():", return_tensors="pt")
    tokens = model.module.generate(**prompt, max_new_tokens=12, do_sample=False)
    text = model.tokenizer.decode(tokens[0])
    assert text.startswith("def main():\n    ")


def test_no_token_is_added_and_the_special_ones_are_there(model: Model) -> None:
    tokenizer = model.tokenizer
    assert tokenizer is not None
    assert tokenizer("")["input_ids"] == []
    assert len(tokenizer) == model.vocab_size
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    prompt, completion = "def f(x):", "\n    return x\n"
    ids = tokenizer(prompt)["input_ids"] + tokenizer(completion)["input_ids"]
    assert ids == tokenizer(prompt + completion)["input_ids"]


@given(text=st.text())
@settings(max_examples=200, deadline=None)
def test_any_text_survives_the_tokenizer(model: Model, text: str) -> None:
    assert model.tokenizer is not None
    assert model.tokenizer.decode(model.tokenizer(text)["input_ids"]) == text
