"""References to models, as far as they are understood before torch and transformers are imported,
which takes seconds.

The catalogue lists the bundled models: trained reference models, and published shapes without
weights.
"""

import difflib
import json
import os
import re
from pathlib import Path
from typing import Any

from assay.errors import ModelNotFound

_LISTED = json.loads((Path(__file__).parents[1] / "models" / "catalogue.json").read_text("utf-8"))
CATALOGUE: dict[str, dict[str, Any]] = {row["reference"]: row for row in _LISTED}
"""Facts of the bundled models by reference, as :class:`assay.models.ModelInfo` has them."""

BARE_NAMES = {reference.partition(":")[2] for reference in CATALOGUE}
"""Names without their prefix, which stand for nothing: the error names the whole reference."""

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
"""Names of the two files of an adapter, as peft writes them."""

_HUB_ID = re.compile(r"(?![.-])[\w.-]+(/[\w.-]+)?")


def check_reference(reference: str) -> None:
    """Refuse a reference that leads to no model, as far as the catalogue and the directory show
    it.
    """
    if is_bundled(reference):
        check_bundled(reference)
    elif (path := find_path(reference)) is None:
        check_hub_id(reference)
    elif (
        path.is_dir() and not any(path.glob("*.[gG][gG][uU][fF]")) and not (path / CONFIG).is_file()
    ):
        check_config(path / "config.json")


def is_bundled(reference: str) -> bool:
    """Return whether a reference is written as a name of the catalogue, or as one without its
    prefix.
    """
    prefixed = reference.lower().startswith(("reference:", "shape:", "pretrained:"))
    return prefixed or (reference in BARE_NAMES and not Path(reference).exists())


def check_bundled(reference: str) -> None:
    """Refuse a name that the catalogue does not have; the error has the nearest one."""
    if reference not in CATALOGUE:
        spelled = {spelling: one for one in CATALOGUE for spelling in (one, one.partition(":")[2])}
        (near,) = difflib.get_close_matches(reference.lower(), spelled, n=1, cutoff=0.0)
        do = f"did you mean {spelled[near]!r}?"
        raise ModelNotFound(
            f"no bundled model is named {reference!r}",
            wanted="one of " + ", ".join(CATALOGUE),
            do=do,
        )


def check_hub_id(reference: str) -> None:
    """Refuse what cannot be the name of a model at the hub."""
    if not _HUB_ID.fullmatch(reference):
        raise no_model(reference, "no directory")


def check_config(path: Path) -> None:
    """Refuse a directory without the configuration file that is named."""
    if not path.is_file():
        wanted = (
            "a checkpoint directory of a language model, as transformers' save_pretrained writes it"
        )
        raise ModelNotFound(f"{path.parent} has no {path.name}", wanted=wanted, do="check the path")


def find_path(reference: str) -> Path | None:
    """Return the directory or GGUF file that a reference names; None where it may be a name of
    something elsewhere.

    Raises:
        ModelNotFound: It is a path at which no model can be.
    """
    path = Path(os.path.expanduser(reference))  # noqa: PTH111 - that of Path fails where there is no such user
    try:
        if path.is_dir() or (path.is_file() and path.suffix.lower() == ".gguf"):
            return path
        if path.exists() or path.is_symlink() or reference.startswith((".", "/", "~")):
            raise no_model(reference, "a file" if path.exists() else "no directory")
    except OSError as error:  # a name that is longer than a file system takes
        raise no_model(reference, f"no directory: {error.strerror}") from error
    return None


def no_model(reference: str, what: str) -> ModelNotFound:
    """Return the error of a reference that leads to ``what``, and to no model."""
    wanted = (
        "a checkpoint directory, a GGUF file, a hub id (owner/name), or a name of `assay models "
        "list`"
    )
    do = "check the path, or run `assay models list` for the bundled ones"
    return ModelNotFound(f"{reference!r:.80} is {what}", wanted=wanted, do=do)
