"""``assay vhack fuzz``: hostile programs and reports against the grader."""

import shlex
import sys
from typing import TYPE_CHECKING

import typer

from assay.cli.commands import App
from assay.cli.output import JsonFlag, emit_json, progress_bar, table
from assay.cli.settings import settings

if TYPE_CHECKING:
    from assay.cli.plain_settings import FuzzSettings
    from assay.vhack.environment.fuzz import FuzzReport


_SCHEMA = "assay.vhack.fuzz/1"
_COLUMNS = (
    *("cases", "accepted", "exploited", "raised", "timed_out", "overflowed", "crashed"),
    *("grader_raised", "ended_a_step", "graded_as_right"),
)


def add_to(app: App) -> None:
    """Add the command to the group of v_hack."""
    app.command(epilog="Example: assay vhack fuzz --count 1000")(fuzz)


@settings("assay.cli.plain_settings:FuzzSettings")
def fuzz(chosen: "FuzzSettings", context: typer.Context, as_json: JsonFlag = False) -> None:
    """Grade hostile programs and reports in the sandbox. Exit code 0 if the grader holds, 1 if not, 2 on bad input."""
    from assay.files.jsonl import dumps
    from assay.files.storage import check_new_file, write_atomic
    from assay.pages.provenance import provenance
    from assay.vhack.environment.backends import available_backend
    from assay.vhack.environment.fuzz import fuzz as run_fuzz
    from assay.vhack.environment.hostile import HOSTILE_KINDS
    from assay.vhack.environment.types import Limits

    if chosen.output:
        check_new_file(chosen.output, overwrite=True)
    with progress_bar("grading", "cases") as progress:
        report = run_fuzz(
            chosen.count,
            seed=chosen.seed,
            kinds=chosen.kinds or HOSTILE_KINDS,
            limits=Limits(seconds=chosen.seconds),
            workers=chosen.workers,
            progress=progress,
        )
    values = {"seed": chosen.seed, "seconds": chosen.seconds, "backend": available_backend(), **report.as_dict()}
    if chosen.output:
        origin = {"command": shlex.join(["assay", *sys.argv[1:]]), **provenance()}
        write_atomic(chosen.output, dumps({"schema": _SCHEMA, **origin, **values}) + "\n")
    if as_json:
        emit_json(_SCHEMA, values)
    else:
        _print(report)
    context.exit(0 if report.holds else 1)


def _print(report: "FuzzReport") -> None:
    rows = [
        (kind, *(found[name] for name in _COLUMNS)) for kind, found in [*report.counts.items(), ("all", report.total)]
    ]
    said = "the grader holds" if report.holds else "the grader does not hold"
    title = f"{said}: {report.total['cases']} hostile cases and {report.honest} honest programs"
    table(("kind", *(name.replace("_", " ") for name in _COLUMNS)), rows, title=title)
    for case, did in report.failures:
        typer.echo(f"{case}: {did}")
