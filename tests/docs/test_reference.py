"""docs/configuration.md and docs/api.md are what ``make docs`` writes."""

import inspect
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

import reference  # noqa: E402


@pytest.mark.parametrize("page", reference.PAGES)
def test_a_generated_page_is_up_to_date(page: str):
    """``make docs`` writes it."""
    assert (ROOT / "docs" / page).read_text(encoding="utf-8") == reference.PAGES[page]()


def test_the_code_says_something_of_every_public_name():
    silent = {
        (package.__name__, name)
        for package in reference.packages()
        for name in package.__all__
        if not inspect.ismodule(value := getattr(package, name)) and not reference.said(package.__name__, name, value)
    }
    assert silent == {("assay", "__version__")}
