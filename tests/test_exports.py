"""What the package promises by name: everything in `__all__` is documented and importable."""

import importlib
import inspect
import pkgutil

import pytest

import assay

FLOORS = ["assay", "assay.models", "assay.poc", "assay.poc.engines", "assay.reports", "assay.stats", "assay.streams"]


@pytest.mark.parametrize("name", FLOORS)
def test_exported_names(name: str):
    module = importlib.import_module(name)
    assert len(set(module.__all__)) == len(module.__all__)
    for exported in module.__all__:
        value = getattr(module, exported)
        if inspect.isclass(value) or inspect.isfunction(value):
            assert inspect.getdoc(value), f"{name}.{exported} has no docstring"


def test_every_module_says_what_it_is():
    for found in pkgutil.walk_packages(assay.__path__, "assay."):
        if not found.name.endswith("__main__"):
            assert importlib.import_module(found.name).__doc__, found.name


def test_unknown_names_are_attribute_errors():
    with pytest.raises(AttributeError, match="nothing"):
        assay.nothing  # noqa: B018
    assert "poc" in dir(assay)
