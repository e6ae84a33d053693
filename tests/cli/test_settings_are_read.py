"""Settings: none that a command takes and does not read."""

import ast
import inspect
import textwrap
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

import pytest

from assay.cli import app
from assay.framework.commands import Command
from assay.framework.groups import leaves

SOURCES = Path(inspect.getfile(Command)).parents[2]
COMMANDS = {" ".join(words): command for words, command in leaves(app)}


@cache
def module_tree(module: str) -> ast.Module | None:
    """Return the syntax of a module; None where the name is no module."""
    path = SOURCES / Path(*module.split("."))
    files = (path / "__init__.py", path.with_suffix(".py"))
    return next((ast.parse(file.read_text("utf-8")) for file in files if file.is_file()), None)


def imports(tree: ast.AST) -> Iterator[str]:
    """Yield the names of assay that a piece of code imports, wherever it does."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("assay."):
            yield str(node.module)
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@cache
def imports_of(module: str) -> frozenset[str]:
    tree = module_tree(module)
    return frozenset(() if tree is None else imports(tree))


@cache
def reads_of(module: str) -> frozenset[str]:
    """Return the attributes that a module reads, and the words that it has as texts."""
    tree = module_tree(module)
    return frozenset(() if tree is None else reads(tree))


def reads(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            yield node.attr
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def reachable(modules: Iterable[str]) -> set[str]:
    waiting = list(modules)
    reached = set[str]()
    while waiting:
        module = waiting.pop()
        if module not in reached:
            reached.add(module)
            waiting += imports_of(module)
    return reached


@pytest.mark.parametrize("name", COMMANDS)
def test_every_setting_of_a_command_is_read_by_what_it_calls(name: str):
    command = COMMANDS[name]
    function = inspect.unwrap(command.function)
    own = ast.parse(textwrap.dedent(inspect.getsource(function)))
    own_floor = (".cli", ".framework")
    cli = {m for m in reachable({function.__module__}) if any(part in m for part in own_floor)}
    modules = reachable(imports(own)) | cli
    read = set(reads(own)).union(*map(reads_of, modules))
    assert sorted(command.settings.keys() - read) == []


@pytest.mark.parametrize("form", ["option", "key"])
def test_the_directory_of_a_receiver_is_refused_and_its_output_named(assay, tmp_path, form: str):
    config = tmp_path / "config.toml"
    config.write_text(f'[poc.receive]\ndata_dir = "{tmp_path / "x"}"\n')
    arguments = {"option": ("--data-dir", tmp_path / "x"), "key": ("--config", config)}[form]
    refused = assay("poc", "receive", *arguments)
    assert refused.code == 2
    assert "--output" in refused.err
    assert not (tmp_path / "x").exists()
