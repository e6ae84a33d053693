"""What a command refuses before it begins: misspelt variables, and results that would replace their sources."""

import os
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from assay.cli.usage import spellings
from assay.errors import UsageError

PREFIX = "ASSAY_"
_NEAR = 0.9  # of a name: one letter, or two that changed places; no two documented names of different commands
_RESULTS = ("output", "html", "graded")
_EXTENDED = "merge"
"""The parameter that is a source and may be the result: builds are added to a calibration file."""


def refuse_misspelt(context: Any, parameters: Sequence[Any], settings: Iterable[str]) -> None:
    """Refuse variables that were meant for a command and that it does not read.

    These are variables with the prefix of the command, and others that are nearly one of its names. Kubernetes and
    its like set variables of their own that begin with the name of a service, so no others are refused.

    Args:
        context: Context of the command.
        parameters: Parameters of the command.
        settings: Variables of settings that have no flag.

    Raises:
        UsageError: Names the variable, and the one that was probably meant.
    """
    own = f"{context.auto_envvar_prefix}_"
    known = {name for parameter in parameters for name in _names(parameter, own)} | set(settings)
    words = sorted(name.removeprefix(own) for name in known if name.startswith(own))
    shared = sorted(name for name in known if not name.startswith(own))
    of_commands = tuple(f"{PREFIX}{name.upper()}_" for name in context.find_root().command.commands)
    for name in sorted(os.environ):
        if not name.startswith(PREFIX) or name in known:
            continue
        if is_own := name.startswith(own) and not _of_another(name, context):
            near = [f"{own}{word}" for word in get_close_matches(name.removeprefix(own), words, n=1)]
        else:
            near = [] if name.startswith(of_commands) else get_close_matches(name, shared, n=1, cutoff=_NEAR)
        if near or is_own:
            hint = f"did you mean {near[0]}? Else unset" if near else "unset"
            raise UsageError(
                f"the variable {name}",
                wanted=f"one that {context.command_path} reads",
                do=f"{hint} it; docs/configuration.md has all of them",
            )


def _names(parameter: Any, own: str) -> Iterable[str]:
    """Return the variables that set a parameter."""
    named = getattr(parameter, "envvar", None) or ()
    return (*([named] if isinstance(named, str) else named), f"{own}{parameter.name.upper()}")


def _of_another(name: str, context: Any) -> bool:
    """Return whether a variable has the prefix of a command whose name begins with that of this one."""
    others = (other for other in context.parent.command.commands if other.startswith(f"{context.info_name}-"))
    prefixes = (f"{context.parent.auto_envvar_prefix}_{other.replace('-', '_').upper()}_" for other in others)
    return name.startswith(tuple(prefixes))


def refuse_own_sources(parameters: Sequence[Any], values: Mapping[str, Any]) -> None:
    """Refuse a result that would replace a file from which it is made, or another result.

    Raises:
        UsageError: Names both flags.
    """
    flags = spellings(parameters)
    for result in (name for name in _RESULTS if isinstance(values.get(name), Path)):
        for name, given in values.items():
            if name in (result, _EXTENDED) or name not in flags:
                continue
            for one in given if isinstance(given, list | tuple) else [given]:
                if isinstance(one, Path | str) and _same_file(values[result], Path(one)):
                    raise UsageError(
                        f"{flags[result]} {values[result]}, which is {flags[name]} too",
                        wanted="a file of its own for every result",
                        do=f"choose another name with {flags[result]}",
                    )


def _same_file(result: Path, other: Path) -> bool:
    """Return whether two paths are one file, or will be; a directory may hold both."""
    try:
        return result.resolve() == other.resolve() and not result.is_dir()
    except (OSError, ValueError, RuntimeError):  # a text that is no path, or links that lead to themselves
        return False
