"""Where a result comes from: versions, commit and machine, without names of hosts or paths."""

import os
import platform
import subprocess
import sys
from functools import cache
from importlib import metadata
from pathlib import Path

_PACKAGES = ("assay", "numpy", "scipy", "torch", "transformers", "triton")
_GIT_SECONDS = 5


def provenance() -> dict[str, object]:
    """Return what a reader needs to repeat a measurement.

    Returns:
        ``versions`` of Python and the packages that are installed, ``commit`` and ``dirty`` (None
        outside a checkout), ``platform``, ``cpu`` (model), ``cores`` (those this process may use)
        and ``gpu`` (name; None unless torch is already imported and sees one). No host name and no
        path.
    """
    return {
        "versions": {"python": platform.python_version(), **_versions()},
        **checkout(),
        "platform": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "gpu": _gpu_name(),
    }


@cache
def _versions() -> dict[str, str]:
    versions = {}
    for name in _PACKAGES:
        # The first distribution of a name is the one that is imported.
        for distribution in [*metadata.distributions(name=name)][:1]:
            versions[name] = distribution.version
    return versions


def checkout(file: Path = Path(__file__)) -> dict[str, object]:
    """Return the ``commit`` of a file's checkout, and whether it is ``dirty``.

    Both are None for a file that git does not know: a package installed inside some other checkout
    would report that one's commit.
    """
    if _git(file.parent, "ls-files", "--error-unmatch", file.name) is None:
        return {"commit": None, "dirty": None}
    changes = _git(file.parent, "status", "--porcelain", "--untracked-files=no")
    return {
        "commit": _git(file.parent, "rev-parse", "HEAD"),
        "dirty": None if changes is None else bool(changes),
    }


def _git(folder: Path, *arguments: str) -> str | None:
    """Return what git prints, or None where it fails."""
    try:
        process = subprocess.run(
            ["git", *arguments],
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=_GIT_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return process.stdout.strip() if process.returncode == 0 else None


@cache
def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(models, platform.processor() or platform.machine())


def _gpu_name() -> str | None:
    # Importing it here would cost seconds.
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return None
    return str(torch.cuda.get_device_name())
