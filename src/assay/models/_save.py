"""Writing a random-weight checkpoint that any tool can load."""

import shutil
import tempfile
from pathlib import Path

from safetensors import SafetensorError

from assay.errors import StorageError, UsageError
from assay.models._load import load_model
from assay.models.quiet import quiet


def save_random(
    reference: str | Path, path: str | Path, *, weights: str, block_hash: str | None = None, dtype: str | None = None
) -> Path:
    """Make the random-weight variant of a model and write it as a checkpoint directory; returns its path.

    Written under a temporary name beside it and renamed at the end, so ``path`` is whole or absent. The tokenizer, if
    there is one, goes with it. Loaded again, the weights are the same bits; the digest is then that
    of the stored tensors.

    Args:
        reference: as for :func:`load_model`.
        path: the directory to make; it must not exist.
        weights: ``"random-all"`` or ``"random-embed"``.
        block_hash: the block; a shape has a default.
        dtype: the dtype to store; None as for :func:`load_model`.

    Raises:
        UsageError: ``weights`` is no random mode, or ``path`` exists.
        StorageError: the directory cannot be written.
        ModelError: as for :func:`load_model`.
    """
    target = Path(path)
    if weights == "trained":
        raise UsageError("weights='trained'", wanted="random-all or random-embed", do="copy the directory instead")
    if target.exists():
        raise UsageError(f"{target} exists", wanted="a new directory", do="choose another path or remove it")
    model = load_model(reference, dtype=dtype, device="cpu", weights=weights, block_hash=block_hash)
    temporary: Path | None = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
        with quiet():
            model.module.save_pretrained(temporary)
            if model.tokenizer is not None:
                model.tokenizer.save_pretrained(temporary)
        temporary.chmod(0o755)
        temporary.rename(target)
    except (OSError, SafetensorError) as error:
        raise StorageError(
            f"{target} cannot be written: {error}", wanted="room and permission", do="try elsewhere"
        ) from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
    return target
