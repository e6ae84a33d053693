"""A trained δS from its file: as an adapter of a model, and written into the weights of the model or as LoRA."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from assay.errors import DataError, UsageError
from assay.files.storage import storage_error
from assay.models.load import Model, load_model
from assay.streams.backends import dtype_name
from assay.vhack.delta.delta import DeltaS
from assay.vhack.delta.file import read_delta_lengths
from assay.vhack.gradients.svd import weight_svd
from assay.vhack.gradients.targets import target_modules

Progress = Callable[[int, int], None]


def user_cache(model: Model, asked: Path | None = None) -> Path | None:
    """Return the directory of decompositions that was asked for, or on a CPU the user's, if it can be written."""
    if asked is not None or model.device.type != "cpu":
        return asked
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "assay"
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # a user without a home is a RuntimeError
        return None
    return folder if os.access(folder, os.W_OK) else None


def load_adapter(model: Model, path: Path, lengths: dict[str, int], *, progress: Progress | None = None) -> DeltaS:
    """Return an adapter of the model with the δS of a file.

    Args:
        model: Model for which the δS was trained.
        path: File of the δS.
        lengths: Number of coordinates of each module, as :func:`read_delta_lengths` reads them of the file.
        progress: Function that is called with (matrices decomposed, matrices in all).

    Raises:
        DataError: The δS is of other modules.
    """
    modules = target_modules(model)
    if modules.keys() != lengths.keys():
        raise DataError(f"{path} has δS of other modules", wanted="those of this model", do="correct --model")
    is_cut = any(length < min(modules[name].weight.shape) for name, length in lengths.items())
    rank = max(lengths.values()) if is_cut else None
    adapter = DeltaS(model, weight_svd(model, rank=rank, cache=user_cache(model), min_coverage=0.0, progress=progress))
    adapter.load(path)
    return adapter


def write_merged(
    folder: Path,
    reference: str,
    path: Path,
    *,
    lora: int | None = None,
    overwrite: bool = False,
    dtype: str | None = None,
    device: str | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write a model with the δS of a file merged into its weights, or the δS as LoRA; return what was written.

    Args:
        folder: Directory to write.
        reference: Model for which the δS was trained.
        path: File of the δS.
        lora: Rank of the LoRA; merged weights are written when None.
        overwrite: Whether the directory may hold files.
        dtype: Dtype of the weights.
        device: Device of the model.
        progress: Function that is called with (matrices decomposed, matrices in all).

    Raises:
        UsageError: The directory is not empty.
        DataError: The δS is of other modules.
        StorageError: The directory cannot be written.
    """
    if folder.exists() and not (folder.is_dir() and (overwrite or not any(folder.iterdir()))):
        raise UsageError(
            f"{folder}, which exists", wanted="a new or empty directory", do="choose another, or --overwrite"
        )
    lengths = read_delta_lengths(path)
    model = load_model(reference, dtype=dtype, device=device)
    adapter = load_adapter(model, path, lengths, progress=progress)
    values: dict[str, Any] = {"path": str(folder), "model": model.reference, "modules": len(lengths)}
    try:
        if lora is not None:
            made = adapter.save_lora(folder, lora)
            values |= {"form": "lora", "rank": made.rank, "relative_error": made.error}
            values |= {"worst_module": made.worst, "worst_error": made.errors[made.worst]}
        else:
            adapter.merge().save_pretrained(folder)
            values |= {"form": "merged", "dtype": dtype_name(model.dtype)}
        if model.tokenizer is not None:
            model.tokenizer.save_pretrained(folder)
    except OSError as error:
        raise storage_error(folder, error) from error
    return values
