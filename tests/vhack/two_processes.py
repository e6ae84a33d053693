"""Two processes that do the same work: over gloo they compute on the CPU, over NCCL each on a GPU
of its own.
"""

import os
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing

needs_two = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="no two CUDA devices")
BACKENDS = ["gloo", pytest.param("nccl", marks=[pytest.mark.gpu, needs_two])]


def together(work, folder, backend, *arguments):
    """Return what ``work`` finds in two processes, given rank, device and arguments; if one fails,
    the other ends.

    They meet in the folder, and leave there what they found.
    """
    torch.multiprocessing.spawn(_join, (work, folder, backend, *arguments), nprocs=2)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]


def device_of(backend, rank=0):
    """The device of a process."""
    return torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")


def _join(rank, work, folder, backend, *arguments):
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    device = device_of(backend, rank)
    own = {}
    if backend == "nccl":
        torch.cuda.set_device(device)
        own = {"device_id": device}
    store = dist.FileStore(f"{folder}/store", 2)
    dist.init_process_group(
        backend, store=store, rank=rank, world_size=2, timeout=timedelta(seconds=200), **own
    )
    try:
        torch.save(work(rank, device, *arguments), folder / f"rank{rank}.pt")
    finally:
        dist.destroy_process_group()
