"""The heap of a process that runs a model on the CPU. Other C libraries than glibc are left as they are."""

import ctypes

_LIBC = ctypes.CDLL(None)
# Options of mallopt(3): never trim the heap, no mapping of its own for any size, and one heap for all threads.
_KEEP = {-1: 2**31 - 1, -4: 0, -8: 1}


def keep_freed_memory() -> None:
    """Keep the memory that tensors leave, so that the next ones do not fault every page in again.

    Gain on two cores: `prove` 1.26 times as fast on the bundled model and 1.15 on SmolLM2 (two_commits_cpu.json).
    A thread that has a heap of its own by now keeps that, so the command line calls this before it imports torch.
    """
    if hasattr(_LIBC, "mallopt"):
        for option, value in _KEEP.items():
            _LIBC.mallopt(option, value)


def return_freed_memory() -> None:
    """Return what was kept and is not used."""
    if hasattr(_LIBC, "malloc_trim"):
        _LIBC.malloc_trim(0)
