"""The ways to isolate a program, and which of them this machine has.

Landlock is for machines without bubblewrap or without user namespaces: a part of the kernel by
which a process gives up access to files, without any privilege. The filter of system calls does the
rest. What is weaker than with bubblewrap: a program learns whether a path exists, its size, times
and owner, and where a link points; a user's other processes share its process numbers; and its
directory is on disk, see `assay.vhack.environment.scratch`.
"""

import platform
from functools import cache
from pathlib import Path

from assay.errors import BackendUnavailable, check_choice
from assay.vhack.environment import bubblewrap, confinement, visible
from assay.vhack.environment.server import server
from assay.vhack.environment.system_calls import ARCHITECTURES

BACKENDS = ("bwrap", "landlock")
"""The best first: what works and comes first is used."""

UNSANDBOXED = "unsandboxed"


@cache
def unusable(backend: str) -> str:
    """Return why a backend cannot be used here, or an empty text where it can."""
    if platform.machine() not in ARCHITECTURES:
        return f"there is no filter of system calls for {platform.machine()}"
    if backend == "bwrap":
        return _exposed() or bubblewrap.unusable()
    if not (version := confinement.landlock_version()):
        return "this kernel has no Landlock, or it is not switched on"
    if version < confinement.MINIMUM_LANDLOCK:
        return (
            f"Landlock has version {version} here, and version {confinement.MINIMUM_LANDLOCK} "
            "(Linux 6.2) is needed"
        )
    return "" if server(backend) else "Landlock does not hold a trial program here"


def _exposed() -> str:
    """Return where this package lies if bubblewrap shows it, for it has the answers to the
    tasks.
    """
    package = Path(__file__).resolve()
    shown = any(map(package.is_relative_to, visible.shown()))
    hidden = any(map(package.is_relative_to, visible.hidden()))
    if shown and not hidden:
        return f"assay lies in {package.parents[3]}, which bubblewrap has to show"
    return ""


def available_backend() -> str | None:
    """Return ``bwrap``, ``landlock``, or None where this machine cannot isolate a program."""
    return next((backend for backend in BACKENDS if not unusable(backend)), None)


def choose_backend(backend: str | None = None, *, allow_unsandboxed: bool = False) -> str:
    """Return the backend to use: the named one, or the best that works here.

    Raises:
        BackendUnavailable: It does not work here, or none does and ``allow_unsandboxed`` is not
            set.
        UsageError: There is no backend of that name.
    """
    if backend is None:
        backend = available_backend() or UNSANDBOXED
    check_choice("backend", backend, (*BACKENDS, UNSANDBOXED))
    reason = "" if backend == UNSANDBOXED else unusable(backend)
    if backend == UNSANDBOXED and not allow_unsandboxed:
        reason = "; ".join(
            ["no sandbox for programs of a model", *filter(None, map(unusable, BACKENDS))]
        )
    if reason:
        raise BackendUnavailable(
            reason,
            wanted="a sandbox for programs that no one has read",
            do="install bubblewrap where user namespaces are allowed, or use Linux 6.2 or newer "
            "with Landlock, and keep assay in site-packages; "
            "allow_unsandboxed (--allow-unsandboxed) accepts the risk",
        )
    return backend
