"""Trained against random weights on the page of a run."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from assay.reports import MUTED, SERIES, Badge, Cell, JsonObject, Report, figure, legend
from assay.research.runs import RunRecords, section
from assay.research.weights._weights import WeightRow, weight_rows

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["draw"]


@section("weights")
def draw(report: Report, run: RunRecords) -> None:
    """Add block means per weight mode, their spread with its noise band, and a plot."""
    rows = weight_rows(run.cells)
    report.section("Does training give distances their structure?")
    report.paragraph(
        f"Block means of the distance ({run.settings['preset']}) with trained weights, with all weights drawn anew for "
        "every block, and with the input embeddings alone drawn anew. A head that is tied to the embeddings changes "
        "with them."
    )
    report.figure(_plot(run.cells), "Mean distance per block, with two standard errors, against the chord law.")
    _table(report, rows)


def _table(report: Report, rows: Sequence[WeightRow]) -> None:
    cells: list[list[Cell]] = [
        [
            row.model,
            row.weights,
            ", ".join(f"{mean:.4f}" for mean in row.means),
            f"{row.std:.4f}",
            f"{row.spread:.4f}",
            f"{row.low:.4f} to {row.high:.4f}",
            f"{row.p_value:.2g}",
            f"{row.context_effect:.2g}",
            Badge("inside noise", "pass") if row.inside else Badge("beyond noise", "fail"),
        ]
        for row in rows
    ]
    headers = ("model", "weights", "block means", "sd", "spread", "noise band, 95 %", "p", "context", "verdict")
    report.table(headers, cells, caption="Largest minus smallest block mean of the distance")
    report.paragraph(
        "Context: how far the unit state moves when the positions before the last are reversed; unrelated states are "
        "√2 apart. Near zero, the model passes its last input through, and distances say nothing about its layers."
    )


def _plot(cells: Sequence[JsonObject]) -> "Figure":
    fig, ax = figure(6.8, 3.2)
    modes = list(dict.fromkeys(cell["weights"] for cell in cells))
    models = list(dict.fromkeys(cell["model"] for cell in cells))
    for index, mode in enumerate(modes):
        for place, model in enumerate(models):
            chosen = [cell for cell in cells if (cell["model"], cell["weights"]) == (model, mode)]
            x = [place + 0.25 * (index - 1) + 0.05 * i for i in range(len(chosen))]
            error = [2 * cell["std"] / math.sqrt(cell["nonces"]) for cell in chosen]
            label = mode if place == 0 else None
            means = [cell["mean"] for cell in chosen]
            ax.errorbar(x, means, error, fmt="o", color=SERIES[index], markersize=5, capsize=3, label=label)
    ax.axhline(cells[0]["law"]["mean"], color=MUTED, linewidth=1, linestyle=":")
    ax.set_xticks(range(len(models)), models)
    ax.set_ylabel("mean distance of a block")
    legend(ax)
    return fig
