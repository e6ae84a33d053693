"""The system calls that a program in the sandbox may make, and the seccomp filter that holds it to them.

The table ``system_calls.csv`` is an allow list: whatever it does not name fails with EPERM. It holds what CPython and
its standard library need for one process that computes and keeps files in its own directory. It therefore leaves out
making processes and threads, sockets, signals (kill and its relatives), file locks, inotify, sync, mounts and listing
them, shared memory, queues, keys, setting clocks, and everything that only an administrator may do.
"""

import csv
import struct
from functools import cache
from pathlib import Path

from assay.errors import BackendUnavailable

ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
"""The machines that the table has numbers for, with the constant by which the kernel names each to a filter."""

with Path(__file__).with_name("system_calls.csv").open(encoding="utf-8") as _file:
    _ROWS = list(csv.DictReader(_file))
ALLOWED = {machine: {row["name"]: int(row[machine]) for row in _ROWS if row[machine]} for machine in ARCHITECTURES}
"""The number of every permitted system call by machine and name; the table has no number where a machine lacks it."""

RESTRICTED: dict[str, tuple[int, tuple[int, ...]]] = {
    "fcntl": (1, (0, 1, 2, 3, 4, 1030)),  # duplicate, flags; not locks, leases, notification or the size of pipes
    # Whether it is a terminal, its size, flags, and how many bytes wait.
    "ioctl": (1, (0x5401, 0x802C542A, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)),
    "futex": (1, (128, 129, 137, 138, 393)),  # private ones only: others meet in files that two jobs can map
    "madvise": (2, (0, 1, 2, 3, 4, 8, 14, 15)),  # not those that push pages of shared files out of memory
    "prlimit64": (0, (0,)),  # its own limits, which it cannot raise
}
"""Calls that are permitted for some values of one argument: the position of the argument, and the values."""

_NEWEST = 452
_X32 = 0x40000000  # numbers from here on are the x32 variants of the calls of x86_64
_LOAD, _EQUAL, _ABOVE, _AT_LEAST, _RETURN = 0x20, 0x15, 0x25, 0x35, 0x06
_ALLOW, _EPERM, _ENOSYS, _KILL = 0x7FFF0000, 0x00050001, 0x00050026, 0x80000000
_NUMBER, _ARCHITECTURE, _ARGUMENTS = 0, 4, 16  # offsets in the kernel's struct seccomp_data


@cache
def seccomp_filter(machine: str) -> bytes:
    """Return the filter for a name in ``ARCHITECTURES`` as the kernel takes it: instructions of classic BPF.

    A call from another architecture kills the process. Calls newer than the table fail with ENOSYS, so that a newer C
    library falls back to an older call; all others that are not permitted fail with EPERM. Every instruction has eight
    bytes: code (u16), jump if true (u8), jump if false (u8) and operand (u32), little-endian.
    """
    if machine not in ARCHITECTURES:
        raise BackendUnavailable(
            f"no filter of system calls for {machine}",
            wanted=" or ".join(ARCHITECTURES),
            do="run it on such a machine",
        )
    allow, refuse = (_RETURN, 0, 0, _ALLOW), (_RETURN, 0, 0, _EPERM)
    program = [(_LOAD, 0, 0, _ARCHITECTURE), (_EQUAL, 1, 0, ARCHITECTURES[machine]), (_RETURN, 0, 0, _KILL)]
    program += [(_LOAD, 0, 0, _NUMBER), (_AT_LEAST, 0, 1, _X32), refuse]
    program += [(_ABOVE, 0, 1, _NEWEST), (_RETURN, 0, 0, _ENOSYS)]
    for name, number in ALLOWED[machine].items():
        permitted = [allow]
        if name in RESTRICTED:
            argument, values = RESTRICTED[name]
            # The kernel itself looks at the lower half of these arguments only.
            permitted = [(_LOAD, 0, 0, _ARGUMENTS + 8 * argument)]
            for value in values:
                permitted += [(_EQUAL, 0, 1, value), allow]
            permitted.append(refuse)
        program += [(_EQUAL, 0, len(permitted), number), *permitted]
    program.append(refuse)
    return b"".join(struct.pack("<HBBI", *step) for step in program)
