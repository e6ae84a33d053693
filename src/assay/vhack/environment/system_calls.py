"""The filter of system calls, as classic BPF.

The table system_calls.csv is an allow list: whatever it does not name fails with EPERM. It holds
what CPython and its standard library need for one process that computes and keeps files in its
own directory.
"""

import csv
import struct
from collections.abc import Collection
from functools import cache
from pathlib import Path

from assay.errors import BackendUnavailable

ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
"""The machines that the table has numbers for, with the constant by which the kernel names each to
a filter.
"""

with Path(__file__).with_name("system_calls.csv").open(encoding="utf-8") as _file:
    _ROWS = list(csv.DictReader(_file))
ALLOWED = {
    machine: {row["name"]: int(row[machine]) for row in _ROWS if row[machine]}
    for machine in ARCHITECTURES
}
"""The number of every permitted system call by machine and name; the table has no number where a
machine lacks it.
"""

RESTRICTED: dict[str, tuple[int, tuple[int, ...]]] = {
    # Duplicates and flags; not locks, leases, notifications or the size of pipes.
    "fcntl": (1, (0, 1, 2, 3, 4, 1030)),
    # Whether it is a terminal, its size, flags, and how many bytes wait.
    "ioctl": (1, (0x5401, 0x802C542A, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)),
    # Private ones only: others meet in files that two jobs can map.
    "futex": (1, (128, 129, 137, 138, 393)),
    # Not those that push pages of shared files out of memory.
    "madvise": (2, (0, 1, 2, 3, 4, 8, 14, 15)),
    "prlimit64": (0, (0,)),  # its own limits, which it cannot raise
}
"""Calls that are permitted for some values of one argument: the position of the argument, and the
values.
"""

METADATA = frozenset({"chmod", "fchmod", "fchmodat", "fchmodat2", "utimensat"}) | frozenset(
    start + "xattr" for start in ("get", "lget", "fget", "list", "llist", "flist")
)
"""Calls that reach any file of the user by its path, for Landlock does not look at them."""

_NEWEST = 452
# Numbers from here on are the x32 variants of the calls of x86_64.
_X32 = 0x40000000
_LOAD = 0x20
_EQUAL = 0x15
_ABOVE = 0x25
_AT_LEAST = 0x35
_RETURN = 0x06
_ALLOW = (_RETURN, 0, 0, 0x7FFF0000)
_EPERM = (_RETURN, 0, 0, 0x00050001)
_ENOSYS = (_RETURN, 0, 0, 0x00050026)
_KILL = (_RETURN, 0, 0, 0x80000000)
_NUMBER = 0
_ARCHITECTURE = 4
_ARGUMENTS = 16  # offsets in the kernel's struct seccomp_data


@cache
def seccomp_filter(machine: str, *, without: Collection[str] = ()) -> bytes:
    """Return the filter for a name in ``ARCHITECTURES`` as instructions of classic BPF.

    A call from another architecture kills the process. Calls newer than the table fail with ENOSYS,
    so that a newer C library falls back to an older call; all others that are not permitted fail
    with EPERM. Every instruction has eight bytes: code (u16), jump if true (u8), jump if false (u8)
    and operand (u32), little-endian. ``without`` names calls of the table that are refused too.
    """
    if machine not in ARCHITECTURES:
        raise BackendUnavailable(
            f"no filter of system calls for {machine}",
            wanted=" or ".join(ARCHITECTURES),
            do="run it on such a machine",
        )
    program = [
        *((_LOAD, 0, 0, _ARCHITECTURE), (_EQUAL, 1, 0, ARCHITECTURES[machine]), _KILL),
        *((_LOAD, 0, 0, _NUMBER), (_AT_LEAST, 0, 1, _X32), _EPERM),
        *((_ABOVE, 0, 1, _NEWEST), _ENOSYS),
    ]
    for name, number in ALLOWED[machine].items():
        if name in without:
            continue
        permitted = [_ALLOW]
        if name in RESTRICTED:
            argument, values = RESTRICTED[name]
            # The kernel itself looks at the lower half of these arguments only.
            permitted = [(_LOAD, 0, 0, _ARGUMENTS + 8 * argument)]
            for value in values:
                permitted += [(_EQUAL, 0, 1, value), _ALLOW]
            permitted.append(_EPERM)
        program += [(_EQUAL, 0, len(permitted), number), *permitted]
    return b"".join(struct.pack("<HBBI", *step) for step in (*program, _EPERM))
