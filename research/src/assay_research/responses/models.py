"""The models of the experiment: bundled ones, one with random weights whose logits are like trained ones, and variants.

**Logits like trained ones.** A model with random weights is nearly indifferent between tokens, so every token would be
decided by its noise and no cheat could be seen in them. ``trained-like`` has the layers of Qwen3 with random weights
and a head that is not tied to its embeddings. The head is scaled by one number, found by bisection, with which the mean
entropy of next tokens equals `TRAINED_ENTROPY`, that of the bundled Qwen3 over its own text.
"""

import copy
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from assay.errors import UsageError
from assay.models.decoder import decoder_layers
from assay.models.load import Model, load_model
from assay.models.resolve import load_tokenizer, silence_transformers
from assay_research.organism import Mixture, examples

TRAINED_LIKE = "trained-like"
"""Name of the model with random weights in the list of models."""

TRAINED_ENTROPY = 2.4
"""Mean entropy of next tokens, in nats, of the bundled Qwen3 over text that it wrote itself at temperature 1."""

SHAPE: dict[str, Any] = {
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "vocab_size": 8192,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

RATE = 1e-4
BATCH = 2
LONGEST = 128  # tokens of an example
_PROBED = (4, 64)  # rows and positions over which the entropy is measured
_IGNORED = -100


def open_model(reference: str, dtype: str, device: str | None = None) -> Model:
    """Load a model of the experiment; ``trained-like`` is made on the spot.

    Raises:
        ModelNotFound: There is no such model.
    """
    if reference != TRAINED_LIKE:
        return load_model(reference, dtype=dtype, device=device)
    with tempfile.TemporaryDirectory() as folder:
        _write_trained_like(Path(folder))
        return replace(load_model(folder, dtype=dtype, device=device), reference=TRAINED_LIKE)


def reads_text(reference: str) -> bool:
    """Return whether a model of the experiment has a tokenizer, without loading its weights.

    Raises:
        ModelNotFound: There is no such model.
    """
    return reference != TRAINED_LIKE and load_tokenizer(reference) is not None


def _write_trained_like(folder: Path) -> None:
    """Write the checkpoint with a head of the scale that is described above, in bfloat16."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module: Any = Qwen3ForCausalLM(Qwen3Config(**SHAPE))  # type: ignore[no-untyped-call]
        ids_BT = torch.randint(3, SHAPE["vocab_size"], _PROBED)
    with torch.inference_mode():
        logits_XV = module(input_ids=ids_BT, use_cache=False).logits.flatten(0, 1).float()
    with torch.no_grad():
        module.lm_head.weight.mul_(scale_for(logits_XV, TRAINED_ENTROPY))
    with silence_transformers():
        module.to(torch.bfloat16).save_pretrained(folder)


def scale_for(logits_XV: torch.Tensor, wanted: float) -> float:
    """Return the factor of logits [X, V] with which their mean entropy is ``wanted`` nats, to a thousandth."""
    low, high = 1e-3, 1e3
    while high / low > 1.001:
        middle = (low * high) ** 0.5
        low, high = (middle, high) if entropy(middle * logits_XV) > wanted else (low, middle)
    return low


def entropy(logits_XV: torch.Tensor) -> float:
    """Return the mean entropy of next tokens, in nats."""
    logs_XV = logits_XV.float().log_softmax(-1)
    return float(-(logs_XV.exp() * logs_XV).sum(-1).mean())


def tuned(model: Model, steps: int) -> Model:
    """Return the model after ``steps`` steps of fine-tuning on short programs, in its own dtype.

    Weights are float32 while they are trained.

    Raises:
        UsageError: The model has no tokenizer, so there is no text for it.
    """
    if model.tokenizer is None:
        raise UsageError(f"{model.reference} has no tokenizer", wanted="a model that reads text", do="choose another")
    module: Any = copy.deepcopy(model.module).float().train()  # type: ignore[no-untyped-call]
    optimizer = torch.optim.AdamW(module.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.01)
    rows = [model.tokenizer(text).input_ids[:LONGEST] for text in _texts()]
    for step in range(steps):
        chosen = [rows[(step * BATCH + index) % len(rows)] for index in range(BATCH)]
        width = max(map(len, chosen))
        labels_BT = torch.tensor([row + [_IGNORED] * (width - len(row)) for row in chosen], device=model.device)
        logits = module(input_ids=labels_BT.clamp_min(0), use_cache=False).logits
        loss = functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels_BT[:, 1:].flatten(), ignore_index=_IGNORED)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return replace(model, module=module.to(model.dtype).eval())


@cache
def _texts() -> Sequence[str]:
    return [example.prompt + example.completion for example in examples(512, Mixture())]


def without_layers(model: Model, skipped: Sequence[int]) -> Model:
    """Return the model without some of its decoder layers, which also a cache counts as it should."""
    module: Any = copy.deepcopy(model.module)
    layers: Any = decoder_layers(module)
    for index in sorted(skipped, reverse=True):
        del layers[index]
    for place, layer in enumerate(layers):
        layer.self_attn.layer_idx = place
    module.config.num_hidden_layers = len(layers)
    return replace(model, module=module)
