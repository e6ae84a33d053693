"""``assay demo``: both instruments on a bundled model, in under a minute on two cores."""

import os
import time
from typing import TYPE_CHECKING, Any

import typer

from assay.cli import _demo_poc
from assay.cli._output import JsonFlag, emit_json, progress_bar, table
from assay.cli._settings import settings, without_collection
from assay.cli._vhack import check_table, print_checks

if TYPE_CHECKING:
    from assay.cli._plain_settings import DemoSettings
    from assay.models import Model
    from assay.reports import Cell, Report
    from assay.vhack.checks import CheckReport

PAIRS = 40  # the least for which lda passes every check on the bundled models
DRAWS = {"n_null": 49, "n_splits": 10, "n_resamples": 1000}  # half of those of `assay vhack check`


@settings("assay.cli._plain_settings:DemoSettings")
def demo(chosen: "DemoSettings", as_json: JsonFlag = False) -> None:
    """Prove and verify real compute, catch four cheaters, test hack directions, and write an HTML report."""
    # Threads of torch that wait for work would otherwise keep a core busy, which a machine with other work has not.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    with without_collection():
        _run(chosen, as_json)


def _run(chosen: "DemoSettings", as_json: bool) -> None:
    from assay.models import load_model, model_info
    from assay.reports import Report

    model_info(chosen.model)  # before a directory is made
    chosen.output.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    loaded = load_model(chosen.model)
    with progress_bar("honest nodes") as progress:
        honest = _demo_poc.run_honest(loaded, progress)
    with progress_bar("cheaters") as progress:
        cheaters = _demo_poc.run_cheaters(loaded, honest, progress)
    with progress_bar("hack directions", "samples") as progress:
        checked = _run_checks(loaded, progress)
    seconds = time.perf_counter() - started
    honest[0].proof.save(chosen.output / "proof.jsonl", overwrite=True)
    page = chosen.output / "report.html"
    report = Report("assay on a bundled model", f"Proof of Compute and v_hack in {seconds:.0f} s", command="assay demo")
    _demo_poc.draw(report, loaded, honest, cheaters)
    _draw_checks(report, loaded, checked)
    report.write(page)
    caught = sum(case.verdict.fraud for case in cheaters)
    passed = sum(case.verdict.honest for case in honest)
    if as_json:
        values: dict[str, Any] = {
            "honest": _demo_poc.summary(honest),
            "cheaters": _demo_poc.summary(cheaters),
            "all_as_expected": passed == len(honest) and caught == len(cheaters),
            "vhack": _summary(checked),
        }
        emit_json("assay.demo/1", {**values, "seconds": round(seconds, 1), "report": str(page)})
        return
    table(_demo_poc.COLUMNS, _demo_poc.rows([*honest, *cheaters]), title="Proof of Compute")
    print_checks(checked, title="v_hack")
    held = sum(check.verdict == "pass" for check in checked.checks)
    typer.echo(
        f"{passed} of {len(honest)} honest nodes passed, {caught} of {len(cheaters)} cheaters caught\n"
        f"v_hack: {held} of {len(checked.checks)} checks passed    both in {seconds:.0f} s"
    )
    typer.echo(f"report: {page}    a proof to verify yourself: {chosen.output / 'proof.jsonl'}")


def _run_checks(model: "Model", progress: _demo_poc.Progress | None) -> "CheckReport":
    """Extract gradients of generated pairs and run the checks, whole task groups held out."""
    from assay.streams import dtype_name
    from assay.vhack import pair_gradients, weight_svd
    from assay.vhack.checks import CheckSettings, check_gradients
    from assay.vhack.pairs import generate_pairs

    # As on a GPU: factors in bfloat16 where the weights are, from the quicker decomposition, which measures its error.
    factors = "bfloat16" if dtype_name(model.dtype) == "bfloat16" else None
    svd = weight_svd(model, dtype=factors, method="gram")
    gradients = pair_gradients(generate_pairs(PAIRS), model, svd=svd, progress=progress)
    return check_gradients(gradients, settings=CheckSettings(method="lda", **DRAWS))


def _summary(report: "CheckReport") -> list[dict[str, object]]:
    """Return JSON-ready values for every check."""
    return [
        {"name": check.name, "verdict": check.verdict, "value": check.measured.value if check.measured else None}
        for check in report.checks
    ]


def _draw_checks(report: "Report", model: "Model", checked: "CheckReport") -> None:
    """Add the checks as a table."""
    from assay.reports import Badge

    report.section("v_hack: do the hack directions hold on tasks they were not made from?")
    report.paragraph(
        f"{PAIRS} generated pairs, same prompt and same correct solution; one side cheats its test, the other does "
        f"not. Gradients of {model.reference} were taken in the singular basis of every weight matrix, in "
        f"{model.dtype}. Directions come from some task groups and are scored on the others."
    )
    columns, rows = check_table(checked)
    cells: list[list[Cell]] = [[*row[:-1], Badge(row[-1], row[-1])] for row in rows]  # type: ignore[arg-type]
    report.table(columns, cells)
    report.paragraph(
        "The pairs are generated and the tasks are small, so this is a demonstration. `assay vhack check` tests "
        "pairs of your own with twice the draws and gives the full report, with rules, nulls and intervals."
    )
