"""The root of the command line: shared options, configuration, and what becomes of errors."""

import os
import signal
import sys
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from assay import __version__
from assay.cli import _demo, _doctor, _models, _poc, _streams, _vhack
from assay.cli._output import errors
from assay.errors import AssayError, UsageError

__all__ = ["app", "run"]

app = typer.Typer(
    name="assay",
    help="Measure what a language model really computed, and what its training really learns.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "auto_envvar_prefix": "ASSAY"},
)
app.command("demo")(_demo.demo)
app.command("doctor")(_doctor.doctor)
app.add_typer(_streams.app, name="streams")
app.add_typer(_poc.app, name="poc")
app.add_typer(_vhack.app, name="vhack")
app.add_typer(_models.app, name="models")


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
    context.default_map = _load_config(config)


def run(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit code.

    0 success or honest, 1 fraud or a failed check, 2 bad input or undecided, 128 + n stopped by signal n.
    """
    command = typer.main.get_command(app)
    try:
        with _stoppable():
            command.main(args=arguments, prog_name="assay")
    except SystemExit as done:
        return done.code if isinstance(done.code, int) else 0
    except AssayError as error:
        errors(error)
        return 2
    except _Stopped as stop:
        sys.stderr.write("stopped; long work is kept in its .partial file, and the same command continues it\n")
        return 128 + stop.number
    except BrokenPipeError:
        # The reader of our stdout left. Python would complain again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


class _Stopped(BaseException):
    """SIGINT or SIGTERM, as something that files and pools can clean up after."""

    def __init__(self, number: int) -> None:
        self.number = number


@contextmanager
def _stoppable() -> Iterator[None]:
    """Turn the two signals into an exception, unless the shell said to ignore them."""

    def stop(number: int, frame: object) -> None:
        raise _Stopped(number)

    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        for number, handler in previous.items():
            if handler is not signal.SIG_IGN:
                signal.signal(number, stop)
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _load_config(path: Path | None) -> dict[str, Any]:
    chosen = path or Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "assay" / "config.toml"
    if path is None and not chosen.is_file():
        return {}
    try:
        return _dashes_to_names(tomllib.loads(chosen.read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UsageError(
            f"configuration file {chosen}: {error}",
            wanted='a readable TOML file, for instance [poc.prove] with model = "reference:qwen3"',
            do="correct the file, or leave --config out",
        ) from None


def _dashes_to_names(table: dict[str, Any]) -> dict[str, Any]:
    """Let keys be written like flags (seq-len) or like names (seq_len)."""
    return {
        key.replace("-", "_"): _dashes_to_names(value) if isinstance(value, dict) else value
        for key, value in table.items()
    }
