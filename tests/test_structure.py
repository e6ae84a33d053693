"""The shape of the house: no circle, no private name across modules, no function too long to read."""

import ast
import re
import tomllib
from collections import Counter, defaultdict
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path

from vulture import Vulture

import assay

ROOT = Path(assay.__file__).parent.parent
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted((ROOT / "assay").rglob("*.py"))
}
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in MODULES.items()}
LONGEST_FUNCTION = 60
RESEARCH = sorted((ROOT.parent / "research").rglob("*.py"))
LOADED = {"TorchBackend", "TritonBackend", "plugin", "before_start", "train_delta"}
"""Names that are put together at run time, and entry points of vLLM and verl."""
SIGNATURES = "assay.cli"
"""Functions of the command line are as long as their lists of flags; their bodies are bounded like all others."""


def imports(name: str) -> list[tuple[str, str]]:
    """Every import in a module, the type-only and the late ones included: (module, imported name or nothing)."""
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
    assert ("assay.errors", "BadWeights") in imports("assay.models.load")


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
            if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "assay":
                words = [*str(node.module).split("."), *(alias.name for alias in node.names)]
                crossed += [f"{path.name} imports {w}" for w in words if w.startswith("_") and not w.startswith("__")]
    assert not crossed, crossed


def test_no_function_is_longer_than_a_screen():
    """Code lines: without docstring, comments and blank lines; on the command line, without the signature either."""
    found = defaultdict(int)
    for name, tree in TREES.items():
        lines = MODULES[name].read_text(encoding="utf-8").splitlines()
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                body = node.body[1:] if ast.get_docstring(node) and len(node.body) > 1 else node.body
                start = body[0].lineno if name.startswith(SIGNATURES) else node.lineno
                documented = range(node.body[0].lineno, body[0].lineno) if body is not node.body else range(0)
                code = [
                    number
                    for number in range(start, (node.end_lineno or start) + 1)
                    if number not in documented and lines[number - 1].strip() and lines[number - 1].strip()[0] != "#"
                ]
                found[f"{name}.{node.name}"] = len(code)
    assert {name: lines for name, lines in found.items() if lines > LONGEST_FUNCTION} == {}


def test_every_name_of_a_module_is_used():
    """By its own module, an import, an attribute or a text; `make check` compares names, wherever else they stand."""
    folders = [ROOT.parent / name for name in ("research/benchmarks", "examples")]
    others = [ast.parse(path.read_text(encoding="utf-8")) for folder in folders for path in folder.glob("*.py")]
    nodes = [node for tree in [*TREES.values(), *others] for node in ast.walk(tree)]
    froms = [node for node in nodes if isinstance(node, ast.ImportFrom)]
    imported = {(node.module, alias.name) for node in froms for alias in node.names}
    read = {node.attr for node in nodes if isinstance(node, ast.Attribute)} | LOADED
    unused = []
    for name, tree in TREES.items():
        said = {statement: words(statement) for statement in tree.body}
        counts = sum(said.values(), Counter())
        for statement, own in said.items():
            given = list(given_names(statement))
            elsewhere = any(counts[one] > own[one] or one in read or (name, one) in imported for one in given)
            if given and not elsewhere and not getattr(statement, "decorator_list", []):
                unused.append(f"{name}: {', '.join(given)}")
    assert not unused


def test_research_and_examples_import_what_there_is():
    """Most of them run for minutes, or on machines with a GPU, so an import of a name that has moved shows late."""
    missing = []
    for path in (
        path
        for name in ("research/benchmarks", "research/scripts", "examples", "scripts")
        for path in (ROOT.parent / name).glob("*.py")
    ):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            module = node.module or "" if isinstance(node, ast.ImportFrom) else ""
            if module.partition(".")[0] == "assay":
                there = {name for statement in TREES[module].body for name in given_names(statement)}
                parts = [part for part in ast.walk(TREES[module]) if isinstance(part, ast.Import | ast.ImportFrom)]
                there |= {alias.asname or alias.name for part in parts for alias in part.names}
                names = (alias.name for alias in node.names)
                missing += [
                    f"{path.name}: {module}.{name}"
                    for name in names
                    if name not in there and f"{module}.{name}" not in MODULES
                ]
    assert not missing


def words(statement: ast.stmt) -> Counter[str]:
    """The names in a statement, with those in its texts, and how often they stand there."""
    nodes = list(ast.walk(statement))
    texts = [node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    texts += [node.id for node in nodes if isinstance(node, ast.Name)]
    return Counter(re.findall(r"\w+", " ".join(texts)))


def given_names(statement: ast.stmt) -> Iterator[str]:
    """The names that a statement of a module gives, but those that Python reads."""
    kinds = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
    targets = [statement, *getattr(statement, "targets", [])]
    targets += [statement.target] if isinstance(statement, ast.AnnAssign) else []
    for target in (one for found in targets for one in getattr(found, "elts", [found])):
        name = target.name if isinstance(target, kinds) else getattr(target, "id", "__")
        if not name.startswith("__"):
            yield name


def test_every_name_that_counts_as_used_needs_to(monkeypatch):
    """`make check` finds what is unused; this finds entries of its list that are not needed any more."""
    checkout = ROOT.parent
    monkeypatch.chdir(checkout)
    config = tomllib.loads((checkout / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["vulture"]
    search = Vulture(ignore_decorators=config["ignore_decorators"])
    search.scavenge(config["paths"])
    unused = {found.name for found in search.get_unused_code()}
    assert [name for name in config["ignore_names"] if not any(fnmatchcase(one, name) for one in unused)] == []
