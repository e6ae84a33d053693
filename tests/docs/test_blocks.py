"""Blocks of the pages that a new user follows run in the order in which they are met, and print what is shown.

`make release-check` runs them in a fresh checkout, with the lines that make or install something, left out here.
"""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs.shell import ROOT, run
from tests.end_to_end.server import free_port

sys.path.insert(0, str(ROOT / "scripts"))

import page_blocks

FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
INSTALLS = ("make ", "pip ", "python3 -m venv")  # in a checkout of symbolic links they would change the real one


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder with everything of the checkout, in which commands write without touching it."""
    listed = ["git", "ls-tree", "--name-only", "HEAD"]
    names = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in (*names.split(), ".venv"):
        (tmp_path / name).symlink_to(ROOT / name)
    return tmp_path


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(not (ROOT / ".venv/.ready").exists(), reason="runs in the environment of `make setup`")
def test_the_readme(checkout: Path):
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    port = free_port()
    script = page_blocks.script(page, leave_out=INSTALLS).replace("127.0.0.1:8000", f"127.0.0.1:{port}")
    done = run(script, checkout, ASSAY_PORT=str(port))
    assert done.returncode == 0, done.stderr
    (shown,) = (text for language, text in FENCED.findall(page) if not language)
    assert shown in done.stdout
    assert '"status":"OK"' in done.stdout  # of the request to the service
    for name in ("proof.jsonl", "data/service.sqlite3", "hack.safetensors", "check.html"):
        assert (checkout / name).is_file(), name


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_tutorial(tmp_path: Path):
    done = run(page_blocks.script((ROOT / "docs/tutorial.md").read_text(encoding="utf-8")), tmp_path)
    assert done.returncode == 0, done.stderr
    assert "honest" in done.stdout


def test_a_block_that_fails_ends_the_run(tmp_path: Path):
    page = "```python\n# mine.py\nx = 1\n```\n```python\nimport mine\n```\n```python\nprint(mine.x)\n```\n"
    done = run(page_blocks.script(page + "```sh\na=2\n```\ntext\n```sh\necho $a\nfalse\necho 3\n```\n"), tmp_path)
    assert (done.returncode, done.stdout) == (1, "1\n2\n")
    assert run(page_blocks.script("```python\n1 / 0\n```\n"), tmp_path).returncode == 1
    assert run(page_blocks.script("```sh\nmake it\n```\n", leave_out=("make it",)), tmp_path).returncode == 0


def test_links_lead_somewhere():
    for page in (ROOT / "README.md", *(ROOT / "docs").rglob("*.md")):
        for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            if not target.startswith(("http://", "https://")):
                assert (page.parent / target).exists(), f"{page.name}: {target}"
