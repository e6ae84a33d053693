"""Skipping experts: a small mixture of experts, made on the spot with random weights, asked for fewer of them.

Legend of shapes: N nonces, D hidden size.
"""

import tempfile
from pathlib import Path
from typing import Any

import torch

from assay.models import Model, load_model
from assay.models._quiet import quiet
from assay.poc import cheats
from assay.poc._round import Round
from assay.poc._transforms import unit
from assay.poc.engines import HFEngine
from assay.poc.experiments.redteam._attacks import OnEngine
from assay.poc.experiments.redteam._field import Reading

__all__ = ["experts", "make_experts"]

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


def make_experts(folder: Path) -> Path:
    """Write a checkpoint of a mixture of experts with random weights and return its path."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(0)
        module: Any = Qwen3MoeForCausalLM(Qwen3MoeConfig(**SHAPE))  # type: ignore[no-untyped-call]
        with quiet():
            module.save_pretrained(folder / "experts")
    return folder / "experts"


def experts(batch_size: int, nonces: int) -> dict[str, Any]:
    """Measure the error of asking fewer experts, beside honest bfloat16, for the last state and for all positions."""
    with tempfile.TemporaryDirectory() as folder:
        path = make_experts(Path(folder))
        model, half = (load_model(path, dtype=dtype, device="cpu") for dtype in ("float32", "bfloat16"))
    validator = HFEngine(model, batch_size=batch_size, seq_len=SEQ_LEN)
    readings = {
        preset: Reading(
            validator, Round(block_hash="experts", public_key="k", preset=preset, seq_len=SEQ_LEN), [preset]
        )
        for preset in ("artifact", "hardened")
    }
    provers = {"honest, bfloat16": (half, 1.0), "router rounded to bfloat16": (_rounded_router(model), 1.0)}
    for count in (3, 2, 1):
        provers[f"{count} of {ASKED} experts"] = (cheats.with_fewer_experts(model, count), _cost(count))
    rows = []
    for name, (prover, cost) in provers.items():
        engine = HFEngine(prover, batch_size=batch_size, seq_len=SEQ_LEN)
        row: dict[str, Any] = {"name": name, "cost": cost}
        for preset, reading in readings.items():
            x_ND = reading.states(OnEngine(engine), engine, nonces)
            row[preset] = float((unit(x_ND) - unit(reading.recomputed(nonces))).norm(dim=-1).mean())
        rows.append(row)
    return {"kind": "experts", "nonces": nonces, "experts": EXPERTS, "asked": ASKED, "rows": rows}


def _rounded_router(model: Model) -> Model:
    """The model with only its routers' weights rounded: what ties between experts cost an honest node."""
    import copy
    from dataclasses import replace

    module = copy.deepcopy(model.module)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name.endswith("mlp.gate.weight"):
                parameter.copy_(parameter.bfloat16().float())
    return replace(model, module=module)


def _cost(count: int) -> float:
    """Multiplications of the linear layers with ``count`` experts over those with all that are asked."""
    D = SHAPE["hidden_size"]
    heads, keys = SHAPE["num_attention_heads"], SHAPE["num_key_value_heads"]
    attention = 2 * D * SHAPE["head_dim"] * (heads + keys) + SHAPE["head_dim"] * heads * SEQ_LEN
    expert = 3 * D * SHAPE["moe_intermediate_size"]
    return float((attention + count * expert) / (attention + ASKED * expert))
