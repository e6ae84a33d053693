"""The experiment: a year of the network for each preset, with the laws and the attackers of a measured red team."""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from assay.errors import UsageError
from assay.poc._noise import Law, default_noise
from assay.poc._pipelines import get_pipeline
from assay.poc.experiments._runs import open_run
from assay.poc.experiments.simulate._network import Kind, Network, simulate_network

__all__ = ["KINDS", "PRESETS", "SimulationPlan", "run_simulation"]

PRESETS = ("poc-2.0", "artifact", "hardened")
JUNK = tuple(Kind(f"{share:.1%} junk", junk=share) for share in (0.001, 0.005, 0.01, 0.02, 0.05, 0.1))

KINDS: dict[str, tuple[Kind, ...]] = {
    "poc-2.0": (Kind("int4 weights", 17.0), Kind("int8 weights", 1.4), Kind("half of the positions", 7.0)),
    "artifact": (Kind("int4 weights", 17.0), Kind("int8 weights", 1.4), Kind("half of the positions", 7.0)),
    "hardened": (Kind("int4 weights", 17.0), Kind("int8 weights", 1.4), Kind("three quarters of the positions", 16.0)),
}
"""Attackers by preset: residuals over the honest bfloat16 ones, as docs/redteam.md has them for the bundled models."""

Progress = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True)
class SimulationPlan:
    """What is simulated.

    Args:
        presets: of the rounds.
        network: its nodes, validators and rounds.
        dtype: of provers; validators have float32. The honest law is the stated default of this pair.

    Raises:
        UsageError: a preset is not among :data:`PRESETS`, or none is given.
    """

    presets: tuple[str, ...] = PRESETS
    network: Network = field(default_factory=Network)
    dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        odd = [preset for preset in self.presets if preset not in PRESETS]
        if odd or not self.presets:
            raise UsageError(
                f"presets {', '.join(odd) or 'none'}", wanted="some of " + ", ".join(PRESETS), do="leave them out"
            )

    def law(self, preset: str) -> Law:
        """Return the honest law that nodes follow and validators assume."""
        return default_noise(get_pipeline(preset).noise, self.dtype, "float32").law


def run_simulation(plan: SimulationPlan, folder: Path, *, progress: Progress | None = None) -> None:
    """Simulate the presets that a run's folder does not hold yet.

    Raises:
        UsageError: the folder holds a run of another network.
        StorageError: the file cannot be written.
    """
    settings: dict[str, Any] = {**asdict(plan.network), "dtype": plan.dtype}
    with open_run(folder, "simulate", settings) as run:
        todo = [preset for preset in plan.presets if preset not in run.done]
        for done, preset in enumerate(todo):
            started = time.perf_counter()
            rows = simulate_network(plan.network, plan.law(preset), (*KINDS[preset], *JUNK))
            run.append(preset, {"preset": preset, "seconds": round(time.perf_counter() - started, 1), "rows": rows})
            if progress:
                progress(done + 1, len(todo))
