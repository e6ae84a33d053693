"""Which references to a model are paths here: asked before torch and transformers are imported, which takes seconds."""

import os
from pathlib import Path

from assay.errors import ModelNotFound


def find_path(reference: str) -> Path | None:
    """Return the directory or GGUF file that a reference names; None where it may be a name of something elsewhere.

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
    wanted = "a checkpoint directory, a GGUF file, a hub id (owner/name), or a name of `assay models list`"
    do = "check the path, or run `assay models list` for the bundled ones"
    return ModelNotFound(f"{reference!r:.80} is {what}", wanted=wanted, do=do)
