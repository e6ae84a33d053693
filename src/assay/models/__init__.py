"""Causal language models: load a checkpoint, weight modes, shape presets, the bundled reference models."""

from assay.models.chat import Chat, read_chat
from assay.models.checkpoint import load_tokenizer
from assay.models.load import Model, ModelInfo, list_models, load_model, model_info, save_random
from assay.models.quantized import NUMBER_FORMATS

__all__ = [
    "NUMBER_FORMATS",
    "Chat",
    "Model",
    "ModelInfo",
    "list_models",
    "load_model",
    "load_tokenizer",
    "model_info",
    "read_chat",
    "save_random",
]
