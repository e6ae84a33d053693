"""Tables of the documentation are those of the results."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [path for path in sorted((ROOT / "docs").rglob("*.md")) if "[[[cog" in path.read_text(encoding="utf-8")]


def test_pages_have_generated_tables():
    assert {"experiments.md", "redteam.md", "statistics.md"} <= {path.name for path in PAGES}


def test_generated_tables_are_those_of_the_results():
    """``make docs`` writes them."""
    command = [sys.executable, "-m", "cogapp", "-P", "-I", "scripts", "-I", "research/scripts", "--check"]
    done = subprocess.run([*command, *map(str, PAGES)], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
