"""The shape of the house: no circle, no private name across modules, no function too long, and few
names promised.
"""

import ast
import importlib
import pkgutil
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

import assay

ROOT = Path(assay.__file__).parent.parent
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted((ROOT / "assay").rglob("*.py"))
}
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in MODULES.items()}
LONGEST_FUNCTION = 65
MOST_NAMES = 200
RESEARCH = sorted((ROOT.parent / "research").rglob("*.py"))
SIGNATURES = "assay.cli"
"""Functions of the command line are as long as their lists of flags; their bodies are bounded like
all others.
"""


def imports(name: str) -> list[tuple[str, str]]:
    """Every import in a module, the type-only and the late ones included: (module, imported name or
    nothing).
    """
    found = []
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} imports relatively"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                found.append((whole, "") if whole in MODULES else (str(node.module), alias.name))
        elif isinstance(node, ast.Import):
            found += [(alias.name, "") for alias in node.names]
    return [(module, imported) for module, imported in found if module in MODULES]


def test_the_walk_sees_the_house():
    assert len(MODULES) > 150
    assert ("assay.errors", "BadWeights") in imports("assay.models.checkpoint")


def test_there_is_no_circle():
    """Type-only imports count: two modules that need each other's types are one module."""
    graph = {name: {module for module, _ in imports(name)} - {name} for name in MODULES}
    left = dict(graph)
    while free := [name for name, wanted in left.items() if not wanted & left.keys()]:
        for name in free:
            del left[name]
    assert not left, sorted(left)


def test_an_underscore_is_a_boundary():
    """A private name is used in its own module only, and research uses public names only."""
    crossed = [
        f"{name} imports {imported} of {module}"
        for name in MODULES
        for module, imported in imports(name)
        if imported.startswith("_") and not imported.startswith("__")
    ]
    for path in RESEARCH:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if (
                isinstance(node, ast.ImportFrom)
                and (node.module or "").partition(".")[0] == "assay"
            ):
                words = [*str(node.module).split("."), *(alias.name for alias in node.names)]
                crossed += [
                    f"{path.name} imports {w}"
                    for w in words
                    if w.startswith("_") and not w.startswith("__")
                ]
    assert not crossed, crossed


def test_no_function_is_longer_than_a_screen():
    """Code lines: without docstring, comments, blank lines inner functions, and the signature of a
    command.
    """
    found = defaultdict(int)
    for name, tree in TREES.items():
        lines = MODULES[name].read_text(encoding="utf-8").splitlines()
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                body = (
                    node.body[1:] if ast.get_docstring(node) and len(node.body) > 1 else node.body
                )
                start = body[0].lineno if name.startswith(SIGNATURES) else node.lineno
                left_out = (
                    set(range(node.body[0].lineno, body[0].lineno))
                    if body is not node.body
                    else set()
                )
                for inner in (one for part in body for one in ast.walk(part)):
                    if isinstance(inner, ast.FunctionDef | ast.AsyncFunctionDef):
                        left_out |= set(range(inner.lineno, (inner.end_lineno or 0) + 1))
                code = [
                    number
                    for number in range(start, (node.end_lineno or start) + 1)
                    if number not in left_out
                    and lines[number - 1].strip()
                    and lines[number - 1].strip()[0] != "#"
                ]
                found[f"{name}.{node.name}"] = len(code)
    assert {name: lines for name, lines in found.items() if lines > LONGEST_FUNCTION} == {}


def test_research_and_examples_import_what_there_is():
    """Most of them run for minutes, or on machines with a GPU, so an import of a name that has
    moved shows late.
    """
    missing = []
    paths = [path for name in ("examples", "scripts") for path in (ROOT.parent / name).glob("*.py")]
    for path in [*paths, *RESEARCH]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            module = node.module or "" if isinstance(node, ast.ImportFrom) else ""
            if module.partition(".")[0] == "assay":
                there = {
                    name for statement in TREES[module].body for name in given_names(statement)
                }
                stub = MODULES[module].with_suffix(".pyi")
                whole = (
                    ast.parse(stub.read_text(encoding="utf-8")) if stub.exists() else TREES[module]
                )
                parts = [
                    part
                    for part in ast.walk(whole)
                    if isinstance(part, ast.Import | ast.ImportFrom)
                ]
                there |= {alias.asname or alias.name for part in parts for alias in part.names}
                names = (alias.name for alias in node.names)
                missing += [
                    f"{path.name}: {module}.{name}"
                    for name in names
                    if name not in there and f"{module}.{name}" not in MODULES
                ]
    assert not missing


def test_exported_names_are_there_and_few():
    """That all of them, and all modules, have a docstring, ruff says."""
    packages = [
        "assay",
        *(found.name for found in pkgutil.walk_packages(assay.__path__, "assay.") if found.ispkg),
    ]
    faces = [face for face in map(importlib.import_module, packages) if hasattr(face, "__all__")]
    for face in faces:
        assert len(set(face.__all__)) == len(face.__all__)
        assert all(hasattr(face, name) for name in face.__all__), face.__name__
    assert sum(len(face.__all__) for face in faces) <= MOST_NAMES
    with pytest.raises(AttributeError, match="nothing"):
        assay.nothing  # noqa: B018
    assert "poc" in dir(assay)


def given_names(statement: ast.stmt) -> Iterator[str]:
    """The names that a statement of a module gives, but those that Python reads."""
    kinds = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
    targets = [statement, *getattr(statement, "targets", [])]
    targets += [statement.target] if isinstance(statement, ast.AnnAssign) else []
    for target in (one for found in targets for one in getattr(found, "elts", [found])):
        name = target.name if isinstance(target, kinds) else getattr(target, "id", "__")
        if not name.startswith("__"):
            yield name
