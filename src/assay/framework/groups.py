"""Groups of commands, those that other packages add among them."""

from collections.abc import Callable, Collection, Iterator
from importlib.metadata import entry_points
from typing import Any, TypeVar

import click

from assay.errors import UsageError
from assay.framework.advice import nearest
from assay.framework.commands import Command
from assay.settings import Settings

EXTENSIONS = "assay.commands"
"""Entry-point group of commands that other packages add, by the words that call them: ``poc
experiment``.
"""

F = TypeVar("F", bound=Callable[..., Any])


class Group(click.Group):
    """A group of commands, in whose help they stand under their panels.

    Args:
        path: Words that call the group, such as ``poc ledger``; empty for the root.
        help: What the commands are for.
        panel: Heading under which the help of the group above lists this one.
        elsewhere: Names of commands that another package adds where it is installed.
    """

    def __init__(
        self,
        path: str,
        help: str,
        *,
        panel: str = "Commands",
        elsewhere: Collection[str] = (),
        **options: Any,
    ) -> None:
        super().__init__(
            path.rpartition(" ")[2] or "assay", help=help, no_args_is_help=True, **options
        )
        self.path = path
        self.panel = panel
        self.elsewhere = elsewhere

    def add(self, name: str, *kinds: type[Settings] | str, **options: Any) -> Callable[[F], F]:
        """Return a decorator that makes a function a command of the group; see :class:`Command`."""

        def decorate(function: F) -> F:
            self.add_command(Command(name, function, kinds, **options))
            return function

        return decorate

    def group_of(self, name: str, help: str, **options: Any) -> "Group":
        """Return a new group inside this one."""
        group = Group(self._words(name), help, **options)
        self.add_command(group)
        return group

    def _words(self, name: str) -> str:
        return f"{self.path} {name}".strip()

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names of the commands, those of other packages included that are installed."""
        placed = (
            point.name.rpartition(" ")
            for point in entry_points(group=EXTENSIONS)
            if "-" not in point.name
        )
        return [*self.commands, *sorted(name for path, _, name in placed if path == self.path)]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Return a command, also one of another package."""
        if cmd_name in self.commands or cmd_name not in (*self.elsewhere, *self.list_commands(ctx)):
            return self.commands.get(cmd_name)
        loaded: click.Command = extension(self._words(cmd_name))
        return loaded

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Return the command that is called; name the nearest one where there is no such."""
        if self.get_command(ctx, args[0]) is None:
            places = _places(ctx.find_root().command, args[0])
            look = f"see {ctx.command_path} --help"
            raise UsageError(
                args[0],
                wanted=f"a command of {ctx.command_path}",
                do=f"did you mean assay {places[0]}? Else {look}"
                if places
                else nearest(args[0], self.list_commands(ctx), look),
            )
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the commands under their panels."""
        panels: dict[str, list[tuple[str, str]]] = {}
        for name in self.list_commands(ctx):
            command = self.get_command(ctx, name)
            assert command is not None
            panel = getattr(command, "panel", "Commands") if name in self.commands else "Research"
            panels.setdefault(panel, []).append((name, command.get_short_help_str(60)))
        for panel, rows in panels.items():
            with formatter.section(panel):
                formatter.write_dl(rows)


def _places(command: click.Command, word: str, path: str = "") -> list[str]:
    """Return the words that call the groups and commands of a name, below a command."""
    places = []
    for name, inner in command.commands.items() if isinstance(command, click.Group) else ():
        words = f"{path} {name}".strip()
        places += [words] if name == word else _places(inner, word, words)
    return places


def extension(words: str) -> Any:
    """Return what an installed package registers as a command under these words."""
    for point in entry_points(group=EXTENSIONS, name=words):
        return point.load()
    raise UsageError(
        f"assay {words}, which the package assay does not have",
        wanted="the package assay-research",
        do="install assay-research (research/ of the repository)",
    )


def leaves(
    group: click.Group, path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], Command]]:
    """Yield the words and the object of every command of the package below a group."""
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from leaves(command, (*path, name))
        elif isinstance(command, Command):
            yield (*path, name), command
