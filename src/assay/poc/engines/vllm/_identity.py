"""Which checkpoint a vLLM engine serves, as proofs name it: without loading the weights a second time."""

from pathlib import Path

import torch

from assay.errors import UsageError
from assay.models import Model
from assay.models._checkpoint import digest_tensors, list_tensors
from assay.models._random import build
from assay.models._resolve import resolve

__all__ = ["checkpoint_directory", "identify"]


def checkpoint_directory(reference: str) -> Path:
    """Return the directory that vLLM is given for a reference.

    Raises:
        UsageError: a shape, which has no directory.
        ModelNotFound: there is no such model.
    """
    directory = resolve(reference).directory
    if directory is None:
        raise UsageError(
            f"{reference} on vLLM",
            wanted="a checkpoint on disk",
            do="make one with `assay models random`, and pass its directory",
        )
    return directory


def identify(reference: str, dtype: str) -> Model:
    """Return a checkpoint's digest and shape as a :class:`Model` on the meta device: it proves, but cannot run.

    Raises:
        ModelError: the checkpoint cannot be read, or is not what assay reads.
    """
    source = resolve(reference)
    with torch.device("meta"):
        module = build(source.config, getattr(torch, dtype))
    digest = digest_tensors(list_tensors(checkpoint_directory(reference)))
    return Model(module, None, source.reference, digest, "trained")
