"""Configurations of models: read with bounds, checked, and built into an empty module."""

import json
import logging
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
)
from transformers.initialization import no_init_weights
from transformers.utils import logging as hf_logging

from assay.errors import DataError, ModelError, is_out_of_memory
from assay.files.jsonl import parts
from assay.files.reading import read_whole
from assay.files.references import check_config

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

_SIZES = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "vocab_size",
    "max_position_embeddings",
)
_LONGEST_CONFIG = 2**22  # bytes
_MOST_LAYERS = 2**12
# Words in the names of numbers of which the library makes a list: of a decoder, whose first layers
# may have no experts, or beside it, where towers of pictures have a depth and of sounds blocks.
_LISTS = ("layer", "depth", "block", "first_k_dense")
_REFUSED: dict[str, tuple[Any, ...]] = {
    "is_causal": (False,),
    "causal": (False,),  # of XLM
    "use_bidirectional_attention": (True, "all"),
    "add_cross_attention": (True,),
    "return_dict": (False,),
}
"""Settings under which a model is no causal decoder, or does not answer as others do."""
_ALWAYS_CAUSAL = ("gpt_neox", "gpt_neox_japanese")  # whatever they say of is_decoder


@contextmanager
def silence_transformers() -> Iterator[None]:
    """Hide the log lines, warnings and progress bars of transformers inside the block."""
    verbosity = hf_logging.get_verbosity()
    bars = hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity(logging.CRITICAL)
    hf_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        hf_logging.set_verbosity(verbosity)
        if bars:
            hf_logging.enable_progress_bar()  # type: ignore[no-untyped-call]


def read_config(path: Path) -> dict[str, Any]:
    """Read a ``config.json`` as a JSON object with a model type, or raise ModelError."""
    check_config(path)
    try:
        published = json.loads(read_whole(path, _LONGEST_CONFIG), object_hook=_parse_infinity)
    except (DataError, ValueError, RecursionError) as error:
        raise ModelError(
            f"{path} cannot be read: {error}", wanted="a JSON object", do="save it again"
        ) from error
    if not isinstance(published, dict) or not isinstance(published.get("model_type"), str):
        raise ModelError(
            f"{path} names no model_type", wanted="a transformers configuration", do="save it again"
        )
    return published


def _parse_infinity(value: dict[str, Any]) -> Any:
    """Return infinity for the object that transformers writes for it; JSON has no such number."""
    text = value.get("__float__") if len(value) == 1 else None
    if text == "NaN":
        raise ValueError("a setting that is not a number")
    return float(text) if text in ("Infinity", "-Infinity") else value


def build_config(name: str, published: dict[str, Any]) -> "PreTrainedConfig":
    """Return the transformers configuration of a JSON object; refuse what is no causal decoder.

    The errors have the name, the reference of the model; ``published`` is its ``config.json``.
    """
    # How weights are stored is read by assay itself: transformers would load its own quantiser.
    settings = {
        key: value
        for key, value in published.items()
        if key not in ("model_type", "quantization_config")
    }
    _check_numbers(name, settings)
    try:
        with silence_transformers():
            config = AutoConfig.for_model(published["model_type"], **settings)
    except Exception as error:  # the library validates with exceptions of many kinds
        raise ModelError(
            f"the configuration of {name!r} is refused: {error!s:.300}",
            wanted="an architecture that this version of transformers has built in",
            do="code that comes with a checkpoint is never run; update transformers or use "
            "another model",
        ) from error
    _check_causal(name, config)
    return config


def _check_numbers(name: str, settings: Any) -> None:
    """Refuse a number at any depth that makes a list without bound, or states that are no numbers.

    The library checks neither.
    """
    pending = [settings]
    while pending:
        part = pending.pop()
        pending += parts(part)
        for key, value in part.items() if isinstance(part, dict) else ():
            if wanted := _wanted_of(key, value):
                raise ModelError(
                    f"the configuration of {name!r} says {key} = {value}",
                    wanted=wanted,
                    do="compare it with the published one",
                )


def _wanted_of(key: str, value: Any) -> str:
    """Return what a number should be that it is not, in words; empty where it may be so."""
    # Gemma 3n has a vocabulary of 262 144, vocab_size_per_layer_input.
    is_length = key == "num_labels" or (any(word in key for word in _LISTS) and "size" not in key)
    if is_length and isinstance(value, int) and value > _MOST_LAYERS:
        return f"at most {_MOST_LAYERS} layers, blocks or labels"
    if not isinstance(value, int | float):
        return ""
    if key.endswith(("eps", "epsilon")) and not 0 <= value < math.inf:
        return "a finite number, not below 0"
    if key == "rope_theta" and not 0 < value < math.inf:
        return "a finite number above 0"
    return ""


def _check_causal(name: str, config: "PreTrainedConfig") -> None:
    """Refuse a configuration of anything but a causal decoder."""
    is_known = (
        type(config) in MODEL_FOR_CAUSAL_LM_MAPPING
        or type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    )
    if not is_known or config.is_encoder_decoder or not _has_sizes(config):
        raise ModelError(
            f"{name!r} is a {config.model_type} model",
            wanted="a causal language model with " + ", ".join(_SIZES),
            do="use a decoder-only model",
        )
    text_config = config.get_text_config(decoder=True)
    refused = dict(_REFUSED)
    # BERT is an encoder unless this is set.
    is_stated = "is_decoder" in getattr(type(text_config), "__dataclass_fields__", ())
    if is_stated and text_config.model_type not in _ALWAYS_CAUSAL:
        refused["is_decoder"] = (False,)
    for key, values in refused.items():
        value = getattr(text_config, key, None)
        if value in values:
            raise ModelError(
                f"the configuration of {name!r} says {key} = {value}",
                wanted="causal attention without cross-attention, and return_dict = true",
                do=f"remove {key} from its config.json if it was set by hand; else use a model "
                "that is published as a causal decoder",
            )


def _has_sizes(config: "PreTrainedConfig") -> bool:
    """Return whether the text decoder of a configuration states all the sizes that are read."""
    try:
        text_config = config.get_text_config(decoder=True)
    except ValueError:  # it wraps several decoders
        return False
    sizes = [getattr(text_config, key, None) for key in _SIZES]
    return all(isinstance(size, int) and size > 0 for size in sizes)


def auto_class(config: "PreTrainedConfig") -> Any:
    """Return the auto class that builds a configuration: a decoder, or a vision-language model."""
    return (
        AutoModelForCausalLM
        if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING
        else AutoModelForImageTextToText
    )


def build(config: "PreTrainedConfig", dtype: torch.dtype) -> "PreTrainedModel":
    """Return a module with computed buffers and unwritten parameters, or raise ModelError.

    Untouched memory costs nothing, so the largest shapes are built on the CPU in milliseconds.
    """
    module: PreTrainedModel
    try:
        with silence_transformers(), no_init_weights():
            module = auto_class(config).from_config(
                config, dtype=dtype, attn_implementation=choose_attention(config)
            )
    except Exception as error:  # a configuration of impossible numbers fails in many ways
        if is_out_of_memory(error):
            raise
        raise ModelError(
            f"no model can be built from this configuration: {error}",
            wanted="sizes that fit together",
            do="compare its config.json with the published one (--model, or REFERENCE)",
        ) from error
    module.tie_weights()
    return module


def build_empty(config: "PreTrainedConfig", dtype: torch.dtype = torch.float32) -> Any:
    """Return the module of a configuration on the meta device, which holds no numbers."""
    with torch.device("meta"):
        return build(config, dtype)


def count_parameters(module: torch.nn.Module) -> int:
    """Return how many numbers a module has; a tied matrix counts once."""
    return sum(parameter.numel() for parameter in module.parameters())


def choose_attention(config: "PreTrainedConfig") -> str:
    """Return ``sdpa``, or ``eager`` for what that lacks: sinks of GPT-OSS, capped scores of
    Gemma 2.
    """
    if getattr(config.get_text_config(decoder=True), "attn_logit_softcapping", None) is not None:
        return "eager"
    architecture: Any = auto_class(config)._model_mapping.get(type(config), None)
    return "sdpa" if getattr(architecture, "_supports_sdpa", True) else "eager"
