"""Models with the δS of a file: attached, or merged into the weights."""

import os
from pathlib import Path
from typing import Any

from assay.errors import DataError, StorageError
from assay.files.storage import cache_folder, check_folder
from assay.models.load import load_model, save_checkpoint
from assay.models.model import Model
from assay.streams.arrays import dtype_name
from assay.vhack.directions.delta.adapter import DeltaS
from assay.vhack.directions.delta.delta_file import read_delta_lengths
from assay.vhack.directions.gradients.batches import Progress
from assay.vhack.directions.gradients.svd import weight_svd
from assay.vhack.directions.gradients.targets import target_modules


def user_cache(model: Model, asked: Path | None = None) -> Path | None:
    """Return the directory of decompositions: the one asked for, or on a CPU the user's cache.

    It is None where that cannot be written.
    """
    if asked is not None or model.device.type != "cpu":
        return asked
    try:
        folder = cache_folder()
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, StorageError):
        return None
    return folder if os.access(folder, os.W_OK) else None


def load_adapter(
    model: Model, path: Path, lengths: dict[str, int], *, progress: Progress | None = None
) -> DeltaS:
    """Return an adapter with the δS of a file, given :func:`read_delta_lengths` of it.

    Raises:
        DataError: The δS is of other modules.
    """
    modules = target_modules(model)
    if modules.keys() != lengths.keys():
        raise DataError(
            f"{path} has δS of other modules", wanted="those of this model", do="correct --model"
        )
    is_cut = any(length < min(modules[name].weight.shape) for name, length in lengths.items())
    rank = max(lengths.values()) if is_cut else None
    adapter = DeltaS(
        model,
        weight_svd(model, rank=rank, cache=user_cache(model), min_coverage=0.0, progress=progress),
    )
    adapter.load(path)
    return adapter


def write_merged(
    folder: Path,
    reference: str,
    path: Path,
    *,
    overwrite: bool = False,
    dtype: str | None = None,
    device: str | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write a model with the δS of a file in its weights, and return what was written.

    Raises:
        UsageError: The directory is not empty, and ``overwrite`` is not set.
        DataError: The δS is of other modules.
        StorageError: The directory cannot be written.
    """
    check_folder(folder, new=not overwrite)
    lengths = read_delta_lengths(path)
    model = load_model(reference, dtype=dtype, device=device)
    adapter = load_adapter(model, path, lengths, progress=progress)
    save_checkpoint(adapter.merge(), model.tokenizer, folder)
    return {
        "path": str(folder),
        "model": model.reference,
        "modules": len(lengths),
        "form": "merged",
        "dtype": dtype_name(model.dtype),
    }
