"""The shape of the house: no circle, no private name across modules, no function too long, and few
names promised.
"""

import ast
import importlib
import pkgutil
import re
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import assay
from scripts import measure

ROOT = Path(assay.__file__).parent.parent
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted((ROOT / "assay").rglob("*.py"))
}
MOST_STATEMENTS = 45
MOST_TUPLES = 30
"""Swaps, and values that a call or a step of a formula gives together."""
MOST_NAMES = 200
MOST_SENTENCES_IN_TESTS = 101
"""To be lowered with every test that is freed of one."""
LIBRARIES_PRIVATE = frozenset(
    """
    _attn_implementation _compute_loss _exit _generate_and_score_completions _generate_single_turn
    _iter_named_params _metrics
    """.split()  # noqa: SIM905
)
"""Names of other libraries, which assay overrides or sets by the same name."""
RESEARCH = sorted((ROOT.parent / "research").rglob("*.py"))


@cache
def trees() -> dict[str, ast.Module]:
    """The syntax of every module, which takes seconds to read."""
    return {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in MODULES.items()}


def imports(name: str) -> list[tuple[str, str]]:
    """Every import in a module, the type-only and the late ones included: (module, imported name or
    nothing).
    """
    found = []
    for node in ast.walk(trees()[name]):
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


@pytest.mark.slow
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


def statements(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Return the number of statements of a function, those of inner functions not counted."""
    count = 0
    pending: list[ast.AST] = list(function.body)
    while pending:
        node = pending.pop()
        count += isinstance(node, ast.stmt) and not measure.is_docstring(node)
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            pending += ast.iter_child_nodes(node)
    return count


def is_private(name: str) -> bool:
    """Whether a name begins with one underscore and has more."""
    return name.startswith("_") and not name.startswith("__") and name != "_"


def bound_names(tree: ast.AST) -> Iterator[str]:
    """Yield what a module defines or sets: functions, classes, variables, attributes."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr


def used_names(node: ast.AST) -> list[str]:
    """Return the names that an import, an attribute or a patch of a test asks for."""
    if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("assay"):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.Attribute):
        return [node.attr]
    if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("setattr", "delattr")):
        texts = [part.value for part in node.args if isinstance(part, ast.Constant)]
        return [word for text in texts if isinstance(text, str) for word in text.split(".")]
    return []


@pytest.mark.slow
def test_tests_hold_behaviour():
    """They use names that assay promises, and leave the words of errors to tests/wordings.py."""
    names_of_assay = {name for tree in trees().values() for name in bound_names(tree)}
    private_names = []
    sentences = []
    for path in sorted((ROOT.parent / "tests").rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        own_names = set(bound_names(tree)) - {
            node.attr
            for node in ast.walk(tree)
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) != "self"
        }
        known = names_of_assay - own_names - LIBRARIES_PRIVATE
        for node in ast.walk(tree):
            place = f"{path.name}:{getattr(node, 'lineno', 0)}"
            private_names += [
                f"{place} {name}" for name in used_names(node) if is_private(name) and name in known
            ]
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "pytest.raises":
                sentences += [place for keyword in node.keywords if keyword.arg == "match"]
    assert private_names == []
    assert len(sentences) <= MOST_SENTENCES_IN_TESTS, sentences


def test_no_function_has_more_statements_than_a_screen():
    """Statements and not lines: packing must not make a function short."""
    too_long = {
        f"{name}.{node.name}": statements(node)
        for name, tree in trees().items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and statements(node) > MOST_STATEMENTS
    }
    assert too_long == {}


def test_an_assignment_binds_one_thing():
    """``a, b = x, y`` reads as one fact, and is two. A swap needs the form."""
    packed = [
        f"{name}:{node.lineno}"
        for name, tree in trees().items()
        for node in ast.walk(tree)
        if measure.is_tuple_assignment(node)
    ]
    assert len(packed) <= MOST_TUPLES, packed


def test_a_class_name_is_of_one_class():
    """A name that stands for two things costs its reader a look at the imports."""
    places = defaultdict(list)
    for name, tree in trees().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                places[node.name].append(name)
    assert {word: names for word, names in places.items() if len(names) > 1} == {}


@pytest.mark.slow
def test_research_and_examples_import_what_there_is():
    """Most of them run for minutes, or on machines with a GPU, so an import of a name that has
    moved shows late.
    """
    missing = []
    paths = [
        path for name in ("examples", "scripts") for path in (ROOT.parent / name).rglob("*.py")
    ]
    for path in [*paths, *RESEARCH]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            module = node.module or "" if isinstance(node, ast.ImportFrom) else ""
            if module.partition(".")[0] == "assay":
                there = {
                    name for statement in trees()[module].body for name in given_names(statement)
                }
                stub = MODULES[module].with_suffix(".pyi")
                whole = (
                    ast.parse(stub.read_text(encoding="utf-8"))
                    if stub.exists()
                    else trees()[module]
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


ENTRY = re.compile(
    r"([\w.]+(, [\w.]+)*|\*+\w+)( \(.*\))?:( |$)"
)  # of a list of arguments or errors
INNER_ENTRY = re.compile(r"[.;] [a-z_]+(, [a-z_]+)*: [A-Z]")


def test_every_entry_of_a_docstring_begins_a_line():
    """Some lists were run together as text, and some paragraphs were indented by half."""
    faults = []
    kinds = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    for name, tree in trees().items():
        texts = (ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds))
        for text in filter(None, texts):
            for block in text.split("\n\n"):
                head, _, body = block.partition("\n")
                if head in ("Args:", "Raises:", "Attributes:"):
                    lines = [line[4:] for line in body.split("\n") if line[4:5].strip()]
                    faults += [(name, line) for line in lines if not ENTRY.match(line)]
                    entries = re.sub(r"\n {8}", " ", body)
                    faults += [(name, found[0]) for found in INNER_ENTRY.finditer(entries)]
    assert not faults


def given_names(statement: ast.stmt) -> Iterator[str]:
    """The names that a statement of a module gives, but those that Python reads."""
    kinds = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
    targets = [statement, *getattr(statement, "targets", [])]
    targets += [statement.target] if isinstance(statement, ast.AnnAssign) else []
    for target in (one for found in targets for one in getattr(found, "elts", [found])):
        name = target.name if isinstance(target, kinds) else getattr(target, "id", "__")
        if not name.startswith("__"):
            yield name
