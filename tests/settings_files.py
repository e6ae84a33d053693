"""Settings that a command reads from its configuration file alone, written as words for brevity."""

import json
import tempfile
from pathlib import Path

from assay.cli import app
from assay.framework.commands import Command
from assay.framework.groups import Group


def with_file(*words, folder=None):
    """Return the words of a command, its settings without an option moved into a ``--config`` file.

    ``poc serve --drain 4`` becomes ``poc serve --config FILE``. A file that is named already stays
    as it is.
    """
    words = [str(word) for word in words]
    command, path = app, []
    while isinstance(command, Group) and len(path) < len(words):
        path.append(words[len(path)])
        command = command.commands.get(path[-1])
    if not isinstance(command, Command) or "--config" in words:
        return words
    options, keys = list(path), {}
    rest = iter(words[len(path) :])
    for word in rest:
        key = command.key_of(word)
        if key is None:
            options.append(word)
            continue
        setting = command.settings[key]
        value = True if setting.field.annotation is bool else next(rest)
        keys[key] = [*keys.get(key, []), value] if setting.repeats else value
    if not keys:
        return words
    file = Path(tempfile.mkdtemp(dir=folder)) / "settings.toml"
    lines = [f"{key} = {json.dumps(value)}\n" for key, value in keys.items()]
    file.write_text(f"[{'.'.join(path)}]\n{''.join(lines)}", encoding="utf-8")
    return [*options, "--config", str(file)]
