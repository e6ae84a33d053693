"""Compare single layers of vLLM with those of the transformers engine; a script, for vLLM sets up its whole process.

Prints as JSON, by format and dtype, the relative distance of their outputs for one input, or why vLLM has no layer.

    python -m tests.vllm.layers
"""

import json
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file

from assay.models import load_model
from assay.models.resolve import checkpoint_directory
from tests.models.storing import FOUR_BITS, described, store

LAYER = "model.layers.1.mlp.down_proj"


def main() -> None:
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import ensure_model_parallel_initialized, init_distributed_environment

    with tempfile.TemporaryDirectory() as folder:
        with set_current_vllm_config(VllmConfig()):
            init_distributed_environment(1, 0, f"file://{folder}/store", 0, "gloo")
            ensure_model_parallel_initialized(1, 1)
        found = {}
        for form in (*FOUR_BITS, "int8", "block"):
            path = store(checkpoint_directory("reference:qwen3"), Path(folder) / form, form)
            for dtype in ("bfloat16", "float16"):
                try:
                    found[f"{form} {dtype}"] = distance(path, form, dtype)
                except ValueError as error:
                    found[f"{form} {dtype}"] = str(error)
    json.dump(found, sys.stdout)


def distance(path: Path, form: str, dtype: str) -> float:
    """The relative distance of both layers' outputs."""
    from vllm.config import ModelConfig, VllmConfig, set_current_vllm_config
    from vllm.model_executor.layers.linear import ReplicatedLinear
    from vllm.model_executor.layers.quantization import get_quantization_config

    stored, ours = load_file(path / "model.safetensors"), load_model(path, device="cpu", dtype=dtype)
    layer, chosen = ours.module.get_submodule(LAYER), getattr(torch, dtype)
    said = described(form)
    config = VllmConfig(model_config=ModelConfig(model=str(path), dtype=dtype, skip_tokenizer_init=True))
    torch.set_default_dtype(chosen)
    try:
        with set_current_vllm_config(config), torch.inference_mode():
            quantisation = get_quantization_config(said["quant_method"]).from_config(said)
            sizes = (layer.in_features, layer.out_features)
            theirs = ReplicatedLinear(
                *sizes, bias=False, params_dtype=chosen, quant_config=quantisation, prefix=LAYER, return_bias=False
            )
            for name, parameter in theirs.named_parameters():
                parameter.weight_loader(parameter, stored[f"{LAYER}.{name}"])
            theirs.quant_method.process_weights_after_loading(theirs)
            x = torch.randn(64, sizes[0], generator=torch.Generator().manual_seed(0), dtype=torch.float32).to(chosen)
            one, other = theirs(x).float(), layer(x).float()
    finally:
        torch.set_default_dtype(torch.float32)
    return float((one - other).norm() / other.norm())


if __name__ == "__main__":
    main()
