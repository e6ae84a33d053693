"""The heap of a process that runs a model on the CPU. Other C libraries than glibc are left as they
are.
"""

import ctypes

_LIBC = ctypes.CDLL(None)
# Options of mallopt(3): never trim the heap, no mapping of its own for any size, and one heap for
# all threads.
_KEEP = {-1: 2**31 - 1, -4: 0, -8: 1}


def keep_freed_memory() -> None:
    """Keep the memory that tensors leave, so that the next ones do not fault every page in again.

    Gain on two cores: `prove` of the bundled model is 1.26 times as fast as at 8580455f, which had
    pages faulted in again (two_commits_cpu.json). A thread that has a heap of its own by now keeps
    that, so the command line calls this before it imports torch.
    """
    if hasattr(_LIBC, "mallopt"):
        for option, value in _KEEP.items():
            _LIBC.mallopt(option, value)


class _HeapInfo(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in (*"abcdefgh", "free", "top")]  # of mallinfo2(3)


def kept_bytes() -> int:
    """Return how much of the heap is free for the next tensors, in bytes."""
    if not hasattr(_LIBC, "mallinfo2"):
        return 0
    _LIBC.mallinfo2.restype = _HeapInfo
    return int(_LIBC.mallinfo2().free)
