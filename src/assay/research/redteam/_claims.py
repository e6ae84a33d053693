"""What a node can do with results instead of with the model: invent some, hug the tolerance, replay, select.

Legend of shapes: N nonces, R trials.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from assay import stats
from assay.poc.protocol import RANDOM_HEAD_ROWS
from assay.research.redteam._attacks import ATTACKS, Invented, OnEngine
from assay.research.redteam._detect import Pool, detection, mixed
from assay.research.redteam._field import Field, Reading

__all__ = ["claims", "screened"]

JUNK_SHARES = (0.01, 0.02, 0.05, 0.1, 0.2)
MULTIPLES = (1.0, 1.5, 2.0, 3.0)
SCREENS = ("first 50.0% dropped", "first 75.0% dropped", "first 87.5% dropped")
R_TARGETS = (1.416, 1.404)
DRAWN = 200_000

FloatArray = npt.NDArray[np.float64]


def claims(field: Field, nonces: int) -> list[dict[str, Any]]:
    """Measure every claim against every preset it applies to; one row each."""
    return [*_junk(field, nonces), *_hugging(field), *_replays(field, nonces), *_selective(field, nonces)]


def _junk(field: Field, nonces: int) -> Iterator[dict[str, Any]]:
    """A share of the nonces is invented: the best constant for distances, a random vector else."""
    for reading in field.readings:
        x_ND = reading.states(Invented(field.scene), field.engine, nonces)
        for preset in reading.presets:
            invented_N = reading.residuals(preset, x_ND)
            if preset == "poc-2.0":
                invented_N = stats.chord_mean(RANDOM_HEAD_ROWS) - reading.published(preset, reading.recomputed(nonces))
            for share in JUNK_SHARES:
                pool = mixed(share, invented_N, field.honest_residuals[preset][1])
                yield {"claim": f"{share:.0%} invented", "preset": preset, **_row(field, preset, pool, 1 - share)}


def _hugging(field: Field) -> Iterator[dict[str, Any]]:
    """Honest results with the noise made larger, as far as it goes."""
    for preset, (_, testing_N) in field.honest_residuals.items():
        for multiple in MULTIPLES:
            pool = Pool(((1.0, multiple * testing_N),))
            name = f"{multiple:g} times the honest noise"
            yield {"claim": name, "preset": preset, **_row(field, preset, pool, 1.0)}


def _replays(field: Field, nonces: int) -> Iterator[dict[str, Any]]:
    """The honest results of another node, or of the same node in another block."""
    for name, change in (("another key", {"public_key": "node_B"}), ("another block", {"block_hash": "block_beta"})):
        for reading in field.readings:
            theirs = Reading(field.validator, replace(reading.round, **change), reading.presets)  # type: ignore[arg-type]
            x_ND = theirs.states(OnEngine(field.engine), field.engine, nonces)
            for preset in reading.presets:
                received = theirs.published(preset, x_ND)
                difference = received - reading.published(preset, reading.recomputed(nonces))
                residuals_N = difference if difference.ndim == 1 else np.linalg.norm(difference, axis=1)
                pool = Pool(((1.0, residuals_N),))
                yield {"claim": f"replay of {name}", "preset": preset, **_row(field, preset, pool, 0.0)}


def _selective(field: Field, nonces: int) -> Iterator[dict[str, Any]]:
    """Only nonces that a cheap look says are valid get the honest pass; whatever is handed in is exact."""
    reading = field.readings[0]
    for attack in ATTACKS:
        if attack.name not in SCREENS:
            continue
        program = attack.make(field.scene)
        residuals_N = reading.residuals("poc-2.0", reading.states(program, field.engine, nonces))
        for r_target in R_TARGETS:
            kept, cost = screened(residuals_N, program.cost, r_target)
            yield {
                "claim": f"screening, {attack.name}, {stats.valid_rate(r_target, RANDOM_HEAD_ROWS):.0%} valid",
                "preset": "poc-2.0",
                "cost": cost,
                "kept": kept,
                "sequential_99": None,
                "counting_99": None,
            }


def screened(residuals_N: FloatArray, cost: float, r_target: float, *, seed: int = 0) -> tuple[float, float]:
    """Simulate screening: a cheap distance decides whether the exact one is computed at all.

    Args:
        residuals_N: Cheap minus exact distance.
        cost: Cost of the cheap pass over that of the honest one.
        r_target: Distance below which a nonce counts.
        seed: Seed of the simulation.

    Returns:
        The share of the valid nonces that are found, and the work per found nonce over that of an honest node.
    """
    rng = np.random.default_rng(seed)
    exact_R = rng.normal(stats.chord_mean(RANDOM_HEAD_ROWS), stats.chord_std(RANDOM_HEAD_ROWS), DRAWN)
    looked_R = exact_R + rng.choice(residuals_N, DRAWN) < r_target
    valid_R = exact_R < r_target
    kept = float((looked_R & valid_R).sum() / valid_R.sum())
    return kept, float((cost + looked_R.mean()) / kept) if kept else float("inf")


def _row(field: Field, preset: str, pool: Pool, cost: float) -> dict[str, Any]:
    return {"cost": cost, **detection(field.judges[preset], pool)}
