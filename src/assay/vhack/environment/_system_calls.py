"""The system calls that a program in the sandbox may make, and the seccomp filter that holds it to them.

This is an allow list: whatever it does not name fails with EPERM. It holds what CPython and its standard library need
for one process that computes and keeps files in its own directory. It therefore leaves out making processes and
threads, sockets, signals (kill and its relatives), file locks, inotify, sync, mounts and listing them, shared memory,
queues, keys, setting clocks, and everything that only an administrator may do.
"""

import struct
from functools import cache

from assay.errors import BackendUnavailable

ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
"""The machines that the table has numbers for, with the constant by which the kernel names each to a filter."""

# Name, number on x86_64, number on aarch64; a minus sign where that machine does not have the call.
_TABLE = """
read 0 63, write 1 64, readv 19 65, writev 20 66, pread64 17 67, pwrite64 18 68, preadv 295 69, pwritev 296 70
open 2 -, openat 257 56, creat 85 -, close 3 57, close_range 436 436, lseek 8 62, fsync 74 82, fdatasync 75 83
sendfile 40 71, copy_file_range 326 285, truncate 76 45, ftruncate 77 46
stat 4 -, lstat 6 -, fstat 5 80, newfstatat 262 79, statx 332 291, statfs 137 43, fstatfs 138 44
access 21 -, faccessat 269 48, faccessat2 439 439, getcwd 79 17, chdir 80 49, fchdir 81 50, getdents64 217 61
mkdir 83 -, mkdirat 258 34, rmdir 84 -, unlink 87 -, unlinkat 263 35
rename 82 -, renameat 264 38, renameat2 316 276, link 86 -, linkat 265 37
symlink 88 -, symlinkat 266 36, readlink 89 -, readlinkat 267 78
chmod 90 -, fchmod 91 52, fchmodat 268 53, fchmodat2 452 452, umask 95 166, utimensat 280 88
getxattr 191 8, lgetxattr 192 9, fgetxattr 193 10, listxattr 194 11, llistxattr 195 12, flistxattr 196 13
dup 32 23, dup2 33 -, dup3 292 24, pipe 22 -, pipe2 293 59, poll 7 -, ppoll 271 73, select 23 -, pselect6 270 72
mmap 9 222, mprotect 10 226, munmap 11 215, mremap 25 216, madvise 28 233, brk 12 214
rt_sigaction 13 134, rt_sigprocmask 14 135, rt_sigreturn 15 139, rt_sigpending 127 136, rt_sigsuspend 130 133
rt_sigtimedwait 128 137, sigaltstack 131 132, restart_syscall 219 128, pause 34 -
alarm 37 -, getitimer 36 102, setitimer 38 103, nanosleep 35 101, clock_nanosleep 230 115
clock_gettime 228 113, clock_getres 229 114, gettimeofday 96 169, time 201 -, times 100 153
getpid 39 172, getppid 110 173, gettid 186 178, getpgid 121 155, getpgrp 111 -, getsid 124 156
getuid 102 174, geteuid 107 175, getgid 104 176, getegid 108 177, getresuid 118 148, getresgid 120 150
getgroups 115 158, getrlimit 97 163, getrusage 98 165, sched_getaffinity 204 123, sched_yield 24 124
uname 63 160, getrandom 318 278, exit 60 93, exit_group 231 94
fcntl 72 25, ioctl 16 29, futex 202 98, prlimit64 302 261
"""

ALLOWED: dict[str, dict[str, int]] = {
    machine: {
        name: int(number)
        for name, *numbers in (entry.split() for line in _TABLE.strip().split("\n") for entry in line.split(","))
        if (number := numbers[column]) != "-"
    }
    for column, machine in enumerate(ARCHITECTURES)
}
"""The number of every permitted system call by machine and name."""

RESTRICTED: dict[str, tuple[int, tuple[int, ...]]] = {
    "fcntl": (1, (0, 1, 2, 3, 4, 1030)),  # duplicate, flags; not locks, leases, notification or the size of pipes
    "ioctl": (
        1,
        (0x5401, 0x802C542A, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451),
    ),  # terminal or not, flags, bytes waiting
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
    """Return the filter as the kernel takes it: instructions of classic BPF, eight bytes each.

    A call from another architecture kills the process. Calls newer than the table fail with ENOSYS, so that a newer C
    library falls back to an older call; all others that are not permitted fail with EPERM.

    Args:
        machine: A name in ``ARCHITECTURES``.

    Returns:
        Code (u16), jump if true (u8), jump if false (u8) and operand (u32) of every instruction, little-endian.

    Raises:
        BackendUnavailable: The table has no numbers for the machine.
    """
    if machine not in ARCHITECTURES:
        raise BackendUnavailable(
            f"no filter of system calls for {machine}", wanted=" or ".join(ARCHITECTURES), do="run it on such a machine"
        )
    program = [(_LOAD, 0, 0, _ARCHITECTURE), (_EQUAL, 1, 0, ARCHITECTURES[machine]), (_RETURN, 0, 0, _KILL)]
    program += [(_LOAD, 0, 0, _NUMBER), (_AT_LEAST, 0, 1, _X32), (_RETURN, 0, 0, _EPERM)]
    program += [(_ABOVE, 0, 1, _NEWEST), (_RETURN, 0, 0, _ENOSYS)]
    for name, number in ALLOWED[machine].items():
        permitted = [(_RETURN, 0, 0, _ALLOW)]
        if name in RESTRICTED:
            argument, values = RESTRICTED[name]
            # The kernel itself looks at the lower half of these arguments only.
            permitted = [(_LOAD, 0, 0, _ARGUMENTS + 8 * argument)]
            permitted += [step for value in values for step in ((_EQUAL, 0, 1, value), (_RETURN, 0, 0, _ALLOW))]
            permitted += [(_RETURN, 0, 0, _EPERM)]
        program += [(_EQUAL, 0, len(permitted), number), *permitted]
    program += [(_RETURN, 0, 0, _EPERM)]
    return b"".join(struct.pack("<HBBI", *step) for step in program)
