"""``assay demo``: both instruments on a bundled model, in under a minute on two cores."""

import time
from typing import TYPE_CHECKING, Any

import typer

from assay.cli import _demo_poc, _demo_vhack
from assay.cli._output import JsonFlag, emit_json, progress_bar, table
from assay.cli._settings import settings
from assay.cli._vhack_check import check_table

if TYPE_CHECKING:
    from assay.cli._plain_settings import DemoSettings


@settings("assay.cli._plain_settings:DemoSettings")
def demo(chosen: "DemoSettings", as_json: JsonFlag = False) -> None:
    """Prove and verify real compute, catch four cheaters, test hack directions, and write an HTML report."""
    from assay.models import load_model
    from assay.reports import Report

    chosen.output.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    loaded = load_model(chosen.model)
    with progress_bar("honest nodes") as progress:
        honest = _demo_poc.run_honest(loaded, progress)
    with progress_bar("cheaters") as progress:
        cheaters = _demo_poc.run_cheaters(loaded, honest, progress)
    with progress_bar("hack directions", "samples") as progress:
        checked = _demo_vhack.run_checks(loaded, progress)
    seconds = time.perf_counter() - started
    honest[0].proof.save(chosen.output / "proof.jsonl", overwrite=True)
    page = chosen.output / "report.html"
    report = Report("assay on a bundled model", f"Proof of Compute and v_hack in {seconds:.0f} s", command="assay demo")
    _demo_poc.draw(report, loaded, honest, cheaters)
    _demo_vhack.draw(report, loaded, checked)
    report.write(page)
    caught = sum(case.verdict.fraud for case in cheaters)
    passed = sum(case.verdict.honest for case in honest)
    if as_json:
        values: dict[str, Any] = {
            "honest": _demo_poc.summary(honest),
            "cheaters": _demo_poc.summary(cheaters),
            "all_as_expected": passed == len(honest) and caught == len(cheaters),
            "vhack": _demo_vhack.summary(checked),
        }
        emit_json("assay.demo/1", {**values, "seconds": round(seconds, 1), "report": str(page)})
        return
    table(_demo_poc.COLUMNS, _demo_poc.rows([*honest, *cheaters]), title="Proof of Compute")
    table(*check_table(checked), title="v_hack")
    for check in checked.checks:
        if check.verdict != "pass":
            typer.echo(f"{check.title}: {check.reason}")
    held = sum(check.verdict == "pass" for check in checked.checks)
    typer.echo(
        f"{passed} of {len(honest)} honest nodes passed, {caught} of {len(cheaters)} cheaters caught\n"
        f"v_hack: {held} of {len(checked.checks)} checks passed    both in {seconds:.0f} s"
    )
    typer.echo(f"report: {page}    a proof to verify yourself: {chosen.output / 'proof.jsonl'}")
