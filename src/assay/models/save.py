"""Writing a random-weight checkpoint that any tool can load."""

import tempfile
from pathlib import Path

from safetensors import SafetensorError

from assay.errors import StorageError, UsageError
from assay.models.load import load_model
from assay.models.quiet import quiet


def save_random(
    reference: str | Path, path: str | Path, *, weights: str, block_hash: str | None = None, dtype: str | None = None
) -> Path:
    """Make the random-weight variant of a model, write it as a checkpoint directory and return its path.

    The directory is written under a temporary name and renamed at the end, so ``path`` is whole or absent. It includes
    the tokenizer, if there is one. Loaded again, the weights are the same bits and the digest is that of the tensors.

    Args:
        reference: Reference of :func:`load_model`.
        path: Directory to make; it must not exist.
        weights: Mode, ``"random-all"`` or ``"random-embed"``.
        block_hash: Block hash; a shape has a default.
        dtype: Dtype to store; None as for :func:`load_model`.

    Raises:
        UsageError: ``weights`` is not a random mode, or ``path`` exists.
        StorageError: The directory cannot be written.
        ModelError: The model cannot be loaded; :func:`load_model` lists the kinds.
    """
    target = Path(path)
    if weights == "trained":
        raise UsageError("weights='trained'", wanted="random-all or random-embed", do="copy the directory instead")
    if target.exists():
        raise UsageError(f"{target} exists", wanted="a new directory", do="choose another path or remove it")
    model = load_model(reference, dtype=dtype, device="cpu", weights=weights, block_hash=block_hash)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        beside = tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent, ignore_cleanup_errors=True)
        with beside as temporary, quiet():
            model.module.save_pretrained(temporary)
            if model.tokenizer is not None:
                model.tokenizer.save_pretrained(temporary)
            Path(temporary).chmod(0o755)
            Path(temporary).rename(target)
    except (OSError, SafetensorError) as error:
        raise StorageError(
            f"{target} cannot be written: {error}", wanted="room and permission", do="try elsewhere"
        ) from error
    return target
