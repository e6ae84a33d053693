"""What the package promises by name: everything in `__all__` is documented and importable."""

import ast
import importlib
import inspect
import pkgutil
from pathlib import Path

import pytest

import assay

PACKAGES = ["assay", *(found.name for found in pkgutil.walk_packages(assay.__path__, "assay.") if found.ispkg)]
FACES = [name for name in PACKAGES if hasattr(importlib.import_module(name), "__all__")]
MOST_NAMES = 200


@pytest.mark.parametrize("name", FACES)
def test_exported_names(name: str):
    module = importlib.import_module(name)
    assert len(set(module.__all__)) == len(module.__all__)
    for exported in module.__all__:
        value = getattr(module, exported)
        if inspect.isclass(value) or inspect.isfunction(value):
            assert inspect.getdoc(value), f"{name}.{exported} has no docstring"


def test_faces_stay_few():
    assert sum(len(importlib.import_module(name).__all__) for name in FACES) <= MOST_NAMES


def test_every_module_says_what_it_is():
    """Read, not imported: some modules need packages that only a GPU machine or a service has."""
    modules = sorted(Path(assay.__file__).parent.rglob("*.py"))
    assert len(modules) > 100
    for path in modules:
        assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), path


def test_unknown_names_are_attribute_errors():
    with pytest.raises(AttributeError, match="nothing"):
        assay.nothing  # noqa: B018
    assert "poc" in dir(assay)
