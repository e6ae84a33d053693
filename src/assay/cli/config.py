"""``assay config``: the configuration file of a command, with every setting and its default."""

import json
from typing import Annotated

import click
from pydantic import Field

from assay.cli.framework import Command, Group
from assay.errors import UsageError
from assay.settings import Flag, Settings


class ConfigSettings(Settings):
    """Settings of ``assay config``."""

    command: Annotated[tuple[str, ...], Flag(argument=True)] = Field(description="Words of a command: poc prove.")


def print_config(chosen: ConfigSettings) -> None:
    """Print the configuration file of a command.

    It has every setting of the command with its default, as a comment: remove the # before one to change it. Pass the
    file to the command with --config; one file may have the tables of several commands.
    """
    context = click.get_current_context()
    found: click.Command | None = context.find_root().command
    for word in chosen.command:
        found = found.get_command(context, word) if isinstance(found, Group) else None
    words = " ".join(chosen.command)
    if not isinstance(found, Command) or not found.settings:
        raise UsageError(words, wanted="the words of a command that has settings", do="`assay config poc prove`")
    click.echo(text(found, chosen.command))


def text(command: Command, words: tuple[str, ...]) -> str:
    """Return a configuration file with a table for one command."""
    lines = [f"# Settings of `assay {' '.join(words)}`; pass this file with --config.", f"[{'.'.join(words)}]"]
    for name, one in command.settings.items():
        if one.flag.argument:
            continue
        required = " Required." if one.field.is_required() else ""
        lines += ["", f"# {(one.field.description or '').splitlines()[0]}{required}"]
        shown = "…" if one.default is None else json.dumps(one.default, ensure_ascii=False)
        lines.append(f"# {name} = {shown}")
    return "\n".join(lines)


config = Command("config", print_config, (ConfigSettings,), example="assay config poc prove > prove.toml")
