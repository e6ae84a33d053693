"""Which checkpoint a reference names, as proofs name it, for engines that load weights themselves."""

from pathlib import Path

import torch

from assay.errors import UsageError
from assay.models._checkpoint import digest_tensors, list_tensors
from assay.models._random import build
from assay.models._resolve import resolve
from assay.models._types import Model
from assay.streams import torch_dtype

__all__ = ["checkpoint_directory", "identify"]


def checkpoint_directory(reference: str | Path) -> Path:
    """Return the directory that holds the checkpoint of a reference; a hub id is fetched.

    Raises:
        UsageError: a shape, which has no directory.
        ModelNotFound: there is no such model.
    """
    directory = resolve(reference).directory
    if directory is None:
        raise UsageError(
            f"{reference}, which has no checkpoint",
            wanted="a checkpoint on disk",
            do="make one with `assay models random`, and pass its directory",
        )
    return directory


def identify(reference: str | Path, *, dtype: str) -> Model:
    """Return digest and shape of a checkpoint as a model on the meta device: it names a proof, but cannot run.

    Args:
        reference: as for :func:`load_model`, but no shape.
        dtype: the dtype in which an engine runs the model, for example ``"bfloat16"``.

    Raises:
        UsageError: a shape, which has no checkpoint.
        ModelNotFound: there is no such model.
        BadWeights: weights are corrupt or not finite.
        ModelError: the configuration cannot be used.
    """
    source, directory = resolve(reference), checkpoint_directory(reference)
    with torch.device("meta"):
        module = build(source.config, torch_dtype(dtype))
    return Model(module, None, source.reference, digest_tensors(list_tensors(directory)), "trained")
