"""Whether a batch fits, asked before it runs: a CPU that runs out kills the process instead of raising."""

import psutil
import torch

from assay.errors import OutOfMemory
from assay.models import Model

__all__ = ["check_fits", "peak_bytes"]

# Live at once at the widest point of a layer: residual, normed input, two MLP branches and their
# product, q, k, v and the attention output. Measured peaks stay under this.
_HIDDEN_COPIES = 8
_WIDE_COPIES = 3


def peak_bytes(model: Model, batch_size: int, seq_len: int) -> int:
    """Estimate the peak of the activations of one batch, in bytes."""
    config = model.module.config
    wide = max(int(getattr(config, "intermediate_size", 0) or 0), 4 * model.hidden_size)
    per_position = _HIDDEN_COPIES * model.hidden_size + _WIDE_COPIES * wide
    return batch_size * seq_len * per_position * max(model.dtype.itemsize, 2)


def free_bytes(device: torch.device) -> int:
    """Return the memory that is free on the device, in bytes."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


def check_fits(model: Model, batch_size: int, seq_len: int) -> None:
    """Refuse a batch that would not fit.

    Raises:
        OutOfMemory: names the largest batch that would fit.
    """
    free = free_bytes(model.device)
    need = peak_bytes(model, batch_size, seq_len)
    if need <= free:
        return
    fits = free // max(1, peak_bytes(model, 1, seq_len))
    gib = 2**30
    raise OutOfMemory(
        f"a batch of {batch_size} × {seq_len} positions takes about {need / gib:.1f} GiB of {free / gib:.1f} free",
        wanted="a batch that fits into memory",
        do=f"pass --batch-size {fits}" if fits else f"pass a shorter --seq-len than {seq_len}",
    )
