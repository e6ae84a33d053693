"""``assay vhack check``: whether hack directions are real."""

from typing import TYPE_CHECKING

import typer

from assay.cli._output import JsonFlag, emit_json, progress_bar, table
from assay.cli._settings import settings

if TYPE_CHECKING:
    from assay.cli._vhack_settings import CheckCommand
    from assay.vhack.checks import CheckReport


@settings("assay.cli._vhack_settings:CheckCommand")
def check(chosen: "CheckCommand", context: typer.Context, as_json: JsonFlag = False) -> None:
    """Test hack directions on held-out pairs. Exit code 0 all pass, 1 a check fails, 2 undecided or bad input."""
    from assay.models import load_model
    from assay.reports import check_new_file, dumps, write_atomic
    from assay.vhack import Basis
    from assay.vhack import checks as vhack_checks
    from assay.vhack.pairs import find_pairs

    rules = vhack_checks.CheckSettings(**chosen.model_dump(include={"k_use", "alpha", "seed", "method"}))
    for path in filter(None, (chosen.output, chosen.html)):
        check_new_file(path, overwrite=True)
    found = find_pairs(chosen.pairs)
    entries = vhack_checks.read_source_log(chosen.log) if chosen.log else None
    read = Basis.load(chosen.basis) if chosen.basis else None
    if few := vhack_checks.too_few_groups(found, rules, read):
        typer.echo(f"warning: {few}", err=True)
    loaded = load_model(chosen.model, dtype=chosen.dtype, device=chosen.device)
    if chosen.basis:
        Basis.load(chosen.basis, loaded)  # of these weights
    with progress_bar("decompositions and gradients", "steps") as progress:
        result = vhack_checks.check(found, loaded, basis=read, settings=rules, log=entries, progress=progress)
    if chosen.output:
        write_atomic(chosen.output, dumps(result.as_dict()) + "\n")
    if chosen.html:
        vhack_checks.page(result, command=f"assay vhack check --model {chosen.model} --pairs {chosen.pairs}").write(
            chosen.html
        )
    if as_json:
        values = result.as_dict()
        emit_json(values.pop("schema"), values)
    else:
        _print(result)
    context.exit(result.exit_code)


def check_table(result: "CheckReport") -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Return the columns and the rows of a table of all checks. The p-value is the largest against any null."""
    rows: list[tuple[str, ...]] = []
    for made in result.checks:
        value = made.measured
        shown = ("", "") if value is None else (f"{value.value:.3f}", f"{value.low:.3f} to {value.high:.3f}")
        p = f"{max(made.p_values.values()):.2g}" if made.p_values else ""
        rows.append((made.title, *shown, p, made.verdict))
    return ("check", "value", f"{result.settings.confidence:.0%} interval", "largest p", "verdict"), rows


def _print(result: "CheckReport") -> None:
    table(*check_table(result), title=f"{result.verdict}: {result.design}")
    for made in result.checks:
        if made.verdict != "pass":
            typer.echo(f"{made.title}: {made.reason}")
