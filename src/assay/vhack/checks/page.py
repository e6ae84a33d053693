"""The report of the checks as one page."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from assay.pages.report import INK, MUTED, SERIES, Badge, Cell, Report, figure, legend
from assay.vhack.checks.judge import HAAR, CheckReport, FloatArray

if TYPE_CHECKING:
    from matplotlib.axes import Axes


_HACK, _CLEAN = SERIES[1], SERIES[0]


def make_page(report: CheckReport, *, command: str = "assay vhack check") -> Report:
    """Return the page of the five verdicts with the evidence for each; the footer names the command."""
    model = report.origin.get("model") or "Gradients at hand"
    subtitle = f"{model}: {report.origin.get('pairs')} pairs. {_sentence(report.design)}"
    made = Report("Are these hack directions real?", subtitle, command=command)
    _verdicts(made, report)
    _distributions(made, report)
    _evidence(made, "Against random bases", report, "random_null", _random_bases)
    _evidence(made, "cin by source", report, "sources", _sources)
    _evidence(made, "Angles between bases of two halves", report, "stability", _angles)
    _settings(made, report)
    return made


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}."


def _evidence(
    made: Report, heading: str, report: CheckReport, name: str, draw: Callable[[Report, CheckReport], None]
) -> None:
    """Add the section of a check: its evidence, or the reason why it was not measured."""
    made.section(heading)
    if report[name].measured is None:
        made.paragraph(_sentence(report[name].reason))
    else:
        draw(made, report)


def _verdicts(made: Report, report: CheckReport) -> None:
    passed = sum(check.verdict == "pass" for check in report.checks)
    made.section("Verdict")
    made.paragraph(Badge(report.verdict, report.verdict), f"  {passed} of {len(report.checks)} checks pass.")
    rows: list[list[Cell]] = []
    for check in report.checks:
        found, largest = check.measured, max(check.p_values.values(), default=None)
        nulls = [draws for name, draws in check.nulls.items() if not name.startswith("agreement")]
        level = max((np.quantile(draws, 1 - report.settings.alpha) for draws in nulls), default=None)
        shown: list[Cell] = [f"{found.value:.3f}", f"{found.low:.3f} to {found.high:.3f}"] if found else [None, None]
        shown += [None if level is None else f"{level:.3f}", None if largest is None else f"{largest:.2g}"]
        rows.append([check.title, *shown, Badge(check.verdict, check.verdict)])
    made.table(
        ("check", "value", f"{report.settings.confidence:.0%} interval", "highest null", "largest p", "verdict"),
        rows,
        caption=f"Highest null: the largest 1 − {report.settings.alpha:g} quantile among the nulls of that statistic.",
    )
    with made.details("What each check asks, and what decided"):
        for check in report.checks:
            badge = Badge(check.verdict, check.verdict)
            made.paragraph(badge, f"  {check.title}. Value: {check.statistic}. {check.rule}")
            made.paragraph(_sentence(check.reason))


def _distributions(made: Report, report: CheckReport) -> None:
    made.section("cin of held-out samples")
    fig, ax = figure(height=2.9)
    both = [*report.hack, *report.clean]
    bins = np.linspace(min(both), max(both), 36).tolist()
    for values, colour, label in ((report.clean, _CLEAN, "clean"), (report.hack, _HACK, "hack")):
        ax.hist(values, bins, histtype="stepfilled", color=colour, alpha=0.5, linewidth=0, label=label)
        ax.axvline(float(np.mean(values)), color=colour, linewidth=1.4)
    ax.set(xlabel="cin: share of the gradient along the hack directions, mean over modules", ylabel="samples")
    legend(ax)
    made.figure(fig, "Both sides of every held-out pair, scored by a basis that has not seen its group. Lines: means.")
    if report.detectors is not None:
        made.table(*report.detectors.table, caption=_sentence(report.detectors.says))


def _random_bases(made: Report, report: CheckReport) -> None:
    check = report["random_null"]
    measured = check.measured
    assert measured is not None
    fig, ax = figure(height=2.6)
    generator = np.random.default_rng(0)
    names = list(check.nulls)
    for row, name in enumerate(names):
        draws = check.nulls[name]
        ax.scatter(draws, row + generator.uniform(-0.2, 0.2, len(draws)), s=7, color=MUTED, alpha=0.55, linewidths=0)
    ax.axvspan(measured.low, measured.high, color=_HACK, alpha=0.18, linewidth=0)
    ax.axvline(measured.value, color=_HACK, linewidth=1.6, label="this basis, with its interval")
    ax.axvline(0.5, color=INK, linewidth=0.8, linestyle=":")
    ax.set_yticks(range(len(names)), names)
    ax.invert_yaxis()
    ax.set_xlabel("AUROC on the same held-out samples")
    ax.grid(axis="y", visible=False)
    legend(ax, loc="lower left", bbox_to_anchor=(0, 1.0))
    made.figure(fig, "Every dot is a basis of the same size that was made without hack labels.")
    scores = check.details.get("z_scores", {})
    made.definitions({f"z against {name}": f"{value:.1f}" for name, value in scores.items()})


def _sources(made: Report, report: CheckReport) -> None:
    details = report["sources"].details
    hack, clean = (np.array(details[name]) for name in ("cin_hack", "cin_clean"))
    if "steps" in details:
        fig, ax = figure(height=2.8)
        ax.plot(details["steps"], hack, color=_HACK, linewidth=1.4, label="hack source")
        ax.plot(details["steps"], clean, color=_CLEAN, linewidth=1.4, label="clean source")
        ax.set(xlabel="step", ylabel="cin")
        caption = "cin of the gradient of each source, step by step."
    else:
        order = np.argsort(hack - clean)
        fig, ax = figure(height=1.0 + 0.17 * max(len(hack), 4))
        rows = np.arange(len(hack))
        ax.hlines(rows, clean[order], hack[order], color=MUTED, linewidth=0.9, alpha=0.6)
        ax.scatter(clean[order], rows, s=22, color=_CLEAN, label="clean", zorder=3)
        ax.scatter(hack[order], rows, s=22, color=_HACK, label="hack", zorder=3)
        ax.set_yticks(rows, [details["groups"][i][:28] for i in order])
        ax.tick_params(axis="y", labelsize=7.5)
        ax.grid(axis="y", visible=False)
        ax.set_xlabel("cin")
        caption = "cin of the summed gradient of all hack sides, and of all clean sides, of each held-out group."
    legend(ax, loc="lower left", bbox_to_anchor=(0, 1.0), ncols=2)
    made.figure(fig, caption)


def _angles(made: Report, report: CheckReport) -> None:
    check, origin = report["stability"], report.origin
    fig, ax = figure(height=2.6)
    random = float(np.mean(check.nulls[HAAR])) ** 0.5
    _line(ax, origin["cosines"], _HACK, "hack basis, other half")
    _line(ax, origin["generic_cosines"], _CLEAN, "clean-clean basis, other half")  # of few pairs, with fewer axes
    ax.axhline(random, color=INK, linewidth=0.8, linestyle=":", label="random bases")
    ax.set(xlabel="principal angle", ylabel="cosine, mean over modules", ylim=(0, 1.02))
    ax.set_xticks(range(1, len(origin["cosines"]) + 1))
    legend(ax)
    made.figure(fig, f"Mean over {check.details['splits']} random divisions of the groups into two halves.")
    made.definitions({"agreement on which way is hack-ward (cosine)": f"{check.details['agreement']:.3f}"})


def _line(ax: "Axes", values: FloatArray | Sequence[float], colour: str, label: str) -> None:
    ax.plot(np.arange(1, len(values) + 1), values, "o-", color=colour, linewidth=1.4, label=label)


def _settings(made: Report, report: CheckReport) -> None:
    made.section("Data and settings")
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
    made.definitions({name: value for name, value in items.items() if value not in ("", None)})
