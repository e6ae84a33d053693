"""The matrix on the page of a run."""

from typing import TYPE_CHECKING

from assay.reports import MUTED, SERIES, Badge, Cell, Report, figure, legend
from assay.research.matrix._table import PUBLISHED, PUBLISHED_LIMIT, Configuration, configurations
from assay.research.runs import RunRecords, section

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["draw"]


@section("matrix")
def draw(report: Report, run: RunRecords) -> None:
    """Add the table of valid rates, the spreads with their noise bands, a plot, and the throughput."""
    found = configurations(run.cells)
    several = [configuration for configuration in found if configuration.spread is not None]
    if several:
        report.section("Live services: how far apart are the blocks?")
        report.paragraph(
            f"{sum(len(row.rates) for c in several for row in c.blocks)} tests, each a round of a live service over "
            f"HTTP whose callbacks were counted. Expected by the chord law: {several[0].expected:.2%} valid."
        )
        report.figure(_plot(several), "Valid rate per block, with two standard errors of its nonces.")
        _spreads(report, several)
        for configuration in several:
            _rates(report, configuration)
    if found:
        report.section("Throughput of live services")
        _throughput(report, found)


def _spreads(report: Report, several: list[Configuration]) -> None:
    rows: list[list[Cell]] = []
    for row in several:
        spread = row.spread
        assert spread is not None
        band = f"{spread.low:.2%} to {spread.high:.2%}"
        badge = Badge(row.verdict, "pass" if spread.inside else "fail")
        published = _published_spread(row)
        rows.append([row.model, row.mode, f"{spread.value:.2%}", band, spread.p_text, published, badge])
    report.table(
        ("model", "mode", "spread", "noise band, 95 %", "p", "published", "verdict"),
        rows,
        caption="Largest minus smallest valid rate of the blocks",
    )
    report.paragraph(
        "The noise band is where the spread of these block means falls when nothing differs but the nonces and the "
        f"random head that every block draws. The published limit of success is {PUBLISHED_LIMIT:.0%}; the published "
        "spreads come from other models, so they are a comparison of kind, not of size."
    )


def _published_spread(row: Configuration) -> str:
    rates = next((r for (name, mode), r in PUBLISHED.items() if name in row.model and mode == row.mode), None)
    if rates is None:
        return ""
    means = [sum(block) / len(block) for block in rates]
    return f"{max(means) - min(means):.1f} %"


def _rates(report: Report, configuration: Configuration) -> None:
    keys = list(configuration.blocks[0].rates)
    rows = [
        [
            row.block,
            *(f"{row.rates[key]:.2%}" if key in row.rates else None for key in keys),
            f"{row.rate:.2%}",
            row.checked,
        ]
        for row in configuration.blocks
    ]
    title = f"{configuration.model}, {configuration.mode}: valid rate per key"
    with report.details(title):
        report.table(("block", *keys, "all", "nonces"), rows, caption=title)


def _plot(several: list[Configuration]) -> "Figure":
    fig, ax = figure(6.8, 3.4)
    labels = []
    for place, row in enumerate(several):
        for index, block in enumerate(row.blocks):
            error = 2 * (block.rate * (1 - block.rate) / block.checked) ** 0.5
            colour = SERIES[index % len(SERIES)]
            label = block.block if place == 0 else None
            x = place + (index - (len(row.blocks) - 1) / 2) * 0.18
            ax.errorbar(x, 100 * block.rate, 100 * error, fmt="o", color=colour, label=label, capsize=3, markersize=5)
        labels.append(f"{row.model}\n{row.mode}")
    ax.axhline(100 * several[0].expected, color=MUTED, linewidth=1, linestyle=":")
    ax.set_xticks(range(len(labels)), labels)
    ax.set_ylabel("valid nonces, %")
    legend(ax)
    return fig


def _throughput(report: Report, found: list[Configuration]) -> None:
    rows = [
        [
            row.model,
            row.mode,
            row.checked,
            f"{row.nonces_per_second:.1f}",
            f"{row.nonces_per_second_error:.1f}" if row.nonces_per_second_error else None,
            row.undelivered,
        ]
        for row in found
    ]
    report.table(("model", "mode", "nonces", "nonces/s", "sd over tests", "valid, not delivered"), rows)
