"""Errors as the command line says them: faults that its parser finds, and the flag that an error is about."""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import typer

from assay.errors import AssayError, UsageError

ParserError: Any = typer.BadParameter.__base__
"""Base of the parser's errors: click's own, or the copy that newer versions of Typer bring along."""

_CLOSEST = re.compile(r" Did you mean (?:one of: )?(.*)\?$")
_UNREADABLE = re.compile(r"Input should be (a valid \w+)")
_FLAG = re.compile(r"(?<![\w-])--?[a-z]")
_SHORTEST = 3  # letters of a value by which the flag that gave it is found


def in_three_parts(error: Any) -> UsageError | None:
    """Return an error of the parser with what was seen, wanted and to do; None for the help of a group."""
    kind = type(error).__name__
    if kind == "NoArgsIsHelpError":
        return None
    name = error.ctx.command_path if error.ctx else "the command"
    look = f"see {name} --help" if error.ctx else "see --help"
    if kind == "NoSuchOption":
        near = " or ".join(error.possibilities or ())
        return UsageError(error.option_name, wanted=f"a flag of {name}", do=_perhaps(near, look))
    if kind == "BadOptionUsage":
        bare = "not take" in error.message
        wanted = "no value behind this flag" if bare else "a value behind this flag"
        return UsageError(error.option_name, wanted=wanted, do=f"{look}, which says what {error.option_name} takes")
    parameter = getattr(error, "param", None)
    if parameter is not None:
        flag = parameter.opts[-1] if parameter.param_type_name == "option" else parameter.name.upper()
        if kind == "MissingParameter":
            return UsageError(f"no {flag}", wanted=parameter.help or "a value", do=f"pass {flag}; {look}")
        unreadable = _UNREADABLE.match(error.message)
        wanted = unreadable[1] if unreadable else error.message.rstrip(".")
        return UsageError(f"{flag} {_value(error)}".rstrip(), wanted=wanted, do=f"correct {flag}; {look}")
    closest = _CLOSEST.search(error.message)
    if error.message.startswith("No such command"):
        seen = _CLOSEST.sub("", error.message).removeprefix("No such command ").rstrip(".")
        near = closest[1].replace("'", "") if closest else ""
        return UsageError(seen.strip("'"), wanted=f"a command of {name}", do=_perhaps(near, look))
    surplus = re.match(r"Got unexpected extra argument\S* \((.*)\)", error.message)
    if surplus:
        wanted = f"only the arguments of {name}"
        return UsageError(f"{surplus[1]:.200} too many", wanted=wanted, do=f"leave it out, or name its flag; {look}")
    return UsageError(f"{name}: {error.message.rstrip('.')}", wanted="what the help describes", do=look)


def _value(error: Any) -> str:
    cause = error.__cause__
    return f"{cause.errors()[0]['input']!s:.60}" if hasattr(cause, "errors") else ""


def _perhaps(near: str, look: str) -> str:
    return f"did you mean {near}? Else {look}" if near else look


def name_flag(error: AssayError, parameters: Sequence[Any], values: Mapping[str, Any]) -> None:
    """Add to what is to do the flag that an error is about, where it names none.

    The flag is found in the text. What raises an error often does not know for which setting it was called: a reader
    of files serves PROOF, --pairs and --calibration, and only the value says which.

    Args:
        error: Error of the library, which knows parameters and values but no flags.
        parameters: Parameters of the command that ran.
        values: Value of each of them.
    """
    if _FLAG.search(str(error)) or not (about := next(_about(error.seen, parameters, values), None)):
        return
    inside = any(isinstance(value, Path) and error.seen.startswith(f"{value}:") for value in values.values())
    guessed = error.do.startswith("did you mean ") and about.startswith("-") and not inside
    error.do = error.do.replace("did you mean", f"did you mean {about}") if guessed else f"{error.do} ({about})"


def spellings(parameters: Sequence[Any]) -> dict[str, str]:
    """Return how a user writes each parameter, by name: its long flag, or its name in capitals."""
    return {
        parameter.name: max(parameter.opts, key=len)
        if parameter.param_type_name == "option"
        else parameter.name.upper()
        for parameter in parameters
    }


def _about(seen: str, parameters: Sequence[Any], values: Mapping[str, Any]) -> Iterator[str]:
    """Yield the names of parameters that a text is about, the surest first.

    A text begins with a value, begins with a name, spells a name of several words, or has a value in it.
    """
    names = spellings(parameters)
    begins = seen.replace(" ", "_")
    given = [
        (str(one) or ".", flag)
        for name, flag in names.items()
        for one in (values[name] if isinstance(values.get(name), list | tuple) else [values.get(name)])
        if one is not None and not isinstance(one, bool)
    ]
    given.sort(key=lambda pair: (-len(pair[0]), not pair[1].startswith("-")))
    for value, flag in given:  # a path that stands for itself, such as ".", may be short
        if (len(value) >= _SHORTEST or not value.isalnum()) and re.match(rf"{re.escape(value)}(?=[:,\s])", seen):
            yield flag
    yield from (flag for name, flag in names.items() if re.match(rf"{name}(?![a-z.])", begins))
    yield from (flag for name, flag in names.items() if "_" in name and re.search(rf"\b{name}\b", seen))
    for value, flag in given:
        if len(value) >= _SHORTEST and re.search(rf"(?<!\w){re.escape(value)}(?!\w)", seen):
            yield flag
