"""The root of the command line: groups of commands, shared options, and handling of errors."""

import json
import os
import signal
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import TextIOWrapper
from typing import Annotated, Any

import click
from click.shell_completion import shell_complete
from pydantic import Field

from assay._version import __version__
from assay.cli import calibrate, evaluate, ledger, pairs, pins, responses, selftest, serve  # noqa: F401  (each adds its commands)
from assay.cli.demo import DemoSettings, demo
from assay.cli.flags import ARGUMENT
from assay.cli.foundation import NumberSettings, doctor, models, streams
from assay.cli.poc import poc
from assay.cli.vhack import vhack
from assay.errors import AssayError, UsageError, visible
from assay.framework.advice import in_assay_words
from assay.framework.commands import CONTINUES, Command, in_three_parts
from assay.framework.groups import Group
from assay.framework.interruption import Stopped
from assay.framework.output import errors, say
from assay.settings import Settings


class ConfigSettings(Settings):
    """Settings of ``assay config``."""

    command: Annotated[tuple[str, ...], ARGUMENT] = Field(
        description="Words of a command: poc prove."
    )


def print_config(chosen: ConfigSettings) -> None:
    """Print the configuration file of a command.

    It has every setting of the command with its default, as a comment: remove the # before one to
    change it. Pass the file to the command with --config; one file may have the tables of several
    commands.
    """
    words = " ".join(chosen.command)
    target: click.Command | None = app
    for word in chosen.command:
        target = (
            target.get_command(click.get_current_context(), word)
            if isinstance(target, Group)
            else None
        )
    if not isinstance(target, Command) or not target.settings:
        raise UsageError(
            words, wanted="the words of a command that has settings", do="`assay config poc prove`"
        )
    lines = [
        f"# Settings of `assay {words}`; pass this file with --config.",
        f"[{'.'.join(chosen.command)}]",
    ]
    for name, setting in target.settings.items():
        if not setting.flag.argument:
            required = " Required." if setting.field.is_required() else ""
            default = json.dumps(setting.default, ensure_ascii=False)
            unit = "" if setting.unit == name.upper() else f" [{setting.unit}]"
            lines += [
                "",
                f"# {(setting.field.description or '').splitlines()[0]}{required}{unit}",
                f"# {name} = {'…' if setting.default is None else default}",
            ]
    click.echo("\n".join(lines))


app = Group(
    "",
    "Measure what a language model really computed, and what its training really learns.",
    elsewhere=("research",),
    context_settings={"help_option_names": ["-h", "--help"]},
)
click.version_option(__version__, message="assay %(version)s", help="Print the version and exit.")(
    app
)
for _command in (
    Command("demo", demo, (DemoSettings,), example="assay demo -o demo"),
    Command("doctor", doctor, example="assay doctor --json"),
    poc,
    vhack,
    models,
    Command(
        "streams",
        streams,
        (NumberSettings,),
        panel="Research",
        example="assay streams normal --seed-text block -n 4",
    ),
    Command(
        "config", print_config, (ConfigSettings,), example="assay config poc prove > prove.toml"
    ),
):
    app.add_command(_command)


def run(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit code.

    0 success or honest, 1 fraud or a failed check, 2 bad input or undecided, 128 + n stopped by
    signal n (141: the reader of stdout left).
    """
    for stream in (sys.stdout, sys.stderr):
        # What a terminal of another encoding has no sign for is escaped.
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    if instruction := os.environ.get("_ASSAY_COMPLETE"):
        with suppress(AssayError):  # behind words that are no command
            return shell_complete(app, {}, "assay", "_ASSAY_COMPLETE", instruction)
        return 2
    try:
        with _stoppable(), warnings.catch_warnings():
            # As commands print them, without a line of source.
            warnings.showwarning = lambda message, *_place, **_file: say(
                f"warning: {visible(str(message))}"
            )
            words = sys.argv[1:] if arguments is None else list(arguments)
            with app.make_context("assay", words) as context:
                app.invoke(context)
    except click.exceptions.Exit as exiting:
        return _ended(exiting.exit_code)
    except click.exceptions.NoArgsIsHelpError as error:
        say(error.format_message())
        return 2
    except click.UsageError as error:
        return _ended(2, in_three_parts(error))
    except (AssayError, OSError) as error:
        return _ended(2, error)
    except Stopped as stop:
        say(f"stopped; {CONTINUES}" if stop.resumable else "stopped")
        return 128 + stop.number
    return 0


def _ended(code: int, error: AssayError | OSError | None = None) -> int:
    """Say what went wrong, unless the reader of stdout has left; return the exit code once stdout
    has taken all.
    """
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except (
        OSError
    ) as unwritten:  # Python would complain at exit, when it flushes, and change the code
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 2
        error = error or unwritten
    if isinstance(error, BrokenPipeError):
        return 128 + signal.SIGPIPE
    if error is not None:
        errors(in_assay_words(error) if isinstance(error, OSError) else error)
    return code


@contextmanager
def _stoppable() -> Iterator[None]:
    """Turn the two signals into an exception, unless the shell said to ignore them."""
    caught: list[Stopped] = []

    def stop(number: int, frame: object) -> None:
        caught.append(Stopped(number))
        raise caught[-1]

    previous: dict[int, Any] = {
        number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        for number, handler in previous.items():
            if handler is not signal.SIG_IGN:
                signal.signal(number, stop)
        yield
    except Exception as error:
        # A library may raise an error of its own where the signal met it.
        if caught:
            raise caught[-1] from error
        raise
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
