"""The root of the command line: shared options, configuration, and what becomes of errors."""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from io import TextIOWrapper
from pathlib import Path
from typing import Annotated, Any

import typer

from assay._version import __version__
from assay.cli import demo as _demo
from assay.cli import doctor as _doctor
from assay.cli import models as _models
from assay.cli import poc as _poc
from assay.cli import research as _research
from assay.cli import streams as _streams
from assay.cli import vhack as _vhack
from assay.cli.commands import CONTINUES, App, Group, Stopped, in_assay_words
from assay.cli.output import errors
from assay.cli.usage import ParserError, in_three_parts
from assay.errors import AssayError, UsageError

LONGEST_CONFIG = 2**20  # bytes; one that sets every flag has twenty thousand


class _Root(Group):
    """The root command, which turns errors of the parser and the operating system into assay errors and exit codes."""

    def make_context(self, *arguments: Any, **options: Any) -> Any:
        with _answered():
            return super().make_context(*arguments, **options)

    def invoke(self, context: Any) -> Any:
        with _answered():
            return super().invoke(context)


@contextmanager
def _answered() -> Iterator[None]:
    """Raise the parser's and the system's errors as assay's, before typer answers a closed pipe with code 1: fraud."""
    try:
        yield
    except ParserError as error:
        raise in_three_parts(error) or error from None
    except BrokenPipeError:
        raise _ReaderLeft from None
    except OSError as error:
        raise in_assay_words(error) from error


app = App(
    name="assay",
    cls=_Root,
    help="Measure what a language model really computed, and what its training really learns.",
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "auto_envvar_prefix": "ASSAY"},
)
app.command("demo", epilog="Example: assay demo -o demo")(_demo.demo)
app.command("doctor", epilog="Example: assay doctor --json")(_doctor.doctor)
app.add_typer(_streams.app, name="streams")
app.add_typer(_poc.app, name="poc")
app.add_typer(_vhack.app, name="vhack")
app.add_typer(_models.app, name="models")
app.add_typer(_research.app, name="research")


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"assay {__version__}")
        raise typer.Exit


@app.callback()
def root(
    context: typer.Context,
    config: Annotated[
        Path | None,
        typer.Option(
            help="Configuration file (TOML); a table per command, such as [poc.prove].", envvar="ASSAY_CONFIG"
        ),
    ] = None,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", is_eager=True, callback=_show_version)
    ] = False,
) -> None:
    """Read the configuration file before any command sees its options."""
    context.default_map = _load_config(config, context.command)


def run(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit code.

    0 success or honest, 1 fraud or a failed check, 2 bad input or undecided, 128 + n stopped by signal n (141: the
    reader of stdout left).
    """
    command = typer.main.get_command(app)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # what a terminal of another encoding has no sign for is escaped
            stream.reconfigure(errors="backslashreplace")
    try:
        with _stoppable():
            command.main(args=arguments, prog_name="assay")
    except SystemExit as done:
        return done.code if isinstance(done.code, int) else 0
    except AssayError as error:
        errors(error)
        _drop_output()
        return 2
    except Stopped as stop:
        typer.echo(f"stopped; {CONTINUES}" if stop.resumable else "stopped", err=True)
        return 128 + stop.number
    except _ReaderLeft:
        _drop_output()
        return 128 + signal.SIGPIPE
    return 0


def _drop_output() -> None:
    """Give up what stdout does not take: Python would complain again when it flushes at exit."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class _ReaderLeft(BaseException):
    """Nobody reads our stdout any more."""


@contextmanager
def _stoppable() -> Iterator[None]:
    """Turn the two signals into an exception, unless the shell said to ignore them."""
    caught: list[Stopped] = []

    def stop(number: int, frame: object) -> None:
        caught.append(Stopped(number))
        raise caught[-1]

    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        for number, handler in previous.items():
            if handler is not signal.SIG_IGN:
                signal.signal(number, stop)
        yield
    except Exception as error:
        if caught:  # a library may raise an error of its own where the signal met it
            raise caught[-1] from error
        raise
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _load_config(path: Path | None, command: Any) -> dict[str, Any]:
    chosen = path or _user_config()
    if chosen is None:
        return {}
    from assay.files.toml import parse_toml

    try:
        return _defaults(parse_toml(_read_config(chosen)), command)
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(
            f"configuration file {chosen}: {error}",
            wanted='a readable TOML file, for instance [poc.prove] with model = "reference:qwen3"',
            do="correct the file, or leave --config out",
        ) from None


def _read_config(path: Path) -> str:
    """Return the text of the file, which may be a pipe, and is read no further than its bound."""
    with path.open("rb") as file:
        text = file.read(LONGEST_CONFIG + 1)
    if len(text) > LONGEST_CONFIG:
        raise ValueError(f"more than {LONGEST_CONFIG} bytes")
    return text.decode("utf-8")


def _user_config() -> Path | None:
    """The user's own file, if there is one that can be seen."""
    try:
        folder = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config")
        found = folder / "assay" / "config.toml"
        return found if found.is_file() else None
    except (OSError, RuntimeError):  # there is no home directory, or it cannot be read
        return None


def _defaults(table: dict[str, Any], command: Any) -> dict[str, Any]:
    """Return a table as the parser wants it: keys are written like flags (seq-len) or like names (seq_len).

    Raises:
        ValueError: A key is no command or flag, or is a table where a value should be, or the other way round.
    """
    commands = getattr(command, "commands", {})
    flags = {_name(flag): parameter.name for parameter in command.params for flag in parameter.opts}
    found = {}
    for key, value in table.items():
        if isinstance(value, dict) and key in commands:
            found[key] = _defaults(value, commands[key])
        elif not isinstance(value, dict) and _name(key) in flags:
            found[flags[_name(key)]] = value
        else:
            raise ValueError(f"{key} is not a {'command' if isinstance(value, dict) else 'flag'} of {command.name}")
    return found


def _name(flag: str) -> str:
    return flag.lstrip("-").replace("-", "_")
