"""LoRA adapters for tests, in the files that peft writes."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from assay.models import Model


def write_adapter(path: Path, model: Model, *, rank: int = 4, size: float = 0.05, **config) -> Path:
    """Write an adapter of the attention's projections of queries and values; ``config`` changes its
    configuration.
    """
    path.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(rank)
    tensors = {}
    for name, layer in model.module.named_modules():
        if name.endswith(("q_proj", "v_proj")):
            outputs, inputs = layer.weight.shape
            for part, shape in (("A", (rank, inputs)), ("B", (outputs, rank))):
                tensors[f"base_model.model.{name}.lora_{part}.weight"] = size * torch.randn(
                    shape, generator=generator
                )
    save_file(tensors, path / "adapter_model.safetensors")
    values = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": 2 * rank,
        "bias": "none",
    }
    values |= {
        "target_modules": ["q_proj", "v_proj"],
        "base_model_name_or_path": model.reference,
    } | config
    (path / "adapter_config.json").write_text(json.dumps(values))
    return path
