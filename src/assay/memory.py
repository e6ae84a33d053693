"""The heap of a process that runs a model on the CPU, where the C library is glibc."""

import ctypes

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
