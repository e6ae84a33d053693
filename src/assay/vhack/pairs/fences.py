"""The program in an answer: the block of code that a reader would run."""

import re
from collections.abc import Iterator
from typing import NamedTuple

_PYTHON = frozenset({"python", "python3", "python2", "py", "py3", "ipython", "pycon"})
_OPENING = re.compile(r"^(?P<indent>[ \t]*)(?P<fence>`{3,}|~{3,})(?P<info>[^\n]*)$")
_TAG = "(?:think|thinking|reasoning)"
# Reasoning from its tag on, or, where the prompt has opened it, up to the tag that ends it. A tag
# in a text of the program stands behind a quote.
_REASONING = re.compile(
    rf"\A[^`\"~]*?<{_TAG}>.*?(?:</{_TAG}>|\Z)"
    rf"|\A(?:(?!```|~~~).)*?^[^\n\"'`]*</{_TAG}>"
    rf"|\A.*^[ \t]*</{_TAG}>[ \t]*$",
    re.DOTALL | re.MULTILINE,
)


class _Fenced(NamedTuple):
    language: str
    text: str


def find_programs(completion: str, entry: str) -> list[str]:
    """Return the program of a completion; several where blocks without a language compete.

    Reasoning before the answer is left out. Of blocks of Python the last counts that defines the
    entry, or the last. Without one, blocks that name no language are candidates, those first that
    define the entry. A completion without such blocks is the program itself.
    """
    answer = _REASONING.sub("", completion, count=1)
    blocks = list(_blocks(answer))
    name = re.escape(entry.rpartition(".")[2])
    statement = rf"(?:(?:async[ \t]+)?def|class)[ \t]+{name}\b|{name}\s*[:=][^=]"
    defines = re.compile(rf"^[ \t]*(?:{statement})", re.MULTILINE)
    python = [block.text for block in blocks if block.language in _PYTHON]
    plain = [block.text for block in blocks if not block.language]
    for texts, is_last in ((python, True), (plain, False)):
        defining = [text for text in texts if defines.search(text)]
        if defining:
            return defining[-1:] if is_last else defining
    if python:
        return python[-1:]
    return plain or [answer]


def _blocks(text: str) -> Iterator[_Fenced]:
    """Yield fenced blocks as CommonMark has them, at any indentation.

    A fence inside a text of three quotes closes nothing.
    """
    lines = iter(text.split("\n"))
    for line in lines:
        opening = _OPENING.match(line.rstrip("\r"))
        if opening is None or (opening["fence"][0] == "`" and "`" in opening["info"]):
            continue
        closing = re.compile(rf"[ \t]*{opening['fence'][0]}{{{len(opening['fence'])},}}[ \t\r]*")
        indent = len(opening["indent"])
        content: list[str] = []
        for inner in lines:
            if closing.fullmatch(inner) and not _is_quoted(content):
                break
            content.append(inner[min(indent, len(inner) - len(inner.lstrip())) :])
        words = opening["info"].strip().strip("{}.").lower().split()
        yield _Fenced(re.split(r"[\s,:{]", words[0])[0] if words else "", "\n".join([*content, ""]))


def _is_quoted(lines: list[str]) -> bool:
    """Return whether a text of three quotes is open after these lines."""
    text = "\n".join(lines)
    return any(text.count(quotes) % 2 for quotes in ('"""', "'''"))
