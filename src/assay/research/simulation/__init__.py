"""A year of a network under each verdict rule: false accusations, time to catch, junk that is paid for."""

from assay.research.simulation._network import RULES, Kind, Network, simulate_network
from assay.research.simulation._run import COLUMNS, KINDS, PRESETS, SimulationPlan, run_simulation, table_rows

__all__ = [
    "COLUMNS",
    "KINDS",
    "PRESETS",
    "RULES",
    "Kind",
    "Network",
    "SimulationPlan",
    "run_simulation",
    "simulate_network",
    "table_rows",
]
