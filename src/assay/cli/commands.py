"""The classes behind every command: what the environment may set, and what an interruption leaves behind."""

import errno
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import typer
from typer.core import TyperCommand, TyperGroup, TyperOption
from typer.main import get_command_from_info
from typer.models import CommandInfo

from assay.cli.guards import refuse_misspelt, refuse_own_sources
from assay.cli.settings import complete
from assay.cli.usage import name_flag
from assay.errors import AssayError, StorageError

CONTINUES = "what is done is kept, and the same command continues it"

F = TypeVar("F", bound=Callable[..., Any])
_FLAGS_ALONE = ("as_json", "install_completion", "show_completion")


class Stopped(BaseException):
    """SIGINT or SIGTERM, raised as an exception so that files and pools can clean up.

    Args:
        number: Number of the signal.
    """

    def __init__(self, number: int) -> None:
        self.number = number
        self.resumable = False


def in_assay_words(error: OSError) -> StorageError:
    """Return an error of the operating system in the three parts of every error."""
    from assay.files.storage import storage_error

    return storage_error(Path(str(error.filename or "output")), error)


class _Deliberate:
    """Parameters of which those that end a command or change the form of its output are read from flags alone.

    Without this, ``ASSAY_VERSION=1`` or ``ASSAY_POC_VERIFY_HELP=1`` would make ``assay poc verify`` print a text and
    exit with code 0, which means "honest".
    """

    def get_params(self, ctx: Any) -> list[Any]:
        """Return the parameters, with automatic environment names only where they may have one."""
        found: list[Any] = super().get_params(ctx)  # type: ignore[misc]
        for parameter in found:
            if isinstance(parameter, TyperOption):
                parameter.show_envvar = False  # docs/configuration.md lists the names
                if parameter.is_eager or parameter.name in _FLAGS_ALONE:
                    parameter.allow_from_autoenv = False
        return found


class Command(_Deliberate, TyperCommand):
    """A command of ``assay``, which gets the flags of its settings class when its parameters are first read."""

    _variables: tuple[str, ...] = ()

    @property
    def params(self) -> list[Any]:
        """The parameters."""
        function = complete(self.callback) if self.callback else None
        if function:
            made = get_command_from_info(
                CommandInfo(self.name, callback=function), pretty_exceptions_short=False, rich_markup_mode=None
            )
            self._params[:], self.callback = made.params, made.callback
            self._variables = function.variables  # type: ignore[attr-defined]
        return self._params

    @params.setter
    def params(self, params: list[Any]) -> None:
        self._params = params

    def invoke(self, ctx: Any) -> Any:
        """Run the command; name the flag in errors of the library, which knows only parameters."""
        refuse_misspelt(ctx, self.params, self._variables)
        refuse_own_sources(self.params, ctx.params)
        try:
            return super().invoke(ctx)
        except AssayError as error:
            name_flag(error, self.params, ctx.params)
            raise
        except BrokenPipeError:
            raise
        except OSError as error:
            found = in_assay_words(error)
            name_flag(found, self.params, ctx.params)
            raise found from error


class Resumable(Command):
    """A command that keeps what it has done and continues when it is repeated."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command; say of a signal or a full disk that nothing is lost."""
        try:
            return super().invoke(ctx)
        except Stopped as stop:
            stop.resumable = True
            raise
        except StorageError as error:
            if isinstance(error.__cause__, OSError) and error.__cause__.errno in (errno.ENOSPC, errno.EFBIG):
                raise StorageError(error.seen, wanted=error.wanted, do=f"{error.do}; {CONTINUES}") from error
            raise


class Group(_Deliberate, TyperGroup):
    """A group of commands of ``assay``."""


class App(typer.Typer):
    """A Typer app whose commands and groups are of the classes above."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"cls": Group, "no_args_is_help": True, **options})

    def command(self, name: str | None = None, **options: Any) -> "Callable[[F], F]":
        """Return the decorator that adds a command, by default a :class:`Command`."""
        return super().command(name, **{"cls": Command, **options})
