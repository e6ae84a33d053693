"""The red team for served responses: cheats as programs, and the rivals on the same responses."""

from assay.research.responses._cheats import CHEATS, GREEDY, Cheat
from assay.research.responses._field import BYTES, OURS
from assay.research.responses._run import EXPERIMENT, ResponsesPlan, run_responses
from assay.research.responses._tables import (
    alarm_table,
    area_table,
    caught_table,
    honest_table,
    places,
    standing_table,
)

__all__ = [
    "BYTES",
    "CHEATS",
    "EXPERIMENT",
    "GREEDY",
    "OURS",
    "Cheat",
    "ResponsesPlan",
    "alarm_table",
    "area_table",
    "caught_table",
    "honest_table",
    "places",
    "run_responses",
    "standing_table",
]
