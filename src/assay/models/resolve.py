"""From a reference to a configuration, a tokenizer and, where there are trained weights, a directory.

The catalogue lists the bundled models: trained reference models, and published shapes without weights. A hub id is
looked up in the local cache first, then fetched over the network with short timeouts.
"""

import difflib
import json
import logging
import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
)
from transformers.utils import logging as hf_logging

from assay.errors import BadWeights, ModelError, ModelNotFound, UnsafeCheckpoint, UsageError
from assay.models.checkpoint import CONFIG, PICKLES, weight_files

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase


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


_HERE = Path(__file__).parent
_CHECKOUT = Path(__file__).parents[3] / "tests" / "data" / "models"  # models that are not in the wheel

CATALOGUE: dict[str, dict[str, Any]] = {
    row["reference"]: row for row in json.loads((_HERE / "catalogue.json").read_text("utf-8"))
}
"""Facts of the bundled models by reference, as :class:`assay.models.ModelInfo` has them."""

BARE_NAMES = {reference.partition(":")[2] for reference in CATALOGUE}
"""Names without their prefix, which stand for nothing: the error names the whole reference."""

_NEEDED = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "max_position_embeddings")
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
_SECONDS = 5.0


@dataclass(frozen=True)
class Source:
    """Where a model comes from.

    Attributes:
        reference: Reference as it was given.
        config: Configuration of transformers.
        published: Configuration as the raw JSON object, which does not change with the version of transformers.
        directory: Directory of the checkpoint, or None for a shape.
    """

    reference: str
    config: "PreTrainedConfig"
    published: dict[str, Any]
    directory: Path | None

    @property
    def checkpoint(self) -> Path:
        """Directory of the checkpoint.

        Raises:
            UsageError: The model is a shape, which has none.
        """
        if self.directory is None:
            raise UsageError(
                f"{self.reference} has no checkpoint",
                wanted="a checkpoint on disk",
                do="make one with `assay models random`, and pass its directory",
            )
        return self.directory


def resolve(reference: str | Path) -> Source:
    """Find a model. See :func:`assay.models.load_model` for what a reference may be and what is raised."""
    name = os.fspath(reference)
    if isinstance(reference, str) and (
        name.startswith(("reference:", "shape:")) or (name in BARE_NAMES and not Path(name).exists())
    ):
        path = find_bundled(name)
        directory = None if name.startswith("shape:") else path
    else:
        directory = path = _locate(reference)
        if (path / CONFIG).is_file():
            raise ModelError(
                f"{path} holds an adapter",
                wanted="a whole model: an adapter is not part of what is measured here",
                do="merge the adapter into its model and save the result",
            )
    published = _read_config(path if directory is None else path / "config.json")
    return Source(name, _build_config(name, published), published, directory)


def _locate(reference: str | Path) -> Path:
    name = os.fspath(reference)
    path = Path(os.path.expanduser(name))  # noqa: PTH111 - that of Path fails where there is no such user
    if path.is_dir():
        return path
    if (
        isinstance(reference, str)
        and not (path.exists() or path.is_symlink())
        and _HUB_ID.fullmatch(name)
        and name[0] != "."
    ):
        return _cached(name) or _downloaded(name)
    raise ModelNotFound(
        f"{name!r} is {'a file' if path.exists() else 'no directory'}",
        wanted="a checkpoint directory, a hub id (owner/name), reference:NAME or shape:NAME",
        do="run `assay models list` for the bundled ones, or check the path",
    )


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ModelNotFound(
            f"{path.parent} has no {path.name}",
            wanted="a checkpoint directory as save_pretrained writes it",
            do="check the path",
        )
    try:
        published = json.loads(path.read_text("utf-8"), object_hook=_plain_number)
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path} cannot be read: {error}", wanted="a JSON object", do="save it again") from error
    if not isinstance(published, dict) or not isinstance(published.get("model_type"), str):
        raise ModelError(f"{path} names no model_type", wanted="a transformers configuration", do="save it again")
    return published


def _plain_number(value: dict[str, Any]) -> Any:
    """Return infinity or NaN in place of the object as which transformers writes it; JSON has no such numbers."""
    written = value.get("__float__") if len(value) == 1 else None
    return float(written) if written in ("Infinity", "-Infinity", "NaN") else value


def _build_config(name: str, published: dict[str, Any]) -> "PreTrainedConfig":
    settings = {key: value for key, value in published.items() if key not in ("model_type", "quantization_config")}
    try:
        with silence_transformers():
            config = AutoConfig.for_model(published["model_type"], **settings)
    except Exception as error:  # the library validates with exceptions of many kinds
        raise ModelError(
            f"the configuration of {name!r} is refused: {error!s:.300}",
            wanted="an architecture that this version of transformers has built in",
            do="code that comes with a checkpoint is never run; update transformers or use another model",
        ) from error
    known = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING or type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    if not known or config.is_encoder_decoder or not _is_complete(config):
        raise ModelError(
            f"{name!r} is a {published['model_type']} model",
            wanted="a causal language model with " + ", ".join(_NEEDED),
            do="use a decoder-only model",
        )
    return config


def _is_complete(config: "PreTrainedConfig") -> bool:
    """Return whether a configuration, or that of the decoder which it wraps, has the sizes that are read."""
    try:
        text = config.get_text_config(decoder=True)
    except ValueError:  # it wraps several decoders
        return False
    return all(isinstance(getattr(text, key, None), int) for key in _NEEDED)


def auto_class(config: "PreTrainedConfig") -> Any:
    """Return what makes the model of a configuration: a decoder, or one inside a model that reads images too."""
    return AutoModelForCausalLM if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING else AutoModelForImageTextToText


def _cached(hub_id: str) -> Path | None:
    """Return the directory of a hub model that is complete in the local cache, or None."""
    try:
        directory = Path(snapshot_download(hub_id, allow_patterns=_FILES, local_files_only=True))
        weight_files(directory)
    except (LocalEntryNotFoundError, ValueError, ModelNotFound, BadWeights):
        return None
    return directory if (directory / "config.json").is_file() else None


def _downloaded(hub_id: str) -> Path:
    """Return the directory of a hub model after its download; pickles are never fetched."""
    try:
        names = [file.rfilename for file in HfApi().model_info(hub_id, timeout=_SECONDS).siblings or []]
        pickles = [name for name in names if name.endswith(PICKLES)]
        if pickles and not any(name.endswith(".safetensors") for name in names):
            raise UnsafeCheckpoint(
                f"{hub_id!r} is published only as a pickle ({pickles[0]}), which would execute code when it is read",
                wanted="safetensors",
                do="ask its authors for safetensors, or convert it on a machine you can afford to lose",
            )
        with silence_transformers():
            return Path(snapshot_download(hub_id, allow_patterns=_FILES, etag_timeout=_SECONDS))
    except (HfHubHTTPError, httpx.HTTPError, OfflineModeIsEnabled, OSError, ValueError) as error:
        raise ModelNotFound(
            f"{hub_id!r} is no directory here, is not in the local cache, and the hub did not return it: "
            f"{str(error).splitlines()[0] if str(error) else type(error).__name__}",
            wanted="a directory, reference:NAME, shape:NAME, or a hub id that can be downloaded",
            do=f"did you mean {nearest(hub_id)!r}? If not, check the name and the network, or give a directory",
        ) from error


def find_bundled(reference: str) -> Path:
    """Return the directory of a ``reference:`` name, or the configuration file of a ``shape:`` name.

    Raises:
        ModelNotFound: There is no such name (the error says the nearest), or its weights are only in the repository.
    """
    if reference not in CATALOGUE:
        raise ModelNotFound(
            f"no bundled model is named {reference!r}",
            wanted="one of " + ", ".join(CATALOGUE),
            do=f"did you mean {nearest(reference)!r}?",
        )
    kind, _, name = reference.partition(":")
    if kind == "shape":
        return _HERE / "shapes" / f"{name}.json"
    found = next(
        (path for path in (_HERE / "reference" / name, _CHECKOUT / name) if (path / "config.json").is_file()), None
    )
    if found is None:
        raise ModelNotFound(
            f"{reference} is not in the installed package",
            wanted="a checkout of the repository, which has it in tests/data/models",
            do="install from a checkout with pip install -e ., or use reference:qwen3",
        )
    return found


def nearest(name: str) -> str:
    """Return the bundled model whose name, with or without ``reference:`` or ``shape:``, is most like this one."""
    spelled = {spelling: one for one in CATALOGUE for spelling in (one, one.partition(":")[2])}
    return spelled[difflib.get_close_matches(name.lower(), spelled, n=1, cutoff=0.0)[0]]


def load_tokenizer(reference: str | Path) -> "PreTrainedTokenizerBase | None":
    """Return the tokenizer of a model without its weights; None where it has none, as a shape.

    Raises:
        ModelNotFound: There is no such model.
        ModelError: The tokenizer cannot be read.
    """
    directory = resolve(reference).directory
    return None if directory is None else read_tokenizer(directory)


def read_tokenizer(directory: Path) -> "PreTrainedTokenizerBase | None":
    """Return the tokenizer in a directory; None where there is no file of one.

    Raises:
        ModelError: The tokenizer cannot be read.
    """
    names = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
    if not any((directory / name).is_file() for name in names):
        return None
    try:
        with silence_transformers():
            return AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the libraries raise many kinds, down to bare Exception from Rust
        raise ModelError(
            f"the tokenizer in {directory} cannot be read: {error}",
            wanted="tokenizer files that need no code of their own",
            do="save the tokenizer again, or remove its files to load the model without one",
        ) from error
