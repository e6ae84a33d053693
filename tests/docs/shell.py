"""A shell in which blocks of pages run, with the commands of this environment and one thread."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run(text: str, place: Path, **variables: str) -> "subprocess.CompletedProcess[str]":
    """Run a script in a folder, and return what became of it."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "OMP_NUM_THREADS": "1"} | variables
    command = ["bash", "-c", text]
    return subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, check=False)
