"""The experiment: a year of the network for each preset, with the laws and the attackers of a measured red team."""

import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import Field

from assay.errors import UsageError
from assay.poc.protocol import get_pipeline
from assay.poc.verdict import MARGIN, Law, default_noise
from assay.reports import SERIES, Cell, JsonObject, Report, figure, legend
from assay.research.runs import Progress, RunRecords, measure_missing
from assay.research.simulation._network import Kind, Network, simulate_network
from assay.settings import Names, Settings

PRESETS = ("poc-2.0", "artifact", "hardened")
JUNK = tuple(Kind(f"{share:.1%} junk", junk=share) for share in (0.001, 0.005, 0.01, 0.02, 0.05, 0.1))

KINDS: dict[str, dict[str, tuple[Kind, ...]]] = {
    "bfloat16": {
        "poc-2.0": (Kind("int4 weights", 17.0), Kind("int8 weights", 1.4), Kind("half of the positions", 7.0)),
        "artifact": (Kind("int4 weights", 17.0), Kind("int8 weights", 1.4), Kind("half of the positions", 7.0)),
        "hardened": (Kind("int4 weights", 17.0), Kind("int8 weights", 1.4), Kind("three quarters of the work", 14.0)),
    },
    "float16": {
        "poc-2.0": (Kind("int4 weights", 154.0), Kind("int8 weights", 9.7), Kind("half of the positions", 44.0)),
        "artifact": (Kind("int4 weights", 154.0), Kind("int8 weights", 9.7), Kind("half of the positions", 44.0)),
        "hardened": (Kind("int4 weights", 140.0), Kind("int8 weights", 9.1), Kind("three quarters of the work", 112.0)),
    },
}
"""Attackers by number format and preset: residuals over the honest ones, of the bundled models (docs/redteam.md)."""


class SimulationPlan(Settings):
    """What is simulated. The honest law is the stated default of a prover's dtype against float32.

    Raises:
        UsageError: A preset is not among :data:`PRESETS` or a dtype not in :data:`KINDS`, or a list is empty.
    """

    presets: Names = Field(PRESETS, description="Presets of the rounds, separated by commas.")
    dtypes: Names = Field(tuple(KINDS), description="Dtypes of provers, separated by commas; validators have float32.")
    network: Network = Field(Network(), description="Nodes, validators and rounds.")

    def model_post_init(self, context: Any, /) -> None:
        """Check the names."""
        for name, given, known in (("presets", self.presets, PRESETS), ("dtypes", self.dtypes, tuple(KINDS))):
            odd = [value for value in given if value not in known]
            if odd or not given:
                raise UsageError(
                    f"{name} {', '.join(odd) or 'none'}", wanted="some of " + ", ".join(known), do="leave them out"
                )

    def law(self, preset: str, dtype: str) -> Law:
        """Return the honest law that nodes follow and validators assume."""
        return default_noise(get_pipeline(preset).noise, dtype, "float32").law

    def kinds(self, preset: str, dtype: str) -> tuple[Kind, ...]:
        """Return the attackers. Theirs are multiples of measured noise, and the law has its margin over that."""
        return *(replace(kind, multiple=kind.multiple / MARGIN) for kind in KINDS[dtype][preset]), *JUNK


def run_simulation(plan: SimulationPlan, folder: Path, *, progress: Progress | None = None) -> None:
    """Simulate the presets and dtypes that a run's folder does not hold yet.

    Raises:
        UsageError: The folder holds a run of another network.
        StorageError: The file cannot be written.
    """
    cells = [
        (f"{preset}/{dtype}", partial(_simulate, plan, preset, dtype))
        for dtype in plan.dtypes
        for preset in plan.presets
    ]
    measure_missing(folder, "simulate", plan.network.model_dump(), cells, progress)


def _simulate(plan: SimulationPlan, preset: str, dtype: str) -> JsonObject:
    started = time.perf_counter()
    rows = simulate_network(plan.network, plan.law(preset, dtype), plan.kinds(preset, dtype))
    return {"preset": preset, "dtype": dtype, "seconds": round(time.perf_counter() - started, 1), "rows": rows}


COLUMNS = ("rule", "node", "convicted", "rounds, median", "rounds, 99 %", "paid")
_SHOWN = 1e-4  # least share on the logarithmic axis


def draw(report: Report, run: RunRecords) -> None:
    """Add what every rule does to every kind of node, and the junk that is paid for."""
    settings = run.settings
    report.section(f"A network of {settings['nodes']} nodes over {settings['rounds']} rounds")
    report.paragraph(
        f"Every round {settings['checkers']} of {settings['validators']} validators, drawn by stake, recompute "
        f"{settings['checked']} nonces of every node. 'Paid' is the share of the year's reward that nodes of a kind "
        "drew before they were convicted. An honest node should be paid 1."
    )
    for cell in run.cells:
        name = f"{cell['preset']}, {cell['dtype']}"
        _plot(report, name, cell)
        report.table(COLUMNS, table_rows(cell), caption=name)


def table_rows(cell: JsonObject) -> list[list[Cell]]:
    """Return the rows of :data:`COLUMNS` for one preset."""
    return [
        [
            row["rule"],
            row["kind"],
            f"{row['convicted']} of {row['nodes']}",
            row["rounds_median"] if row["rounds_median"] is not None else "never",
            row["rounds_99"] if row["rounds_99"] is not None else "never",
            f"{row['paid']:.2%}",
        ]
        for row in cell["rows"]
    ]


def _plot(report: Report, name: str, cell: JsonObject) -> None:
    fig, ax = figure()
    rules = list(dict.fromkeys(row["rule"] for row in cell["rows"]))
    for color, rule in zip(SERIES, rules, strict=False):
        rows = [row for row in cell["rows"] if row["rule"] == rule and row["junk"]]
        shares = [100 * row["junk"] for row in rows]
        ax.plot(shares, [100 * max(row["paid"], _SHOWN) for row in rows], "o-", color=color, label=rule)
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set_xlabel("invented share of a node's nonces, %")
    ax.set_ylabel("reward drawn in the year, %")
    legend(ax)
    report.figure(fig, f"{name}: share of invented nonces that is paid for, by verdict rule.")
