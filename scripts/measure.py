"""Measure how dense the code is: ``python scripts/measure.py [--check] [FOLDER …]``.

Raw lines reward packing, so the budgets count statements and lines formatted alike. Without a
folder, `src` and `research` are measured; ``--check`` fails where a budget below is exceeded.
"""

import argparse
import ast
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

BUDGETS = {
    "src": {"statements": 29_716, "lines88": 72_851},
    "research": {"statements": 11_475, "lines88": 27_761},
}
"""The most that a folder may have: what it has now. Lower it with every cut; the aims for `src` are
25 000 statements and 60 000 lines."""

LIMITS = {"tuple_assignments": 5.0, "vague_names": 1.0, "late_constants": 5.0}
"""The most of each habit in `src`: per 1000 lines, % of bindings, % of files."""

VAGUE_NAMES = frozenset(
    """
    another answered asked both done each found given got held here how it kept known left
    like made many next one other own rest said same seen some such taken that them there
    these thing this those told wanted way what whole
    """.split()  # noqa: SIM905
)
"""Local names that do not say what they hold."""

COLUMNS = ("files", "statements", "lines88", "density", "tuples", "vague", "late", "comments")


@dataclass(slots=True)
class Measures:
    """Counts over all files of a folder."""

    files: int = 0
    statements: int = 0
    lines88: int = 0
    code_lines: int = 0
    comment_lines: int = 0
    tuple_assignments: int = 0
    bindings: int = 0
    vague_bindings: int = 0
    files_with_late_constants: int = 0

    @property
    def density(self) -> float:
        """Statements per line of code."""
        return self.statements / self.code_lines

    @property
    def tuples_per_1000(self) -> float:
        """Tuple assignments per 1000 lines of code."""
        return 1000 * self.tuple_assignments / self.code_lines

    @property
    def vague_percent(self) -> float:
        """Share of bindings whose name says nothing, in percent."""
        return 100 * self.vague_bindings / self.bindings

    @property
    def late_percent(self) -> float:
        """Share of files with a constant after their first function or class, in percent."""
        return 100 * self.files_with_late_constants / self.files

    @property
    def comment_percent(self) -> float:
        """Comment lines in percent of comments and code."""
        return 100 * self.comment_lines / (self.comment_lines + self.code_lines)


def is_docstring(node: ast.AST) -> bool:
    """Return whether a node is a string that stands alone."""
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )


def is_tuple_assignment(node: ast.AST) -> bool:
    """Return whether a node is of the form ``a, b = x, y``."""
    return (
        isinstance(node, ast.Assign)
        and isinstance(node.targets[0], ast.Tuple)
        and isinstance(node.value, ast.Tuple)
    )


def bindings(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Yield name and line of every binding: assigned names, loop variables, arguments."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id, node.lineno
        elif isinstance(node, ast.arg):
            yield node.arg, node.lineno


def late_constants(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """Yield name and line of module constants that stand after the first function or class."""
    has_begun = False
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            has_begun = True
        elif has_begun and isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            for target in targets:
                if isinstance(target, ast.Name) and target.id.strip("_").isupper():
                    yield target.id, node.lineno


def add_file(measures: Measures, path: Path) -> None:
    """Add the counts of one file, formatted to 88 columns."""
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text)
    lines = [line.strip() for line in text.splitlines()]
    in_docstrings: set[int] = set()
    for node in ast.walk(tree):
        if is_docstring(node):
            in_docstrings |= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
        elif isinstance(node, ast.stmt):
            measures.statements += 1
        measures.tuple_assignments += is_tuple_assignment(node)
    for number, line in enumerate(lines, 1):
        if line and number not in in_docstrings:
            measures.comment_lines += line.startswith("#")
            measures.code_lines += not line.startswith("#")
    names = [name for name, _ in bindings(tree)]
    measures.bindings += len(names)
    measures.vague_bindings += sum(name.strip("_") in VAGUE_NAMES for name in names)
    measures.files_with_late_constants += any(True for _ in late_constants(tree))
    measures.files += 1
    measures.lines88 += len(lines)


def measure(folder: Path) -> Measures:
    """Measure all Python files of a folder but its tests, in a copy formatted to 88 columns."""
    measures = Measures()
    with tempfile.TemporaryDirectory() as copies:
        for path in sorted(folder.rglob("*.py")):
            if "tests" not in path.relative_to(folder).parts:
                copy = Path(copies) / path.relative_to(folder)
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, copy)
        ruff = shutil.which("ruff") or str(Path(sys.executable).with_name("ruff"))
        formatter = [ruff, "format", "--isolated", "--quiet", "--line-length", "88", copies]
        subprocess.run(formatter, check=True)
        for copy in sorted(Path(copies).rglob("*.py")):
            add_file(measures, copy)
    return measures


def table_row(name: str, measures: Measures) -> str:
    """Return the measures of a folder as a row of text."""
    return (
        f"{name:<24}{measures.files:>9}{measures.statements:>12}{measures.lines88:>9}"
        f"{measures.density:>9.2f}{measures.tuples_per_1000:>9.1f}{measures.vague_percent:>8.1f}%"
        f"{measures.late_percent:>8.1f}%{measures.comment_percent:>9.1f}%"
    )


def exceeded(name: str, measures: Measures) -> list[str]:
    """Return a sentence for every budget that a folder exceeds."""
    counts = {"statements": measures.statements, "lines88": measures.lines88}
    faults = [
        f"{name}: {counts[unit]} {unit}, wanted at most {most}: take out what it replaces"
        for unit, most in BUDGETS.get(name, {}).items()
        if counts[unit] > most
    ]
    if name == "src":
        habits = {
            "tuple_assignments": measures.tuples_per_1000,
            "vague_names": measures.vague_percent,
            "late_constants": measures.late_percent,
        }
        faults += [
            f"{name}: {habit} {habits[habit]:.1f}, wanted at most {most}: "
            "list them with --vague-names or --late-constants"
            for habit, most in LIMITS.items()
            if habits[habit] > most
        ]
    return faults


def print_places(folder: Path, *, vague_names: bool) -> None:
    """Print where vague names, or else late constants, are bound."""
    for path in [folder] if folder.is_file() else sorted(folder.rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for name, line in bindings(tree) if vague_names else late_constants(tree):
            if not vague_names or name.strip("_") in VAGUE_NAMES:
                print(f"{path}:{line}: {name}")


def main() -> int:
    """Print the measures, or the places asked for; return 1 where a checked budget is exceeded."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folders", nargs="*", type=Path, default=[Path("src"), Path("research")])
    parser.add_argument("--check", action="store_true", help="fail where a budget is exceeded")
    parser.add_argument("--vague-names", action="store_true", help="list such bindings instead")
    parser.add_argument("--late-constants", action="store_true", help="list such lines instead")
    options = parser.parse_args()
    if options.vague_names or options.late_constants:
        for folder in options.folders:
            print_places(folder, vague_names=options.vague_names)
        return 0
    print(f"{'':<24}" + "".join(f"{column:>9}" for column in COLUMNS))
    faults = []
    for folder in options.folders:
        measures = measure(folder)
        print(table_row(str(folder), measures))
        faults += exceeded(str(folder), measures)
    print("\n".join(faults), end="\n" if faults else "")
    return 1 if faults and options.check else 0


if __name__ == "__main__":
    sys.exit(main())
