"""Causal language models: load a checkpoint, weight modes, shape presets, the bundled reference models."""

from assay.models._formats import StoredFormat, stored_format
from assay.models._info import ModelInfo, list_models, model_info
from assay.models._load import Model, check_loadable, identify, load_model
from assay.models._quantise import NUMBER_FORMATS, STORED_FORMATS, in_format
from assay.models._resolve import checkpoint_directory
from assay.models._save import save_random
from assay.models._tokenizer import load_tokenizer
from assay.models.decoder import backbone, decoder_layers, head_of

__all__ = [
    "NUMBER_FORMATS",
    "STORED_FORMATS",
    "Model",
    "ModelInfo",
    "StoredFormat",
    "backbone",
    "check_loadable",
    "checkpoint_directory",
    "decoder_layers",
    "head_of",
    "identify",
    "in_format",
    "list_models",
    "load_model",
    "load_tokenizer",
    "model_info",
    "save_random",
    "stored_format",
]
