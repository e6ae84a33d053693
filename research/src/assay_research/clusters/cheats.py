"""Cheats: other builds that were passed off as this one, and simulated ones a little noisier than honest machines.

Legend of shapes: N nonces, R audits, C checked nonces.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from assay_research.clusters.builds import FloatArray

RATIO = 1.4
"""Median of a simulated cheat over the honest one: of that pair, or the usual one of that validator if it is larger."""

MULTIPLES = (2.0, 3.3, 6.0)  # of the own noise, for a share of the nonces
TAIL_DOF = 4.0
_FARTHEST = 2.0  # of two unit vectors
_STEPS = 40


@dataclass(frozen=True)
class Cheat:
    """A simulated cheat against one validator.

    Args:
        name: Name in tables.
        pool: Distances [N] of as many of its nonces, from which audits draw without replacement.
    """

    name: str
    pool: FloatArray

    def audits(self, rng: np.random.Generator, count: int, checked: int) -> FloatArray:
        """Return the distances of audits, [R, C]."""
        return drawn(rng, self.pool, count, checked)


def drawn(rng: np.random.Generator, pool_N: FloatArray, count: int, checked: int) -> FloatArray:
    """Return audits of a pool, [R, C]: in each, nonces without replacement."""
    return np.stack([rng.permutation(pool_N)[:checked] for _ in range(count)])


def simulated(
    honest_N: FloatArray, usual: float, others: Mapping[str, FloatArray], rng: np.random.Generator
) -> Iterator[Cheat]:
    """Yield cheats whose median distance is `RATIO` times that of honest ones.

    A pair of machines may be far closer than others. Who is as far off as honest machines usually are is no cheat that
    a rule could know, so the ratio is that over the usual median where it is larger.

    Args:
        honest_N: Honest distances of a pair.
        usual: Median over machines of their median distance from this validator.
        others: Distances of other builds by name; those are mixed in that are large enough.
        rng: Source of what is drawn.
    """
    median = float(np.median(honest_N))
    wanted = RATIO * max(median, usual)
    yield Cheat(f"all nonces × {RATIO:g}", _clipped(wanted / median * honest_N))
    for multiple in MULTIPLES:
        yield _mixed(f"a share × {multiple:g}", honest_N, multiple * max(usual / median, 1.0) * honest_N, wanted, rng)
    for name, other_N in others.items():
        if np.median(other_N) > wanted:
            yield _mixed(f"a share as {name}", honest_N, rng.choice(other_N, honest_N.size), wanted, rng)
    logs_N = np.log(np.maximum(honest_N, 1e-4))
    spread = float(np.subtract(*np.quantile(logs_N, (0.75, 0.25)))) / 1.349  # as a normal with these quartiles has it
    shapes = {"log-normal": rng.normal(size=honest_N.size), "log-t, 4": rng.standard_t(TAIL_DOF, honest_N.size)}
    for name, z_N in shapes.items():
        values_N = np.exp(spread * z_N)
        yield Cheat(f"{name}, × {RATIO:g}", _clipped(values_N * (wanted / float(np.median(values_N)))))


def _mixed(name: str, honest_N: FloatArray, larger_N: FloatArray, wanted: float, rng: np.random.Generator) -> Cheat:
    """Return honest distances of which the share is exchanged that makes the median what is wanted."""
    order_N = rng.random(honest_N.size)
    low, high = 0.0, 1.0
    for _ in range(_STEPS):
        share = (low + high) / 2
        mixed_N = np.where(order_N < share, larger_N, honest_N)
        low, high = (share, high) if np.median(mixed_N) < wanted else (low, share)
    return Cheat(name, _clipped(np.where(order_N < high, larger_N, honest_N)))


def _clipped(values_N: FloatArray) -> FloatArray:
    return np.minimum(values_N, _FARTHEST)
