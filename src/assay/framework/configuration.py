"""A command's table of a configuration file."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from assay.errors import DataError, UsageError
from assay.files.toml import read_toml


def own_table(path: Path | None, context: click.Context, words: Sequence[str]) -> dict[str, Any]:
    """Return a command's table of a configuration file, such as ``[poc.prove]``; else empty."""
    if path is None:
        return {}
    try:
        # Not by the source of pydantic-settings, whose parser bounds neither keys nor numbers, and
        # which takes a missing file for an empty one.
        tables = read_toml(path)
    except DataError as error:
        error.do += " (--config)"
        raise
    command: click.Command | None = context.find_root().command
    for word in words:
        assert isinstance(command, click.Group)
        names = command.list_commands(context)
        for key, value in tables.items():
            if key not in names or not isinstance(value, dict):
                raise UsageError(
                    f"configuration file {path}: {key} is not a "
                    f"{'command' if isinstance(value, dict) else 'table'} of {command.name}",
                    wanted="a TOML file with a table per command, as `assay config COMMAND` "
                    "prints it",
                    do="correct the file, or leave --config out",
                )
        tables = tables.get(word, {})
        command = command.get_command(context, word)
    return tables
