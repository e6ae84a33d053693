"""Causal language models: load a checkpoint, weight modes, shape presets, the bundled reference models."""

from assay.models._identify import checkpoint_directory, identify
from assay.models._info import list_models, model_info
from assay.models._load import load_model
from assay.models._memory import free_bytes
from assay.models._quantise import NUMBER_FORMATS
from assay.models._quiet import quiet
from assay.models._save import save_random
from assay.models._types import Model, ModelInfo
from assay.models.decoder import backbone, decoder_layers

__all__ = [
    "NUMBER_FORMATS",
    "Model",
    "ModelInfo",
    "backbone",
    "checkpoint_directory",
    "decoder_layers",
    "free_bytes",
    "identify",
    "list_models",
    "load_model",
    "model_info",
    "quiet",
    "save_random",
]
