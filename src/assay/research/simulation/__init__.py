"""A year of a network under each verdict rule: false accusations, time to catch, junk that is paid for."""

from assay.research.simulation._network import RULES, Kind, Network, simulate_network
from assay.research.simulation._page import COLUMNS, draw, table_rows
from assay.research.simulation._run import KINDS, PRESETS, SimulationPlan, run_simulation

__all__ = [
    "COLUMNS",
    "KINDS",
    "PRESETS",
    "RULES",
    "Kind",
    "Network",
    "SimulationPlan",
    "draw",
    "run_simulation",
    "simulate_network",
    "table_rows",
]
