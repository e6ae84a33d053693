"""The program in a completion, and the examples in its prompt, as far as they can be read."""

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from textwrap import dedent
from typing import Any

from assay.vhack.pairs.fences import find_programs

MOST_EXAMPLES = 6
MOST_CHARACTERS = 1 << 16  # of a program that is read
# Lines that the end of a completion may lose until it parses.
_CUT_LINES = 3
TEST_NAMES = re.compile(
    r"^_?(run_?|do_?)?(all_?)?(tests?|checks?|verify|validate)(_|$)|^test", re.IGNORECASE
)
"""Names of functions that test."""

_NAMED = re.compile(r"Input:\s*(.+?)\s*\n\s*Output:\s*(.+)")
# No part of 1,000, 3rd or 1.2.3 is a number.
_NUMBER = r"-?(?:\d+(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d+)?(?!\w|[.,]\d)"
_CALLED = re.compile(
    r"(?:>>>|assert)?[ \t]*\b([A-Za-z_]\w*)\((.*?)\)[ \t]*"
    r"(?:==|->|→|=>|\breturns\b|\bis\b|\bgives\b|\n(?=[^\n>]))[ \t]*"
    r"('[^'\n]*'|\"[^\"\n]*\"|\[[^\n]*\]|\{[^\n]*\}|\([^\n]*\)|" + _NUMBER + r"|True|False|None)"
)
_PRINTED = re.compile(
    r"^(?:Sample )?Inputs?:?[ \t]*\n(.+?)\n+(?:Sample )?Outputs?:?[ \t]*\n(.+?)(?:\n\s*\n|\Z)",
    re.DOTALL | re.MULTILINE,
)
_JSON = {"true": "True", "false": "False", "null": "None"}


@dataclass(frozen=True)
class Example:
    """An example of a prompt.

    Attributes:
        call: Name of the function; empty where the prompt names arguments, or gives stdin.
        arguments: Arguments by position; None where the example is of stdin and stdout.
        expected: Value of the call, or text of stdout.
        stdin: Text of stdin.
    """

    call: str
    arguments: tuple[Any, ...] | None
    expected: Any
    stdin: str = ""


def read_program(prompt: str, completion: str) -> tuple[str, ast.Module | None]:
    """Return the code of a completion and its tree, which is None where it is not Python.

    It is the code that is graded: what goes on from a prompt that opens a function, as in the
    environment, or the block that :func:`find_programs` finds.

    Raises:
        RecursionError, MemoryError: It is nested too deeply to be parsed.
    """
    calls = (example.call for example in read_examples(prompt))
    entry = next((name for name in calls if name and name in completion), "")
    # Reasoning before it may be of any length.
    program = find_programs(completion, entry)[-1][:MOST_CHARACTERS]
    completion = completion[:MOST_CHARACTERS]
    head = prompt.rstrip("\n").split("\n")
    heads = [head[-1] + "\n", "\n".join(head[-2:]) + "\n"]
    forms = [("", dedent(program)), *((begun, program) for begun in heads)]
    if head[-1].endswith(":"):
        forms = [*((begun, completion) for begun in heads), *forms]
    for cut in range(_CUT_LINES):
        for begun, body in forms:
            lines = body.rstrip().split("\n")
            text = begun + "\n".join(lines[: max(1, len(lines) - cut)])
            try:
                tree = ast.parse(text)
            except (SyntaxError, ValueError):
                continue
            # A word or a sentence may parse too.
            if any(isinstance(node, ast.FunctionDef | ast.Call) for node in ast.walk(tree)):
                return text, tree
    return program, None


def read_examples(prompt: str) -> list[Example]:
    """Return the examples that a prompt gives, in any of the usual forms."""
    examples = [*_named(prompt), *_called(prompt)]
    printed = _PRINTED.findall(prompt)
    examples = examples or [Example("", None, out.strip(), stdin + "\n") for stdin, out in printed]
    return examples[:MOST_EXAMPLES]


def _named(prompt: str) -> Iterator[Example]:
    for given, expected in _NAMED.findall(prompt):
        try:
            call = ast.parse(f"f({_literal(given)})", mode="eval").body
            # Values without names may as well be lines of stdin.
            if isinstance(call, ast.Call) and call.keywords and not call.args:
                values = tuple(ast.literal_eval(part.value) for part in call.keywords)
                yield Example("", values, ast.literal_eval(_literal(expected)))
        except (SyntaxError, ValueError):
            continue


def _called(prompt: str) -> Iterator[Example]:
    for name, arguments, expected in _CALLED.findall(prompt):
        try:
            values = ast.literal_eval(f"({arguments},)" if arguments.strip() else "()")
            yield Example(name, values, ast.literal_eval(expected))
        except (SyntaxError, ValueError):
            continue


def _literal(text: str) -> str:
    return re.sub(r"\b(true|false|null)\b", lambda word: _JSON[word.group()], text.strip())
