"""Pages and tables that ``make docs`` writes are up to date."""

import inspect
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs.shell import PAGES

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

import reference  # noqa: E402

MOST_WORDS = 60_000
"""Words of the README and of the pages in docs that are written by hand, code included."""


@pytest.mark.parametrize("page", reference.PAGES)
def test_a_generated_page_is_up_to_date(page):
    """``make docs`` writes it."""
    assert (ROOT / "docs" / page).read_text(encoding="utf-8") == reference.PAGES[page]()


def test_the_code_says_something_of_every_public_name():
    silent = {
        (package.__name__, name)
        for package in reference.packages()
        for name in package.__all__
        if not inspect.ismodule(value := getattr(package, name))
        and not reference.said(package.__name__, name, value)
    }
    assert silent == {("assay", "__version__")}


def test_tables_are_those_of_the_results():
    pages = [path for path in PAGES.values() if "[[[cog" in path.read_text(encoding="utf-8")]
    assert {"experiments.md", "redteam.md", "vhack-experiments.md"} <= {path.name for path in pages}
    command = [
        sys.executable,
        "-m",
        "cogapp",
        "-P",
        "-I",
        "scripts",
        "-I",
        "research/scripts",
        "--check",
    ]
    done = subprocess.run(
        [*command, *map(str, pages)], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_pages_written_by_hand_are_short():
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    written = [page for page in pages if page.name not in reference.PAGES]
    words = sum(len(page.read_text(encoding="utf-8").split()) for page in written)
    assert len(written) > 25
    assert words <= MOST_WORDS
