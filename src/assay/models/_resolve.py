"""From a reference to a configuration and, where there are trained weights, a directory."""

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig

from assay.errors import ModelError, ModelNotFound
from assay.models._catalogue import find_entry
from assay.models._hub import fetch
from assay.models._quiet import quiet

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_NEEDED = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "max_position_embeddings")
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


@dataclass(frozen=True)
class Source:
    """Where a model comes from.

    Attributes:
        reference: as given.
        config: the transformers configuration.
        published: the same as the raw JSON object, which does not change with the version of transformers.
        directory: the checkpoint, or None for a shape.
    """

    reference: str
    config: "PreTrainedConfig"
    published: dict[str, Any]
    directory: Path | None


def resolve(reference: str | Path) -> Source:
    """Find a model. See :func:`assay.models.load_model` for what a reference may be and what is raised."""
    name = os.fspath(reference)
    if isinstance(reference, str) and name.startswith(("reference:", "shape:")):
        path = find_entry(name).path
        directory = None if name.startswith("shape:") else path
    else:
        directory = path = _locate(reference)
        _refuse_adapter(path)
    published = _read_config(path if directory is None else path / "config.json")
    return Source(name, _build_config(name, published), published, directory)


def _locate(reference: str | Path) -> Path:
    path = Path(reference).expanduser()
    if path.is_dir():
        return path
    name = os.fspath(reference)
    if isinstance(reference, str) and not path.exists() and _HUB_ID.fullmatch(name) and name[0] != ".":
        return fetch(name)
    raise ModelNotFound(
        f"{name!r} is {'a file' if path.exists() else 'no directory'}",
        wanted="a checkpoint directory, a hub id (owner/name), reference:NAME or shape:NAME",
        do="run `assay models list` for the bundled ones, or check the path",
    )


def _refuse_adapter(directory: Path) -> None:
    if (directory / "adapter_config.json").is_file():
        raise ModelError(
            f"{directory} holds an adapter",
            wanted="a whole model: an adapter is not part of what is measured here",
            do="merge the adapter into its model and save the result",
        )


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ModelNotFound(
            f"{path.parent} has no {path.name}",
            wanted="a checkpoint directory as save_pretrained writes it",
            do="check the path",
        )
    try:
        published = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read: {error}", wanted="a JSON object", do="save it again") from error
    if not isinstance(published, dict) or not isinstance(published.get("model_type"), str):
        raise ModelError(f"{path} names no model_type", wanted="a transformers configuration", do="save it again")
    return published


def _build_config(name: str, published: dict[str, Any]) -> "PreTrainedConfig":
    if published.get("quantization_config") is not None:
        raise ModelError(
            f"{name!r} is quantised",
            wanted="float32, float16 or bfloat16 weights",
            do="use the checkpoint before quantisation",
        )
    settings = {key: value for key, value in published.items() if key != "model_type"}
    try:
        with quiet():
            config = AutoConfig.for_model(published["model_type"], **settings)
    except Exception as error:  # the library validates with exceptions of many kinds
        raise ModelError(
            f"the configuration of {name!r} is refused: {error}",
            wanted="an architecture that this version of transformers has built in",
            do="code that comes with a checkpoint is never run; update transformers or use another model",
        ) from error
    complete = all(isinstance(getattr(config, key, None), int) for key in _NEEDED)
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING or not complete:
        raise ModelError(
            f"{name!r} is a {published['model_type']} model",
            wanted="a causal language model with " + ", ".join(_NEEDED),
            do="use a decoder-only model",
        )
    return config
