"""The experiment: a year of the network for each preset, with the laws and the attackers of a measured red team."""

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import Field

from assay.errors import UsageError
from assay.poc.protocol import get_pipeline
from assay.poc.verdict import MARGIN, Law, default_noise
from assay.research.runs import open_run
from assay.research.simulation._network import Kind, Network, simulate_network
from assay.settings import Names, Settings

__all__ = ["KINDS", "PRESETS", "SimulationPlan", "run_simulation"]

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

Progress = Callable[[int, int], None]


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
    with open_run(folder, "simulate", plan.network.model_dump()) as run:
        wanted = [(f"{preset}/{dtype}", preset, dtype) for dtype in plan.dtypes for preset in plan.presets]
        todo = [cell for cell in wanted if cell[0] not in run.done]
        for done, (key, preset, dtype) in enumerate(todo):
            started = time.perf_counter()
            rows = simulate_network(plan.network, plan.law(preset, dtype), plan.kinds(preset, dtype))
            seconds = round(time.perf_counter() - started, 1)
            run.append(key, {"preset": preset, "dtype": dtype, "seconds": seconds, "rows": rows})
            if progress:
                progress(done + 1, len(todo))
