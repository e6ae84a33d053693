"""The program in an answer: the block of code that a reader would run."""

import ast
import re
from collections.abc import Iterator
from textwrap import dedent

_PYTHON = frozenset({"python", "py", "ipython", "pycon"})  # before a version
_MOST_MARKDOWN = 8
"""Blocks of Markdown that are looked into: all that follows one is read again."""
_MOST_QUOTED = 1 << 16
"""Lines that are looked at for a fence behind the first, all blocks together."""
_OPENING = re.compile(r"^(?P<indent>[ \t]*)(?P<fence>`{3,}|~{3,})(?P<info>[^\n]*)$")
# A line of a block that defines, and runs nothing: a constant has no call.
_DEFINES = re.compile(
    r"(?:[ \t\r#@)\]}].*|(?:(?:async[ \t]+)?def|class|import|from)\b.*"
    r"|\w+[ \t]*(?::[^=]*)?=[^=(]*)?"
)
_THOUGHT = "(?:think|thinking|thought|reasoning)"
_CLOSE = rf"(?:</{_THOUGHT}>|\[/{_THOUGHT}\]|<\|end_of_{_THOUGHT}\|>)"
# Reasoning from its tag on, or, where the prompt has opened it, up to the tag that ends it. A tag
# in a text of the program stands behind a quote.
_REASONING = re.compile(
    rf"\A[^`\"~]*?(?:<{_THOUGHT}>|\[{_THOUGHT}\]|<\|begin_of_{_THOUGHT}\|>).*?(?:{_CLOSE}|\Z)"
    rf"|\A(?:(?!```|~~~).)*?^[^\n\"'`]*{_CLOSE}"
    rf"|\A.*^[^\n\"'`#]*{_CLOSE}[ \t]*$",
    re.DOTALL | re.MULTILINE | re.IGNORECASE,
)
_ANSWER = re.compile(r"^[ \t]*<answer>|</answer>[ \t\r]*$", re.MULTILINE)


def find_programs(completion: str, entry: str) -> list[str]:
    """Return the program of a completion; several where blocks without a language compete.

    Reasoning before the answer is left out. Of blocks of Python the last counts that defines the
    entry, with those that only define what it may use, or the last. Without one, blocks that name
    no language are candidates, those first that define the entry. A completion without such blocks
    is the program itself. Where the ``entry`` is empty, as a prompt may name none, blocks of one
    kind are read together. What Python cannot read is put together with nothing: it would hide the
    rest.
    """
    answer = _ANSWER.sub("", _REASONING.sub("", completion.removeprefix("\ufeff"), count=1))
    blocks = list(_blocks(answer))
    name = re.escape(entry.rpartition(".")[2])
    statement = rf"(?:(?:async[ \t]+)?def|class)[ \t]+{name}\b|{name}\s*[:=][^=]"
    defines = re.compile(rf"(?m)^[ \t]*(?:{statement})")
    python = [text for language, text in blocks if language.rstrip("0123456789.") in _PYTHON]
    plain = [text for language, text in blocks if not language]
    if not entry and (together := python or plain):
        return ["\n".join(list(filter(_parses, map(dedent, together))) or together)]
    if programs := list(filter(defines.search, python)):
        helpers = [
            text
            for text in python
            if all(map(_DEFINES.fullmatch, text.split("\n"))) and _parses(text)
        ]
        used = {*helpers, programs[-1]} - ({*programs} - {programs[-1]})
        return ["\n".join(text for text in dict.fromkeys(python) if text in used)]
    if programs := list(filter(defines.search, plain)):
        return list(dict.fromkeys(programs))
    if python:
        return python[-1:]
    return plain or [answer]


def _parses(text: str) -> bool:
    """Return whether a block may be Python; one that is nested too deeply to be read may run."""
    try:
        ast.parse(text)
    except (MemoryError, RecursionError):
        return True
    except (SyntaxError, ValueError):
        return False
    return True


def _blocks(text: str) -> Iterator[tuple[str, str]]:
    """Yield fenced blocks as CommonMark has them, at any indentation.

    A fence inside a text of three quotes closes nothing, if a later one does. Blocks inside a
    block of Markdown count.
    """
    lines = text.split("\n")
    start = 0
    looked_into = 0
    quoted = iter(range(_MOST_QUOTED))
    while start < len(lines):
        opening = _OPENING.match(lines[start].rstrip("\r"))
        start += 1
        if opening is None or (opening["fence"][0] == "`" and "`" in opening["info"]):
            continue
        closing = re.compile(rf"[ \t]*{opening['fence'][0]}{{{len(opening['fence'])},}}[ \t\r]*")
        end = _end(lines, start, closing, quoted)
        words = opening["info"].strip().strip("{}.").lower().split()
        language = re.split(r"[\s,:={]", words[0])[0] if words else ""
        if language in ("markdown", "md") and looked_into < _MOST_MARKDOWN:
            looked_into += 1
            lines[end : end + 1] = [""]
            continue
        indent = len(opening["indent"])
        content = [line[min(indent, len(line) - len(line.lstrip())) :] for line in lines[start:end]]
        yield language, "\n".join([*content, ""])
        start = end + 1


def _end(lines: list[str], start: int, closing: re.Pattern[str], quoted: Iterator[int]) -> int:
    """Return the row of the fence that closes a block, or the number of rows.

    A completion of many fences must not take quadratic time: behind the first fence a line is
    looked at only while ``quoted`` has one left.
    """
    first = None
    counts = dict.fromkeys(('"""', "'''"), 0)
    for row in range(start, len(lines)):
        if first is not None and next(quoted, None) is None:
            return first
        if closing.fullmatch(lines[row]):
            if not any(count % 2 for count in counts.values()):
                return row
            first = row if first is None else first
        for quotes in counts:
            counts[quotes] += lines[row].count(quotes)
    return len(lines) if first is None else first
