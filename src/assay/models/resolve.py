"""Where a reference leads: a bundled model, a directory, a GGUF file, or a model of the hub.

A hub id is looked up in the local cache first, then fetched over the network with short timeouts.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

from assay.errors import BadWeights, ModelError, ModelNotFound, UnsafeCheckpoint, UsageError
from assay.files.names import normal_form
from assay.files.references import (
    ADAPTER_CONFIG,
    CATALOGUE,
    check_bundled,
    check_hub_id,
    find_path,
    is_bundled,
)
from assay.files.weights import PICKLES, check_texts, weight_files
from assay.models.configuration import build_config, read_config, silence_transformers
from assay.models.gguf_file import (
    convert,
    find_gguf,
    find_in_wheel,
    folder_of,
    read_gguf_config,
    read_header,
)

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

BUNDLED = Path(__file__).parent
"""Folder with the shapes and reference models of the wheel."""

_CHECKOUT = Path(__file__).parents[3] / "tests" / "data" / "models"
"""Folder with the reference models that are not in the wheel."""

_HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
_HUB_SECONDS = 5.0
_NOT_HERE = (ValueError, RuntimeError)  # a user without a home is a RuntimeError


@dataclass(frozen=True)
class ModelSource:
    """Where a model comes from.

    Attributes:
        reference: Reference as it was given.
        config: Configuration of transformers.
        published: Configuration as the raw JSON object, which does not change with the version of
            transformers.
        directory: Directory of the checkpoint, or None for a shape.
    """

    reference: str
    config: "PreTrainedConfig"
    published: dict[str, Any]
    directory: Path | None

    @property
    def checkpoint(self) -> Path:
        """Directory of the checkpoint; a shape has none, and is refused."""
        if self.directory is None:
            raise UsageError(
                f"{self.reference} has no checkpoint",
                wanted="a checkpoint on disk",
                do="make one with `assay models random`, and pass its directory",
            )
        return self.directory


def resolve(reference: str | Path, *, with_weights: bool = True) -> ModelSource:
    """Find a model; :func:`assay.models.load_model` lists references and errors.

    With weights, a GGUF file is made a checkpoint directory, which takes a while at the first time;
    without, its header alone is read, and the source has no directory.
    """
    name = normal_form(os.fspath(reference))
    if isinstance(reference, str) and is_bundled(name):
        path = find_bundled(name)
        if name.startswith("shape:"):
            published = read_config(path)
            return ModelSource(name, build_config(name, published), published, None)
    else:
        path = _locate(reference)
        if (path / ADAPTER_CONFIG).exists():
            raise ModelError(
                f"{path} holds an adapter",
                wanted="a whole model: an adapter is not part of what is measured here",
                do="merge the adapter into its model and save the result",
            )
    # A GGUF file is converted once; from then on its checkpoint in the cache is read.
    gguf_file = find_gguf(path)
    directory = path if gguf_file is None else folder_of(gguf_file)
    if gguf_file is not None and not (directory / "config.json").is_file():
        header = read_header(gguf_file)
        published, config = read_gguf_config(name, gguf_file, header)
        if not with_weights:
            return ModelSource(name, config, published, None)
        convert(gguf_file, header, config, directory)
    published = read_config(directory / "config.json")
    check_texts(directory)
    return ModelSource(name, build_config(name, published), published, directory)


def find_bundled(reference: str) -> Path:
    """Return the directory, GGUF file or shape configuration that a bundled name stands for.

    Raises:
        ModelNotFound: The catalogue does not have the name, or it is not installed.
    """
    check_bundled(reference)
    kind, _, name = reference.partition(":")
    if kind == "shape":
        return BUNDLED / "shapes" / f"{name}.json"
    if kind == "pretrained":
        return find_in_wheel(reference, **CATALOGUE[reference]["wheel"])
    for path in (BUNDLED / "reference" / name, _CHECKOUT / name):
        if (path / "config.json").is_file():
            return path
    raise ModelNotFound(
        f"{reference} is not in the installed package",
        wanted="a checkout of the repository, which has it in tests/data/models",
        do="install from a checkout with pip install -e ., or use reference:qwen3",
    )


def _locate(reference: str | Path) -> Path:
    """Return the directory or GGUF file of a path or a hub id, downloaded where it is not here."""
    name = os.fspath(reference)
    if (path := find_path(name)) is not None:
        return path
    check_hub_id(name if isinstance(reference, str) else f"./{name}")
    return find_cached(name) or _download(name)


def find_cached(hub_id: str) -> Path | None:
    """Return the directory of a hub model that is complete in the local cache, or None."""
    try:
        directory = Path(
            snapshot_download(hub_id, allow_patterns=_HUB_FILES, local_files_only=True)
        )
        weight_files(directory)
    except (*_NOT_HERE, LocalEntryNotFoundError, ModelNotFound, BadWeights):
        return None
    return directory if (directory / "config.json").is_file() else None


def _download(hub_id: str) -> Path:
    """Return the directory of a hub model after its download; pickles are never fetched."""
    try:
        siblings = HfApi().model_info(hub_id, timeout=_HUB_SECONDS).siblings or []
        names = [file.rfilename for file in siblings]
        pickles = [name for name in names if name.endswith(PICKLES)]
        if pickles and not any(name.endswith(".safetensors") for name in names):
            raise UnsafeCheckpoint(
                f"{hub_id!r} is published only as a pickle ({pickles[0]}), which would execute "
                f"code when it is read",
                wanted="safetensors",
                do="ask its authors for safetensors, or convert it on a machine you can afford to "
                "lose",
            )
        with silence_transformers():
            return Path(
                snapshot_download(hub_id, allow_patterns=_HUB_FILES, etag_timeout=_HUB_SECONDS)
            )
    except (*_NOT_HERE, HfHubHTTPError, httpx.HTTPError, OfflineModeIsEnabled, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ModelNotFound(
            f"{hub_id!r} is no directory here, is not in the local cache, and the hub did not "
            f"return it: {reason}",
            wanted="a directory, reference:NAME, shape:NAME, or a hub id that can be downloaded",
            do="check the name and the network, or take a model of `assay models list`",
        ) from error
