"""``assay vhack report``: the page of a check, or of training runs."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from assay.cli._output import JsonFlag, emit_json, table

if TYPE_CHECKING:
    from assay.research.study import ArmResult


def report(
    results: Annotated[
        list[Path],
        typer.Argument(
            help="Result that `assay vhack check -o` wrote; or logs of training runs, as files or directories."
        ),
    ],
    output: Annotated[Path, typer.Option("-o", "--output", help="Page to write.")],
    checks: Annotated[
        list[Path] | None, typer.Option("--check", help="Check to show beside logs; may be repeated.")
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Draw the page of an earlier check, or of training runs with their rates over steps and a final table."""
    from assay.reports import read_json
    from assay.research.study import read_logs, study_page, summarise
    from assay.vhack.checks import CheckReport, page

    if len(results) == 1 and results[0].suffix == ".json":
        read = CheckReport.from_dict(read_json(results[0]))
        page(read, command=f"assay vhack report {results[0]}").write(output)
        values = {"path": str(output), "verdict": read.verdict}
        if as_json:
            emit_json("assay.vhack.report/1", values)
        else:
            table(("", "value"), list(values.items()))
        return
    logs = read_logs(results)
    shown = [CheckReport.from_dict(read_json(path)) for path in checks or ()]
    command = " ".join(["assay vhack report", *(path.name for path in results)])
    study_page(logs, checks=shown, command=command).write(output)
    found = summarise(logs)
    if as_json:
        arms = [result.as_dict() for result in found]
        emit_json("assay.vhack.report/1", {"path": str(output), "runs": len(logs), "arms": arms})
    else:
        _print(found, output)


def _print(found: "list[ArmResult]", output: Path) -> None:
    rows = []
    for result in found:
        rates = [result.rates[name] for name in ("hack", "solve")]
        rows.append((result.condition, rates[0].n, *(rate.text for rate in rates), result.tipped.text, result.verdict))
    table(("condition", "seeds", "hack rate", "solve rate", "tipped", "verdict"), rows, title=str(output))
