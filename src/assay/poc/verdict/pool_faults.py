"""Faults at fixed places: nonces without credit, and fraud if the fault does not end.

A pool has the nonces of about 64 audits of 16 (`assay.poc.verdict.life.EPOCH`). What stands at
places that a pool calls faulty is neither paid nor credited, so who lies there earns nothing by it.
A machine is repaired, or it is not: every complete pool of the last `POOLS` that shows a fault is a
strike, and `MOVED` strikes where all its places are others than before, since a broken row or rank
stays where it is. `STRIKES` of them are fraud. So no fault convicts in its first two pools, and
none that stays at its places in its first three.

Of an account whose e-value is at its bound, places that are only suspected are a fault too: they
are set aside, so they are not paid.

A sound machine that is not accused is called faulty in a pool with chance 10⁻⁴ at most, so it has
three such pools among eight with chance 6·10⁻¹¹ at most, for each complete pool of its life.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from assay.stats.places import Places

POOLS = 8
STRIKES = 4
MOVED = 2


@dataclass(frozen=True)
class FaultyPool:
    """Faulty places of a complete pool, and the blocks of its nonces."""

    places: Places
    blocks: frozenset[str]


def count_strikes(pools: Sequence[FaultyPool | None]) -> int:
    """Return the strikes of the latest complete pools, which are None where they show no fault.

    Pools of one block count nothing: a block convicts no node alone.
    """
    faulty = [pool for pool in pools[-POOLS:] if pool is not None]
    if len(frozenset().union(*(pool.blocks for pool in faulty))) < 2:
        return 0
    strikes = min(1, len(faulty))
    for before, after in pairwise(faulty):
        strikes += 1 if _overlap(before.places, after.places) else MOVED
    return strikes


def _overlap(first: Places, second: Places) -> bool:
    """Return whether any place is among the others: those beside a bad row differ by pool."""
    modulus = math.lcm(first.modulus, second.modulus)
    return bool(first.at_multiple(modulus) & second.at_multiple(modulus))
