"""Write a man page for every command: ``python scripts/man_pages.py``, or ``make man``; they go to
build/man/man1.

``man -M build/man assay-poc-prove`` shows one. The parser makes no such pages itself, so they are
made from its tree.
"""

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from assay import __version__
from assay.cli import app

OUT = Path(__file__).parents[1] / "build" / "man" / "man1"
STATUS = (
    ("0", "Success. Of a judgement: honest, or every check passes."),
    ("1", "Fraud, or a check that fails. Nothing else ends with 1."),
    ("2", "Undecided, or bad input, which is said in three parts: seen, wanted, to do."),
    ("128 + n", "Stopped by signal n."),
)


def pages(command: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, str]]:
    """Yield name and text of the page of a command, and of those in it."""
    children = getattr(command, "commands", {})
    yield "-".join(("assay", *path)), page(command, path, children)
    for name, child in children.items():
        yield from pages(child, (*path, name))


def page(command: Any, path: tuple[str, ...], children: dict[str, Any]) -> str:
    """Return the source of one page."""
    name, (summary, *rest) = "-".join(("assay", *path)), paragraphs(command)
    params = command.get_params(click.Context(command))
    options = [one for one in params if one.param_type_name == "option" and not one.hidden]
    arguments = [one for one in params if one.param_type_name == "argument"]
    settings = getattr(command, "settings", {})
    usage = [
        "[options]",
        *("command" for _ in list(children)[:1]),
        *(one.name.upper() for one in arguments),
    ]
    lines = [
        f'.TH "{plain(name.upper())}" 1 "" "assay {plain(__version__)}" "assay"',
        ".ad l",
        ".SH NAME",
        f"{plain(name)} \\- {text(re.split(r'[.:] ', summary)[0].rstrip('.'))}",
        ".SH SYNOPSIS",
        f"\\fB{plain(' '.join(('assay', *path)))}\\fR {plain(' '.join(usage))}",
        ".SH DESCRIPTION",
        "\n.PP\n".join(text(one) for one in (summary, *rest)),
    ]
    lines += section(
        "COMMANDS", ((plain(child), text(paragraphs(made)[0])) for child, made in children.items())
    )
    lines += section(
        "ARGUMENTS", ((plain(one.name.upper()), text(settings[one.name].help)) for one in arguments)
    )
    lines += section("OPTIONS", (described(one) for one in options))
    shown = [settings[one.name] for one in options if one.name in settings]
    variables = [(one.kind.environment_name(one.name), one.spelling) for one in shown]
    lines += section(
        "ENVIRONMENT", ((plain(variable), plain(flag)) for variable, flag in variables if variable)
    )
    if command.epilog:
        lines += [".SH EXAMPLE", ".nf", plain(command.epilog.removeprefix("Example: ")), ".fi"]
    lines += section("EXIT STATUS", ((code, text(meaning)) for code, meaning in STATUS))
    related = [(*path, child) for child in children] or [path[:-1]]
    others = ", ".join(f"\\fB{plain('-'.join(('assay', *one)))}\\fR(1)" for one in related)
    return "\n".join((*lines, ".SH SEE ALSO", others, ""))


def paragraphs(command: Any) -> list[str]:
    """Return the help of a command, a paragraph on each line."""
    return [" ".join(one.split()) for one in (command.help or "").split("\n\n")]


def described(option: click.Option) -> tuple[str, str]:
    """Return how an option is written, and its meaning with its default."""
    written = plain(", ".join(option.opts)) + (
        "" if option.is_flag else f" \\fI{plain(option.metavar or 'VALUE')}\\fR"
    )
    return written, text(option.help or "")


def section(title: str, entries: Any) -> list[str]:
    """Return a list under a heading, or nothing where it has no entry."""
    made = [part for name, meaning in entries for part in (".TP", f"\\fB{name}\\fR", meaning)]
    return [f".SH {title}", *made] if made else []


def text(words: str) -> str:
    """Return a paragraph as roff, with what stands in backticks in bold."""
    return re.sub(r"`([^`]*)`", r"\\fB\1\\fR", plain(words))


def plain(words: str) -> str:
    """Return words in which roff sees no command."""
    escaped = words.replace("\\", "\\e").replace("-", "\\-")
    return f"\\&{escaped}" if escaped.startswith((".", "'")) else escaped


def main() -> int:
    """Write the pages."""
    OUT.mkdir(parents=True, exist_ok=True)
    for old in OUT.glob("assay*.1"):
        old.unlink()
    for name, source in pages(app):
        (OUT / f"{name}.1").write_text(source, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
