"""Find prose that a native engineer would not write: ``python scripts/check_language.py [FILE …]``.

Every row of :data:`PATTERNS` is a habit: where to look, an expression that finds it, and what to
write instead. Docstrings and comments of Python files, and pages of documentation, are searched
line by line.
"""

import io
import re
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

PAGES = (
    "README.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "SECURITY.md",
    "AGENTS.md",
    "RELEASE.md",
    "MIGRATION.md",
)
PLACES = ("src", "tests", "research", "scripts", "docs", "examples", *PAGES)
SKIPPED = {"check_language.py"}  # this table

CODE = "code"
ANYWHERE = "anywhere"
PATTERNS = (
    (CODE, r"^\s*\w+: (of|for|to|in|at|on|from|by|with|as|where) "
           r".{0,60}$", "begin with a head noun"),
    (CODE, r'^\s*"""(The same|As said|See the module)\b[^"]*"""$', "say what the function does"),
    (CODE, r'^\s*(\w+): the (?P<name>\w+)\.$', "say the shape, the unit or the default"),
    (CODE, r"^\s*(Raises: )?Error: ", "name the class of the error"),
    (ANYWHERE, r"\b(is|are|was|were|be) none\b(?! of)", 'write "is not a ..." or "there is no '
                                                        '..."'),
    (ANYWHERE, r"\bSee the module\b", "say it here"),
    (ANYWHERE, r"\b(nobody|somebody|anybody|whoever|everybody)('s)?\b", "name the process, the "
                                                                        "value or the reader"),
    (ANYWHERE, r"\bof ours\b|\bof theirs\b|\bof its own care\b", "name the thing"),
    (ANYWHERE, r"\bhas the word\b|\bin the care of\b|\bis to be had\b|\bof no "
               r"account\b", "plain words"),
    (ANYWHERE, r"\bbehind (it|them|the end|a colon)\b", 'write "after"'),
    (ANYWHERE, r"\bwhat (is|are) none\b|\bas said\b|\bwhat stands against\b|\bno more than "
               r"that\b", "plain words"),
    (ANYWHERE, r"\bthe seed's\b|\bseed rule\b", 'write "the original proposal" or "the published '
                                                'rule"'),
)  # fmt: skip


def prose(path: Path) -> Iterator[tuple[int, str, bool]]:
    """Yield (line number, line, whether it is of code) of everything in a file that is prose."""
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".py":
        yield from ((number, line, False) for number, line in enumerate(text.splitlines(), 1))
        return
    previous = tokenize.NEWLINE
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        standing = token.type == tokenize.STRING and previous in (
            tokenize.NEWLINE,
            tokenize.INDENT,
            tokenize.NL,
        )
        if token.type == tokenize.COMMENT or (
            standing and token.string.lstrip("r").startswith('"""')
        ):
            for offset, line in enumerate(token.string.splitlines()):
                yield token.start[0] + offset, line, True
        if token.type not in (tokenize.COMMENT, tokenize.NL):
            previous = token.type


def findings(path: Path) -> Iterator[str]:
    """Yield one line per habit found in a file."""
    for number, line, of_code in prose(path):
        for where, pattern, instead in PATTERNS:
            found = re.search(pattern, line) if of_code or where == ANYWHERE else None
            if found and (
                "name" not in found.groupdict() or found[1] in (found["name"], found["name"] + "s")
            ):
                yield f"{path}:{number}: {line.strip()}\n    {instead}"


def files(given: list[str]) -> Iterator[Path]:
    """Yield the files to search: those given, or all of the project."""
    for place in map(Path, given or PLACES):
        for path in sorted(place.rglob("*")) if place.is_dir() else [place]:
            if (
                path.suffix in (".py", ".md")
                and path.name not in SKIPPED
                and "results" not in path.parts
            ):
                yield path


def main(given: list[str]) -> int:
    """Print what is found and return 1 where there is anything."""
    found = [line for path in files(given) for line in findings(path)]
    print("\n".join(found) or "no finding")
    if found:
        print(f"{len(found)} findings")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
