"""docs/configuration.md and docs/api.md are what ``make docs`` writes."""

import inspect
import sys
from functools import cached_property
from pathlib import Path

import pytest

from assay.poc.service import Settings

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


def test_every_public_method_of_a_public_class_says_what_it_does():
    """ruff asks for it in modules without an underscore; the classes are in those with one."""
    classes = {
        value
        for package in reference.packages()
        for name in package.__all__
        if inspect.isclass(value := getattr(package, name)) and value.__module__.startswith("assay.")
    }
    assert len(classes) > 200
    silent = [
        f"{kind.__module__}.{kind.__qualname__}.{name}"
        for kind in classes
        for name, member in vars(kind).items()
        if not name.startswith("_")
        and (inspect.isroutine(member) or isinstance(member, property | cached_property))
        and not inspect.getdoc(getattr(kind, name))
    ]
    assert not silent


def test_every_setting_and_every_name_is_on_its_page():
    text = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    for name in Settings.model_fields:
        assert f"`{name}`" in text or f"`--{name.replace('_', '-')}`" in text, name
    for variable in ("ASSAY_MODEL", "ASSAY_PINS", "ASSAY_VLLM_SHARE", "ASSAY_REFERENCE"):
        assert f"`{variable}`" in text, variable
    names = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    assert " at 0x" not in names
    assert "mappingproxy" not in names
    for name in ("## assay.poc\n", "## assay.vhack\n", "`prove(", "`extract(", "`UsageError("):
        assert name in names, name
