"""Devices: the one that a name stands for, what it is, and what it has left for activations."""

import platform
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import psutil
import torch
from numpy.typing import NDArray
from torch import Tensor

from assay.devices import DEVICE_NAME, check_device
from assay.errors import UsageError
from assay.memory import group_bytes, kept_bytes


def parse_device(name: str | torch.device | None) -> torch.device:
    """Return the device of a name: cpu, cuda or cuda:N; None is cuda where there is one, else cpu.

    Raises:
        UsageError: The name is not one of these.
        BackendUnavailable: The device is not there.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = str(name)
    if not DEVICE_NAME.fullmatch(name):
        raise UsageError(
            f"device={name!r}",
            wanted="cpu, cuda or cuda:N",
            do="choose one of them, or leave it out",
            field="device",
        )
    kind, _, index = name.partition(":")
    if kind == "cpu":
        return torch.device("cpu")
    check_device(name, torch.cuda.device_count())
    return torch.device("cuda", int(index)) if index else torch.device("cuda")


def free_bytes(device: torch.device) -> int:
    """Return the memory in bytes that this process may still take of a device.

    What torch's allocator reserves counts, and so does a limit that the process has set itself, or
    on a CPU its container.
    """
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        allocated = torch.cuda.memory_allocated(device)
        limit = int(total * torch.cuda.get_per_process_memory_fraction(device.index))
        return min(free + torch.cuda.memory_reserved(device), limit) - allocated
    return int(min(psutil.virtual_memory().available, group_bytes())) + kept_bytes()


def processor(device: torch.device) -> str:
    """Return the name of a CUDA device, or the CPU's architecture and vector instructions."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"


def current(device: torch.device) -> AbstractContextManager[object]:
    """Return a context in which a CUDA device is current: triton launches kernels there."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def to_device(values: Tensor | NDArray[Any] | Sequence[Any], device: torch.device) -> Tensor:
    """Copy values to a device without waiting for it."""
    tensor = torch.as_tensor(values)
    # Of unpinned memory from 64 KiB on, the host would wait.
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


@contextmanager
def one_thread() -> Iterator[int]:
    """Have torch use one thread, best for small matrices, and yield how many it had."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield threads
    finally:
        torch.set_num_threads(threads)
