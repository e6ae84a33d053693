"""Files of lines, changed as a forger would change them: each function returns a change of a list
of lines.
"""

import json
from collections.abc import Callable

from assay.files.jsonl import dumps

Change = Callable[[list[str]], list[str]]


def edited(number: int, **changes) -> Change:
    """Change fields of one line, addressed with two underscores."""

    def change(lines: list[str]) -> list[str]:
        value = json.loads(lines[number])
        for path, new in changes.items():
            *parents, last = path.split("__")
            target = value
            for parent in parents:
                target = target[parent]
            target[last] = new
        return put(number, dumps(value))(lines)

    return change


def put(number: int, *texts: str) -> Change:
    """Put other lines in the place of one."""

    def change(lines: list[str]) -> list[str]:
        at = number % len(lines)
        return [*lines[:at], *texts, *lines[at + 1 :]]

    return change


def replaced(number: int, old: str, new: str) -> Change:
    """Replace text in one line."""

    def change(lines: list[str]) -> list[str]:
        assert old in lines[number]
        return put(number, lines[number].replace(old, new, 1))(lines)

    return change
