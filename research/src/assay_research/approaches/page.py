"""The approaches on the page of a run."""

from collections.abc import Sequence
from itertools import cycle

import numpy as np

from assay import stats
from assay.files.jsonl import JsonObject
from assay.pages.figures import INK, SERIES, figure, legend, style_axes
from assay.pages.html import Badge, BadgeKind, Cell, Report
from assay_research.runs.runs import RunRecords

_KINDS: dict[str, BadgeKind] = {"yes": "pass", "partly": "undecided", "no": "fail"}
_SHOWN = ("poc-2.0", "permutation", "hidden-reflections", "layer-normalize")


def draw(report: Report, run: RunRecords) -> None:
    """Add, per model, the distances against the law, the spread of the blocks, separability, cost and a plot."""
    report.section("Which approach breaks the structure of a trained model?")
    report.paragraph(
        "Distances of every approach against those of a random direction. An approach breaks the structure where "
        "neither the block means nor the spread of the blocks can be told from chance at 1 % each (yes), or where the "
        "spread is at least below the published limit of 5 % (partly)."
    )
    for model in dict.fromkeys(cell["model"] for cell in run.cells):
        cells = [cell for cell in run.cells if cell["model"] == model]
        _histograms(report, model, cells)
        _distances(report, model, cells)
        _separability(report, model, cells)
        _costs(report, model, cells)


def _distances(report: Report, model: str, cells: Sequence[JsonObject]) -> None:
    rows: list[list[Cell]] = []
    for cell in cells:
        main, tail = cell["spreads"]
        verdict = cell["breaks_structure"]
        rows.append(
            [
                cell["approach"],
                f"{cell['mean']:.4f}",
                f"{cell['std']:.4f}",
                f"{cell['p10']:.4f}",
                f"{cell['mean'] - cell['law']['mean']:+.4f}".replace("-", "−"),
                f"{cell['mean_off_in_standard_errors']:.1f}",
                f"{main['spread']:.1%}",
                _band(main["noise_band"]),
                f"{tail['spread']:.1%}",
                _band(tail["noise_band"]),
                _band(tail["band_of_states"]),
                Badge(verdict, _KINDS[verdict]),
            ]
        )
    first, second = (f"at {spread['rate']:.0%}" for spread in cells[0]["spreads"])
    headers = ["approach", "mean", "sd", "p10", "off the law", "largest offset in SE", f"spread {first}", "noise band"]
    headers += [f"spread {second}", "noise band", "band of its states", "breaks structure"]
    report.table(headers, rows, caption=f"{model}: {cells[0]['nonces']} nonces of {len(cells[0]['blocks'])} blocks")


def _band(ends: Sequence[float] | None) -> str | None:
    return None if ends is None else f"{ends[0]:.1%} to {ends[1]:.1%}"


def _separability(report: Report, model: str, cells: Sequence[JsonObject]) -> None:
    rows: list[list[Cell]] = [
        [
            cell["approach"],
            f"{cell['honest_residual']:.2g}",
            f"{cell['int4_residual']:.2g}",
            f"{cell['separation']:.1f}",
            f"{cell['auc']:.3f}",
            "{:.3f} to {:.3f}".format(*cell["auc_interval"]),
            None if cell["effective_dimension"] is None else f"{cell['effective_dimension']:.0f}",
        ]
        for cell in cells
    ]
    headers = ("approach", "honest bf16", "int4 weights", "ratio", "AUC", "95 % interval", "effective dimension")
    report.table(headers, rows, caption=f"{model}: residuals against a float32 validator, medians")


def _costs(report: Report, model: str, cells: Sequence[JsonObject]) -> None:
    rows: list[list[Cell]] = [
        [
            cell["approach"],
            f"{cell['bytes_per_nonce'] / 1024:.1f}",
            f"{cell['bytes_per_block'] / 2**20:.2f}",
            None if cell["overhead"] is None else f"{cell['overhead']:.1%}",
            cell["per_nonce"],
            cell["tensor_parallel"],
            cell["pipeline_parallel"],
        ]
        for cell in cells
    ]
    headers = ("approach", "KiB per nonce", "MiB per block", "overhead", "per nonce", "TP-safe", "PP-safe")
    with report.details(f"{model}: what each approach costs"):
        report.table(headers, rows, caption=f"{model}: random numbers, and time over the plain forward pass")


def _histograms(report: Report, model: str, cells: Sequence[JsonObject]) -> None:
    chosen = [cell for cell in cells if cell["approach"] in _SHOWN] or list(cells)[:4]
    fig, first = figure(6.8, 1.5 + 1.2 * len(chosen))
    first.remove()
    axes = fig.subplots(len(chosen), 1, sharex=True, squeeze=False)[:, 0]
    for ax, cell, colour in zip(axes, chosen, cycle(SERIES), strict=False):
        ax.set_facecolor("none")
        style_axes(ax)
        counts = np.array(cell["histogram"]["counts"], dtype=float)
        edges = np.linspace(cell["histogram"]["low"], cell["histogram"]["high"], len(counts) + 1)
        density = counts / counts.sum() / np.diff(edges)
        ax.stairs(density, edges, fill=True, alpha=0.45, color=colour, label=cell["approach"])
        mean, width = cell["law"]["mean"], 4 * cell["law"]["std"]
        x = np.linspace(mean - width, mean + width, 200)
        ax.plot(x, stats.chord_pdf(x, cell["dimension"]), color=INK, linewidth=1.1)
        legend(ax, loc="upper right")
    axes[-1].set_xlabel("distance to the target")
    report.figure(fig, f"{model}: densities of the distances of {len(chosen)} approaches; lines show the chord law.")
