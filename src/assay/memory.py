"""The memory of a process that runs a model on the CPU: its container's, and its heap in glibc."""

import ctypes
import math
from pathlib import Path

GROUP = Path("/sys/fs/cgroup")
"""Where a container sees its own control group, of version 2."""

_LIBC = ctypes.CDLL(None)
# Options of mallopt(3), by their numbers in malloc.h: never trim the heap (M_TRIM_THRESHOLD), no
# mapping of its own for any size (M_MMAP_MAX), and one heap for all threads (M_ARENA_MAX).
_OPTIONS = {-1: 2**31 - 1, -4: 0, -8: 1}


def keep_freed_memory() -> None:
    """Keep freed memory in the heap, so that new tensors do not fault every page in again.

    Gain on two cores: `prove` of the bundled model is 1.26 times as fast as at 8580455f, which
    returned freed memory to the system (two_commits_cpu.json). A thread that has a heap of its own
    keeps it, so the command line calls this before it imports torch.
    """
    if hasattr(_LIBC, "mallopt"):
        for option, value in _OPTIONS.items():
            _LIBC.mallopt(option, value)


class _HeapInfo(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in (*"abcdefgh", "free", "top")]  # of mallinfo2(3)


def kept_bytes() -> int:
    """Return the free bytes of the heap, which new tensors can use."""
    if not hasattr(_LIBC, "mallinfo2"):
        return 0
    _LIBC.mallinfo2.restype = _HeapInfo
    return int(_LIBC.mallinfo2().free)


def group_bytes() -> float:
    """Return the bytes that the container of this process has left; infinite without a limit.

    Pages of files count as left: they are given back before a process is killed.
    """
    try:
        most, used = (int((GROUP / f"memory.{name}").read_text()) for name in ("max", "current"))
        words = (GROUP / "memory.stat").read_text().split()
    except (OSError, ValueError):  # no such group, or "max"
        return math.inf
    counts = dict(zip(words[::2], map(int, words[1::2]), strict=True))
    return most - used + counts["active_file"] + counts["inactive_file"]
