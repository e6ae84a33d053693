"""How PEFT names the files of a LoRA adapter, and the tensors in them."""

__all__ = ["CONFIG", "FACTORS", "PREFIX", "WEIGHTS"]

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
"""Names of the two files of an adapter, as peft writes them."""

PREFIX = "base_model.model."
"""What stands before the name that a module has in the model."""

FACTORS = (".lora_A.weight", ".lora_B.weight")
"""What follows that name for A [R, I] and B [O, R] of the product B A."""
