"""How the command line speaks: results on stdout, everything else on stderr."""

import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from shutil import get_terminal_size
from textwrap import fill
from typing import Any, TextIO

import click
from rich.box import HEAVY_HEAD
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from assay.errors import AssayError, in_one_line, visible
from assay.loading_progress import listening

# Columns of a file or a pipe, which have no width of their own.
WIDEST = 1000
HEIGHT = 24  # lines, for which rich would ask the terminal
# Characters; names and reasons that assay writes are shorter.
LONGEST_CELL = 500
COLUMN = 90  # characters of a reason in a line of a file
LONGEST_WORD = 16  # characters; a longer word is folded before rows are pulled apart
BORDER = 3  # characters that a column has beside its text
MOMENT = 1.0  # seconds of loading that need no word
# Seconds between two lines of progress where there is no terminal.
PAUSE = 5.0
# How a cell of numbers begins: 0.95 (0.9 to 1), ≤ 3, 16 s, but no hash and no version.
NUMBER = re.compile(r"[-+−<≤>≥~]? ?\d[\d,]*(\.\d+)?(?![\w.])")


def emit_json(schema: str, values: dict[str, Any]) -> None:
    """Print one JSON object with its schema field on stdout."""
    emit_document({"schema": schema, **values})


def emit_document(values: dict[str, Any]) -> None:
    """Print one JSON object that names its schema itself on stdout."""
    click.echo(json.dumps(values, allow_nan=False))


def show_tables(
    schema: str,
    values: dict[str, Any],
    as_json: bool,
    *tables: tuple[Sequence[str], Sequence[Sequence[object]], str],
) -> None:
    """Print values as one JSON object, or tables of them: columns, rows and title of each."""
    if as_json:
        emit_json(schema, values)
        return
    for columns, rows, title in tables:
        table(columns, rows, title)


def show_text(schema: str, values: dict[str, Any], as_json: bool, text: str) -> None:
    """Print values as one JSON object, or a text that says the same."""
    if as_json:
        emit_json(schema, values)
    else:
        click.echo(text)


def show_values(
    schema: str, values: dict[str, Any], as_json: bool, *, title: str = "value"
) -> None:
    """Print named values as one JSON object, or as a table of those that are not empty."""
    rows = [
        (name.replace("_", " "), _short(value))
        for name, value in values.items()
        if value is not None and value not in ("", [], ())
    ]
    show_tables(schema, values, as_json, (("", title), rows, ""))


def _short(value: object) -> object:
    """Return a number with three digits as a person reads it, and other values as they are."""
    if isinstance(value, float):
        return f"{value:.3g}"
    if isinstance(value, list | tuple):
        return ", ".join(str(_short(item)) for item in value)
    return value


def say(text: str) -> None:
    """Print a line on stderr, with control characters written out.

    What cannot be said there is lost, as a verdict must not hang on it.
    """
    with suppress(OSError, ValueError):
        click.echo(visible(text, len(text)), err=True)


def errors(error: AssayError) -> None:
    """Print an error in its three parts on stderr, or as JSON where ``ASSAY_ERRORS=json``."""
    parts = {name: getattr(error, name) for name in ("seen", "wanted", "do")}
    as_json = os.environ.get("ASSAY_ERRORS") == "json"
    text = json.dumps({"error": type(error).__name__, **parts}) if as_json else f"error: {error}"
    say(text)


def table(columns: Sequence[str], rows: Sequence[Sequence[object]], title: str = "") -> None:
    """Print a table on stdout: boxed on a terminal, plain lines into a file or pipe.

    On a terminal that is too narrow for three columns, every row is a table of its own.
    """
    boxed = _is_terminal(sys.stdout)
    # Rich itself takes COLUMNS=0 for a width, and a dumb terminal for one of 80 columns.
    console = Console(width=get_terminal_size().columns if boxed else WIDEST, height=HEIGHT)
    texts = [["" if cell is None else _text_of(cell) for cell in row] for row in rows]
    shown = Table(header_style="bold", box=HEAVY_HEAD if boxed else None)
    for index, column in enumerate(columns):
        cells = [text[index] for text in texts if text[index]]
        is_numbers = index > 0 and all(NUMBER.match(cell) for cell in cells)
        shown.add_column(
            Text(in_one_line(column, LONGEST_CELL)),
            justify="right" if is_numbers else "left",
            overflow="fold",
            no_wrap=index == 0 and all(len(cell) <= console.width // 2 for cell in cells),
        )
    needed = 1 + sum(
        BORDER + min(max(map(len, " ".join(cells).split()), default=0), LONGEST_WORD)
        for cells in zip(columns, *texts, strict=True)
    )
    # Rich would fold a title at the width of the table.
    click.echo(in_one_line(title), file=sys.stdout, nl=bool(title))
    if len(columns) > 2 and needed > console.width:
        for row in rows:
            table((columns[0], str(row[0])), list(zip(columns[1:], row[1:], strict=True)))
        return
    for text in texts:
        shown.add_row(*map(Text, text))
    with console.capture() as capture:
        console.print(shown)
    # Rich itself would end at a broken pipe with exit code 1, and that means fraud here.
    # By itself click writes UTF-8 to a stream in ASCII.
    click.echo("\n".join(map(str.rstrip, capture.get().splitlines())), file=sys.stdout)


class Lines(str):
    """Text of a cell in several lines; line breaks of other cells are written out."""

    __slots__ = ()


def in_column(text: str) -> str:
    """Return a text in lines of whole words for a file; a terminal folds it at its own width."""
    if _is_terminal(sys.stdout):
        return text
    return Lines(fill(text, COLUMN, break_on_hyphens=False, break_long_words=False))


def _text_of(cell: object) -> str:
    if isinstance(cell, Lines):
        return visible(cell, LONGEST_CELL)
    return in_one_line(str(cell), LONGEST_CELL)


def _is_terminal(stream: TextIO | None) -> bool:
    return stream is not None and stream.isatty()  # a closed stream is None


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(_rate(task.speed, task.fields["unit"]) if task.speed else "")


def _rate(rate: float, unit: str) -> str:
    return f"{rate:.1f} {unit}/s" if rate >= 1 else f"{1 / max(rate, 1e-9):.1f} s each"


_bars: list[Progress] = []  # what is on the terminal now


@contextmanager
def progress_bar(label: str, unit: str = "nonces") -> Iterator[Callable[[int, int], None]]:
    """Show a progress bar on stderr; without a terminal that can, a line every few seconds."""
    console = Console(stderr=True)
    # Rich alone shows nothing where a terminal cannot move its cursor, as that of an editor.
    if not (_is_terminal(sys.stderr) and console.is_interactive):
        # The first update, which may come long after a model loads, and the first step after it.
        marks: list[tuple[float, int]] = []
        spoke = 0.0

        def show(count: int, total: int) -> None:
            nonlocal spoke
            now = time.monotonic()
            if not marks:
                marks.append((now, count))
                spoke = now
                return
            # The first step may compile kernels, and says little about those that follow.
            begun, before = marks[-1]
            at_most = "at most " if len(marks) == 1 else ""
            if at_most and count > before:
                marks.append((now, count))
            if now - spoke >= PAUSE:
                spoke = now
                rate = (count - before) / max(now - begun, 1e-9)
                remaining = f", {at_most}{(total - count) / rate:.0f} s left" if rate > 0 else ""
                say(f"{label}: {count} of {total} {unit}, {_rate(rate, unit)}{remaining}")

        yield show
        return
    with ExitStack() as stack:
        # A terminal has one at a time, of several lines.
        if not _bars:
            stack.callback(_bars.clear)
            progress = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                _Rate(),
                TimeRemainingColumn(),
                console=console,
                transient=True,
            )
            _bars.append(stack.enter_context(progress))
        bar = _bars[0]
        task = bar.add_task(label, total=None, unit=unit)
        stack.callback(bar.remove_task, task)
        yield lambda count, total: bar.update(task, completed=count, total=total)


@contextmanager
def loading_bar() -> Iterator[None]:
    """Show how far a model is loaded, where that takes longer than a moment."""
    with ExitStack() as stack:
        begun: dict[str, float] = {}
        update: list[Callable[[int, int], None]] = []

        def listener(label: str, count: int, total: int) -> None:
            lasted = time.monotonic() - begun.setdefault(label, time.monotonic())
            if not update and lasted > MOMENT and count < total:
                update.append(stack.enter_context(progress_bar(label, "million")))
            for show in update:
                show(count // 10**6, total // 10**6)
            if count == total:
                stack.close()
                update.clear()
                begun.clear()

        with listening(listener):
            yield
