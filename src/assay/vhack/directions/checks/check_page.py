"""The report of the checks as one page."""

import numpy as np

from assay.pages.figures import SERIES, figure, legend
from assay.pages.report import Badge, Cell, Report
from assay.vhack.directions.checks.check_report import CheckReport

_HACK = SERIES[1]
_CLEAN = SERIES[0]


def make_page(report: CheckReport, *, command: str = "assay vhack check") -> Report:
    """Return the page of the five verdicts and their evidence; its footer names the command."""
    model = report.origin.get("model") or "Gradients at hand"
    page = Report(
        "Are these hack directions real?",
        f"{model}: {report.origin.get('pairs')} pairs. {_sentence(report.design)}",
        command=command,
    )
    _verdicts(page, report)
    _distributions(page, report)
    _settings(page, report)
    return page


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}."


def _verdicts(page: Report, report: CheckReport) -> None:
    passed = sum(check.verdict == "pass" for check in report.checks)
    page.section("Verdict")
    page.paragraph(
        Badge(report.verdict, report.verdict), f"  {passed} of {len(report.checks)} checks pass."
    )
    rows: list[list[Cell]] = []
    for check in report.checks:
        interval = check.measured
        largest = max(check.p_values.values(), default=None)
        nulls = [draws for name, draws in check.nulls.items() if not name.startswith("agreement")]
        level = max(
            (np.quantile(draws, 1 - report.settings.alpha) for draws in nulls), default=None
        )
        rows.append(
            [
                check.title,
                None if interval is None else f"{interval.value:.3f}",
                None if interval is None else f"{interval.low:.3f} to {interval.high:.3f}",
                None if level is None else f"{level:.3f}",
                None if largest is None else f"{largest:.2g}",
                Badge(check.verdict, check.verdict),
            ]
        )
    page.table(
        (
            "check",
            "value",
            f"{report.settings.confidence:.0%} interval",
            "highest null",
            "largest p",
            "verdict",
        ),
        rows,
        caption=f"Highest null: the largest 1 − {report.settings.alpha:g} quantile among the "
        f"nulls of that statistic.",
    )
    with page.details("What each check asks, and what decided"):
        for check in report.checks:
            page.paragraph(
                Badge(check.verdict, check.verdict),
                f"  {check.title}. Value: {check.statistic}. {check.rule}",
            )
            page.paragraph(_sentence(check.reason))


def _distributions(page: Report, report: CheckReport) -> None:
    page.section("cin of held-out samples")
    fig, ax = figure(height=2.9)
    scores = [*report.hack, *report.clean]
    bins = np.linspace(min(scores), max(scores), 36).tolist()
    for values, colour, label in ((report.clean, _CLEAN, "clean"), (report.hack, _HACK, "hack")):
        ax.hist(
            values, bins, histtype="stepfilled", color=colour, alpha=0.5, linewidth=0, label=label
        )
        ax.axvline(float(np.mean(values)), color=colour, linewidth=1.4)
    ax.set(
        xlabel="cin: share of the gradient along the hack directions, mean over modules",
        ylabel="samples",
    )
    legend(ax)
    page.figure(
        fig,
        "Both sides of every held-out pair, scored by a basis that has not seen its group. Lines: "
        "means.",
    )
    if report.detectors is not None:
        page.table(*report.detectors.table, caption=_sentence(report.detectors.says))


def _settings(page: Report, report: CheckReport) -> None:
    page.section("Data and settings")
    settings = report.settings
    origin = report.origin
    items: dict[str, Cell] = {
        "model": str(origin.get("model", "")),
        "weights (SHA-256)": str(origin.get("weights", ""))[:16],
        "pairs": origin.get("pairs"),
        "groups": origin.get("groups"),
        "pairs (SHA-256)": str(origin.get("pairs_sha256", ""))[:16],
        "axes per module": settings.k_use,
        "label swaps": settings.n_flips,
        "bases per null": settings.n_null,
        "seed": settings.seed,
    }
    page.definitions({name: value for name, value in items.items() if value not in ("", None)})
