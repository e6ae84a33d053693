import platform
import re
import struct
from pathlib import Path

import pytest

from assay.errors import BackendUnavailable
from assay.vhack.environment import backends
from assay.vhack.environment.system_calls import (
    ALLOWED,
    ARCHITECTURES,
    RESTRICTED,
    seccomp_filter,
)
from tests.wordings import refuses

HEADERS = {
    "x86_64": Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h"),
    "aarch64": Path("/usr/include/asm-generic/unistd.h"),
}
NEWER = {"fchmodat2": 452}  # than the headers of some distributions
FORBIDDEN = (
    *(
        "kill",
        "tkill",
        "tgkill",
        "rt_sigqueueinfo",
        "rt_tgsigqueueinfo",
        "pidfd_send_signal",
        "ptrace",
        "prctl",
    ),
    *(
        "clone",
        "clone3",
        "fork",
        "vfork",
        "execve",
        "execveat",
        "unshare",
        "setns",
        "seccomp",
        "wait4",
        "setsid",
    ),
    *(
        "socket",
        "socketpair",
        "connect",
        "bind",
        "flock",
        "inotify_init1",
        "fanotify_init",
        "sync",
        "syncfs",
    ),
    *(
        "mount",
        "umount2",
        "pivot_root",
        "chroot",
        "statmount",
        "listmount",
        "fsopen",
        "mknod",
        "mknodat",
    ),
    *(
        "shmget",
        "mq_open",
        "add_key",
        "keyctl",
        "bpf",
        "io_uring_setup",
        "userfaultfd",
        "memfd_create",
        "setrlimit",
    ),
)


@pytest.mark.parametrize("machine", ARCHITECTURES)
def test_the_numbers_are_those_of_the_kernel(machine):
    if not HEADERS[machine].exists():
        pytest.skip("no kernel headers")
    defined = {
        name: int(number)
        for name, number in re.findall(
            r"#define __NR(?:3264)?_(\w+)\s+(\d+)\b", HEADERS[machine].read_text()
        )
    }
    defined = NEWER | {"newfstatat": defined.get("fstatat", 0)} | defined
    assert {name: defined[name] for name in ALLOWED[machine]} == ALLOWED[machine]


@pytest.mark.parametrize("machine", ARCHITECTURES)
def test_what_reaches_beyond_the_process_is_not_permitted(machine):
    assert not set(FORBIDDEN) & set(ALLOWED[machine])
    assert set(RESTRICTED) <= set(ALLOWED[machine])


def verdict(machine, number, *arguments, architecture=None):
    """What the kernel would do with a call, by running the filter as it does."""
    lower = {0: number, 4: architecture or ARCHITECTURES[machine]}
    lower |= {16 + 8 * index: value for index, value in enumerate(arguments)}
    steps = list(struct.iter_unpack("<HBBI", seccomp_filter(machine)))
    at = 0
    loaded = None
    while True:
        code, yes, no, operand = steps[at]
        at += 1
        if code == 0x06:
            return operand
        if code == 0x20:
            loaded = lower[operand]
        else:
            at += (
                yes
                if {0x15: loaded == operand, 0x25: loaded > operand, 0x35: loaded >= operand}[code]
                else no
            )


@pytest.mark.parametrize("machine", ARCHITECTURES)
def test_the_filter_permits_the_table_and_nothing_else(machine):
    allow = 0x7FFF0000
    refuse = 0x00050001
    unknown = 0x00050026
    kill = 0x80000000
    permitted = {number for number in range(600) if verdict(machine, number, 0, 0, 0) == allow}
    futex = ALLOWED[machine]["futex"]
    fcntl = ALLOWED[machine]["fcntl"]
    assert permitted == set(ALLOWED[machine].values()) - {futex, ALLOWED[machine]["ioctl"]}
    assert [verdict(machine, fcntl, 3, command) for command in (1, 6, 7, 1026, 1031)] == [allow] + [
        refuse
    ] * 4
    assert [verdict(machine, futex, 0, operation) for operation in (1, 129)] == [refuse, allow]
    assert [verdict(machine, ALLOWED[machine]["prlimit64"], process) for process in (0, 7)] == [
        allow,
        refuse,
    ]
    assert verdict(machine, 457) == unknown
    assert verdict(machine, 0x40000000) == refuse
    assert verdict(machine, 0, architecture=0x40000003) == kill


def test_a_machine_without_a_table_has_no_sandbox(monkeypatch):
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    with refuses(BackendUnavailable, "a machine without a table has no sandbox"):
        seccomp_filter(platform.machine())
    backends.unusable.cache_clear()
    try:
        assert backends.available_backend() is None
    finally:
        backends.unusable.cache_clear()
