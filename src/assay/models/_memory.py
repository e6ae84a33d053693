"""What a device has left for activations."""

import psutil
import torch

__all__ = ["free_bytes"]


def free_bytes(device: torch.device) -> int:
    """Return the memory that is free on the device for this process, in bytes; what torch keeps for itself counts."""
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + kept
    return int(psutil.virtual_memory().available)
