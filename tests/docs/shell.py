"""Blocks of pages as scripts, and a shell for them with the commands of this environment and one thread."""

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from tests.end_to_end.server import free_port

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

import page_blocks  # noqa: E402

PORTS = ("8000", "8081", "8090")


def run(text: str, place: Path, **variables: str) -> "subprocess.CompletedProcess[str]":
    """Run a script in a folder, and return what became of it."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "OMP_NUM_THREADS": "1"} | variables
    command = ["bash", "-c", text]
    return subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, check=False)


def page(name: str) -> str:
    return (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8")


def script(name: str, *, before: str = "", instead: Mapping[str, str] = {}, leave_out: tuple[str, ...] = ()) -> str:
    """Return the blocks of a page as a script that begins with other lines, and has other words in some places."""
    text = page_blocks.script(page(name), leave_out=leave_out)
    for word, other in instead.items():
        assert word in text, word
        text = text.replace(word, other)
    head = page_blocks.HEAD
    return head + before + text.removeprefix(head)


def held(text: str, place: Path) -> str:
    """Run a script on free ports, and return what it printed, which must have no refusal in it."""
    ports = {known: str(free_port()) for known in PORTS}
    for known, free in ports.items():
        text = text.replace(f"127.0.0.1:{known}", f"127.0.0.1:{free}").replace(f"--port {known}", f"--port {free}")
    port = ports["8090" if "assay poc validator" in text else "8000"]
    done = run(text, place, ASSAY_PORT=port, KEY="k" * 20)
    assert done.returncode == 0, done.stderr
    assert '"wanted"' not in done.stdout
    return done.stdout
