"""Skipping experts: a small mixture of experts, made on the spot with random weights, asked for fewer of them.

Legend of shapes: N nonces, R rows (positions of a batch), A experts asked, D hidden size.
"""

import copy
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from assay.errors import UsageError
from assay.models.decoder import decoder_layers
from assay.models.load import Model, load_model
from assay.models.resolve import silence_transformers
from assay.poc import cheats
from assay.poc.engines.hf.engine import HFEngine
from assay.poc.protocol.round import Round
from assay.poc.protocol.transforms import unit
from assay_research.redteam.attacks import OnEngine
from assay_research.redteam.field import Reading

SEQ_LEN = 128
EXPERTS = 8
ASKED = 4
SHAPE: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "moe_intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "num_experts": EXPERTS,
    "num_experts_per_tok": ASKED,
    "norm_topk_prob": True,
    "vocab_size": 512,
    "max_position_embeddings": 256,
    # At the library's own 0.02 the layers would add next to nothing to inputs of unit variance.
    "initializer_range": 0.1,
}
EXPERTS_SAVED: dict[str, tuple[float, ...]] = {
    "lightest third": (1 / 3,) * 4,
    "lightest, more of them in later layers": (1 / 6, 5 / 18, 7 / 18, 1 / 2),
}
"""Shares of the pairs of position and expert that are left out in every layer: a quarter of the work."""


def make_experts(folder: Path) -> Path:
    """Write a checkpoint of a mixture of experts with random weights and return its path."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module: Any = Qwen3MoeForCausalLM(Qwen3MoeConfig(**SHAPE))  # type: ignore[no-untyped-call]
        with silence_transformers():
            module.save_pretrained(folder / "experts")
    return folder / "experts"


def experts(batch_size: int, nonces: int, dtypes: Sequence[str] = ("bfloat16",)) -> dict[str, Any]:
    """Measure the error of asking fewer experts in float32, for the last state and for all positions.

    Beside it stand honest provers in ``dtypes``. All runs on the CPU.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = make_experts(Path(folder))
        model, *halves = (load_model(path, dtype=dtype, device="cpu") for dtype in ("float32", *dtypes))
    validator = HFEngine(model, batch_size=batch_size, seq_len=SEQ_LEN)
    readings = {
        preset: Reading(
            validator, Round(block_hash="experts", public_key="k", preset=preset, seq_len=SEQ_LEN), [preset]
        )
        for preset in ("artifact", "hardened")
    }
    provers = {}
    for dtype, half in zip(dtypes, halves, strict=True):
        provers[f"honest, {dtype}"] = (half, 1.0)
        provers[f"router rounded to {dtype}"] = (_rounded_router(model, half.dtype), 1.0)
    for count in (3, 2, 1):
        provers[f"{count} of {ASKED} experts"] = (cheats.with_fewer_experts(model, count), experts_cost(count))
    for name, shares in EXPERTS_SAVED.items():
        asked = ASKED * (1 - sum(shares) / len(shares))
        provers[f"{name} left out"] = (without_light_experts(model, shares), experts_cost(asked))
    rows = []
    for name, (prover, cost) in provers.items():
        engine = HFEngine(prover, batch_size=batch_size, seq_len=SEQ_LEN)
        row: dict[str, Any] = {"name": name, "cost": cost}
        for preset, reading in readings.items():
            x_ND = reading.states(OnEngine(engine), engine, nonces)
            row[preset] = float((unit(x_ND) - unit(reading.recomputed(nonces))).norm(dim=-1).mean())
        rows.append(row)
    return {"kind": "experts", "nonces": nonces, "experts": EXPERTS, "asked": ASKED, "rows": rows}


def without_light_experts(model: Model, shares: Sequence[float]) -> Model:
    """Return a mixture that leaves out, in every layer, a share of all pairs of position and expert: the lightest.

    The weights of the others stay as they are. Where few experts matter to a position, more of them are left out.

    Raises:
        UsageError: The model has no experts, or another number of layers than there are shares.
    """
    module = copy.deepcopy(model.module)
    layers: Any = decoder_layers(module)
    if len(layers) != len(shares) or not all(hasattr(getattr(layer, "mlp", None), "gate") for layer in layers):
        raise UsageError(
            f"{len(shares)} shares of experts for {len(layers)} layers of {model.architecture}",
            wanted="a mixture of experts in every layer, and a share for each",
            do="use a mixture of experts such as qwen3_moe",
        )
    for layer, share in zip(layers, shares, strict=True):
        layer.mlp.gate.register_forward_hook(_lightened(share))
    return replace(model, module=module)


def _lightened(share: float) -> Callable[[Any, Any, tuple[Tensor, Tensor, Tensor]], tuple[Tensor, Tensor, Tensor]]:
    def hook(module: Any, arguments: Any, output: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        logits, weights_RA, chosen_RA = output
        count = round(share * weights_RA.numel())
        if not count:
            return output
        least = weights_RA.float().flatten().kthvalue(count).values
        return logits, weights_RA.masked_fill(weights_RA.float() <= least, 0), chosen_RA

    return hook


def _rounded_router(model: Model, dtype: torch.dtype) -> Model:
    """Return the model with only its routers' weights rounded, which shows what ties between experts cost."""
    module = copy.deepcopy(model.module)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name.endswith("mlp.gate.weight"):
                parameter.copy_(parameter.to(dtype).float())
    return replace(model, module=module)


def experts_cost(count: float) -> float:
    """Return the multiplications of the linear layers with ``count`` experts over those with all that are asked."""
    D = SHAPE["hidden_size"]
    heads, keys = SHAPE["num_attention_heads"], SHAPE["num_key_value_heads"]
    attention = 2 * D * SHAPE["head_dim"] * (heads + keys) + SHAPE["head_dim"] * heads * SEQ_LEN
    expert = 3 * D * SHAPE["moe_intermediate_size"]
    return float((attention + count * expert) / (attention + ASKED * expert))
