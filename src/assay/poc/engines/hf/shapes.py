"""The shapes of batches that a model runs, and the memory that they take.

Whether a batch fits is asked before it runs: a CPU that runs out of memory kills the process
instead of raising.
"""

from typing import Any

import torch

from assay.errors import OutOfMemory
from assay.models.catalogue import ModelInfo
from assay.models.decoder import mlp_width
from assay.models.device import free_bytes
from assay.models.model import Model
from assay.models.precision import is_wide
from assay.poc.protocol.checks import check_batch_size, check_positions

# Live at once at the widest point of a layer: residual, normed input, two MLP branches and their
# product, q, k, v and the attention output. Measured peaks stay under this.
_HIDDEN_COPIES = 8
_WIDE_COPIES = 3

# Positions of a batch from which on more of them are not faster, measured (docs/gpu.md); a CPU is
# filled by fewer.
_ENOUGH_POSITIONS = {"cuda": 32_768, "cpu": 8_192}


def check_shape(model: Model | ModelInfo, *, batch_size: int, seq_len: int, steps: int = 0) -> None:
    """Refuse a batch size or length that no engine runs, for a model or its facts.

    Raises:
        UsageError: The batch is out of range, or prompt and decoded steps have no position or more
            than the model.
    """
    check_batch_size(batch_size)
    check_positions(model.reference, model.max_positions, seq_len=seq_len, steps=steps)


def peak_bytes(model: Model, batch_size: int, seq_len: int) -> int:
    """Estimate the peak of the activations of one batch, in bytes."""
    config = model.config
    # A row for each expert of a position.
    chosen = int(getattr(config, "num_experts_per_tok", 0) or 0)
    wide = max(mlp_width(config), 4 * model.hidden_size, chosen * model.hidden_size)
    per_position = _HIDDEN_COPIES * model.hidden_size + _WIDE_COPIES * wide
    return batch_size * seq_len * per_position * max(model.dtype.itemsize, 2)


def fitting_batch(model: Model, seq_len: int) -> int:
    """Return the largest batch that fits into free memory, as estimated; 0 if none fits."""
    return _room(model) // max(1, peak_bytes(model, 1, seq_len))


def _room(model: Model) -> int:
    """Return the bytes that the activations of a batch may take."""
    if not is_wide(model.device, model.dtype):
        return _free(model.device)
    # Each weight in its turn is there in float32 as well.
    largest = max(part.numel() for part in model.module.parameters())
    return max(0, _free(model.device) - torch.float32.itemsize * largest)


def _free(device: torch.device) -> int:
    """Return the bytes that a batch may take: what is free, less what recorded CUDA graphs keep for
    their replay.

    Torch has reserved that for them and nothing is in it between two replays, so it looks free and
    is not.
    """
    if device.type != "cuda":
        return free_bytes(device)
    index = torch.cuda.current_device() if device.index is None else device.index
    segments: list[dict[str, Any]] = torch.cuda.memory_snapshot()  # type: ignore[no-untyped-call]
    segments_kept = (
        s
        for s in segments
        if s["device"] == index and tuple(s.get("segment_pool_id", (0, 0))) != (0, 0)
    )
    return free_bytes(device) - sum(
        int(segment["total_size"]) - int(segment["allocated_size"]) for segment in segments_kept
    )


def auto_batch(model: Model, seq_len: int) -> int:
    """Return the largest useful power of two that fits into half of a device's free memory.

    A sequence that is too long for that gets a batch of one, and :func:`check_fits` has the last
    word.
    """
    most = min(_ENOUGH_POSITIONS[model.device.type] // seq_len, fitting_batch(model, seq_len) // 2)
    return 1 << max(0, most.bit_length() - 1)


def check_fits(model: Model, batch_size: int, seq_len: int) -> None:
    """Refuse a batch that would not fit, and name the largest one that would."""
    free = _room(model)
    need = peak_bytes(model, batch_size, seq_len)
    if need <= free:
        return
    fits = fitting_batch(model, seq_len)
    gib = 2**30
    do = f"pass --batch-size {fits}" if fits else f"pass a shorter --seq-len than {seq_len}"
    raise OutOfMemory(
        f"a batch of {batch_size} × {seq_len} positions takes about {need / gib:.1f} GiB of "
        f"{free / gib:.1f} free",
        wanted="a batch that fits into memory",
        do=do,
    )
