"""References to models, checked before torch is imported, which takes seconds.

The catalogue lists the bundled models: trained reference models, and published shapes without
weights.
"""

import difflib
import json
import os
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

from assay.errors import DataError, ModelNotFound
from assay.files.jsonl import read_json
from assay.files.names import existing_spelling
from assay.files.weights import check_weights

_MODELS = json.loads((Path(__file__).parents[1] / "models" / "catalogue.json").read_text("utf-8"))
CATALOGUE: dict[str, dict[str, Any]] = {model["reference"]: model for model in _MODELS}
"""Facts of the bundled models by reference, as :class:`assay.models.ModelInfo` has them."""

BARE_NAMES = {reference.partition(":")[2]: reference for reference in CATALOGUE}
"""References by their names without prefix, which are refused: the error has the reference."""

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
"""Names of the two files of an adapter, as peft writes them."""

_HUB_ID = re.compile(r"(?![.-])[\w.-]+(/[\w.-]+)?")


def check_reference(reference: str, *, with_weights: bool = False) -> None:
    """Refuse a reference that leads to no model, by the catalogue and the files that exist.

    With ``with_weights`` the weights of a directory are checked by their names and headers.
    """
    if is_bundled(reference):
        check_bundled(reference)
        return
    path = find_path(reference)
    if path is None:
        check_hub_id(reference)
    elif path.is_dir():
        is_gguf = any(path.glob("*.[gG][gG][uU][fF]"))
        if not is_gguf and not (path / ADAPTER_CONFIG).is_file():
            check_config(path / "config.json")
            if with_weights:
                check_weights(path)


def stated_positions(reference: str) -> int | None:
    """Return the most positions of a model by catalogue or config.json; None if neither has it."""
    if reference in CATALOGUE:
        return int(CATALOGUE[reference]["max_positions"])
    path = find_path(reference)
    if path is None or not (path / "config.json").is_file():
        return None
    with suppress(DataError, AttributeError):
        config = read_json(path / "config.json")
        stated = config.get("text_config", config).get("max_position_embeddings")
        return stated if isinstance(stated, int) else None
    return None


def is_bundled(reference: str) -> bool:
    """Return whether a reference has the form of a catalogue name, with or without its prefix."""
    return reference.lower().startswith(("reference:", "shape:", "pretrained:")) or (
        reference in BARE_NAMES and not Path(reference).exists()
    )


def check_bundled(reference: str) -> None:
    """Refuse a name that the catalogue does not have; the error suggests the nearest one."""
    if reference not in CATALOGUE:
        spellings = {full: full for full in CATALOGUE} | BARE_NAMES
        (nearest,) = difflib.get_close_matches(reference.lower(), spellings, n=1, cutoff=0.0)
        raise ModelNotFound(
            f"no bundled model is named {reference!r}",
            wanted="one of " + ", ".join(CATALOGUE),
            do=f"did you mean {spellings[nearest]!r}?",
        )


def check_hub_id(reference: str) -> None:
    """Refuse what cannot be the name of a model on the hub."""
    if not _HUB_ID.fullmatch(reference):
        raise _no_model(reference, "no directory")


def check_config(path: Path) -> None:
    """Refuse a directory without this configuration file."""
    if not path.is_file():
        raise ModelNotFound(
            f"{path.parent} has no {path.name}",
            wanted="a checkpoint directory of a language model, as save_pretrained writes it",
            do="check the path",
        )


def find_path(reference: str) -> Path | None:
    """Return the directory or GGUF file of a reference; None where it may be a hub id.

    Raises:
        ModelNotFound: It is a path at which no model can be.
    """
    reference = os.path.expanduser(reference)  # noqa: PTH111 - that of Path fails where there is no such user
    path = Path(reference)
    try:
        path = existing_spelling(path)
        if path.is_dir() or (path.is_file() and path.suffix.lower() == ".gguf"):
            return path
        if path.exists():
            raise _no_model(reference, "a file")
        if path.is_symlink() or reference.startswith((".", "/", "~")):
            raise _no_model(reference, "no directory")
    except OSError as error:  # a name that is longer than a file system takes
        raise _no_model(reference, f"no directory: {error.strerror}") from error
    return None


def _no_model(reference: str, fault: str) -> ModelNotFound:
    """Return the error of a reference that leads to no model, for this reason."""
    return ModelNotFound(
        f"{reference!r:.80} is {fault}",
        wanted=(
            "a checkpoint directory, a GGUF file, a hub id (owner/name), or a name of "
            "`assay models list`"
        ),
        do="check the path, or run `assay models list` for the bundled ones",
    )
