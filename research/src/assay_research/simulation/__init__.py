"""A year of a network under each verdict rule: false accusations, time to catch cheaters, and junk that is paid."""

from assay.research.simulation._lives import Grid, Kind, Machines, ManyLives, SizeEvidence, convicted_in, draw_round
from assay.research.simulation._network import Network, SimulationPlan, run_simulation, simulate_network
from assay.research.simulation._page import cell_name, draw, honest_table, year_table

__all__ = [
    "Grid",
    "Kind",
    "Machines",
    "ManyLives",
    "Network",
    "SimulationPlan",
    "SizeEvidence",
    "cell_name",
    "convicted_in",
    "draw",
    "draw_round",
    "honest_table",
    "run_simulation",
    "simulate_network",
    "year_table",
]
