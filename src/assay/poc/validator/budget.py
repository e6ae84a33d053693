"""Where nonces are spent: at what rate, and of which nodes.

Of every pass a minimum share goes to nodes that are drawn with equal chances among all that are not convicted, so that
no node is ever unwatched. The rest goes to undecided nodes, with chances in proportion to 1/N, where N is the number of
nonces after which the node is expected to be decided at the pace of its evidence so far: an even chance per nonce of a
decision, so that decisions come as early as they can on average. Convicted nodes get nothing. The draws come from the
randomness of the system, so no node knows its turn.
"""

import math
import random
import time
from collections.abc import Mapping, Sequence

from assay.poc.verdict.ledger_entries import Standing

EXPECTED = 32.0
"""Nonces that a node without evidence is expected to need."""

CONVICTED = "fraud"
UNDECIDED = "undecided"


class Budget:
    """Nonces that may be spent: they come at an even rate, and at most an hour's are saved.

    Args:
        per_hour: Nonces of an hour.
    """

    def __init__(self, per_hour: int) -> None:
        self._per_hour = per_hour
        self._left, self._at = 0.0, time.monotonic()

    def left(self) -> int:
        """Return the nonces that may be spent now."""
        now = time.monotonic()
        self._left = min(self._per_hour, self._left + (now - self._at) * self._per_hour / 3600)
        self._at = now
        return int(self._left)

    def seconds_until(self, nonces: int) -> float:
        """Return the time after which so many nonces may be spent."""
        return max(0.0, (min(nonces, self._per_hour) - self.left()) * 3600 / self._per_hour)

    def spend(self, nonces: int) -> None:
        """Take nonces."""
        self._left -= nonces


def verdict_of(standing: Standing | None) -> str:
    """Return the verdict on a node: that of its life, or ``faulty`` where an audit showed a fault that is open."""
    if standing is None:
        return UNDECIDED
    if standing.fault is not None and standing.verdict != CONVICTED:
        return "faulty"
    return str(standing.verdict)


def expected_nonces(standing: Standing | None, *, alpha: float, beta: float) -> float:
    """Return how many more nonces decide a node, at the pace of its evidence so far; at least 1."""
    if standing is None or standing.evidence.n == 0:
        return EXPECTED
    seen = standing.evidence
    paces = (
        (-math.log(beta) - seen.log_evidence_honest, seen.log_evidence_honest / seen.n),
        (-math.log(alpha) - seen.log_e_value, seen.log_e_value / seen.n),
    )
    needed = [missing / pace for missing, pace in paces if pace > 0]
    # Evidence of neither kind: as many again as were seen.
    return max(1.0, min(needed, default=max(EXPECTED, float(seen.n))))


def choose(
    waiting: Sequence[str],
    standings: Mapping[str, Standing],
    turns: int,
    *,
    minimum_share: float,
    alpha: float,
    beta: float,
    chance: random.Random | None = None,
) -> list[str]:
    """Return the nodes of which the next messages are drawn, one for each turn.

    Args:
        waiting: Keys of the nodes that have messages to draw from.
        standings: Evidence by key.
        turns: Number of messages.
        minimum_share: Share of the turns that all nodes have alike.
        alpha: Chance of accusing an honest node, as the ledger has it.
        beta: Chance of calling a cheater honest, as the ledger has it.
        chance: Source of the draws; the randomness of the system when None.
    """
    chance = chance or random.SystemRandom()
    verdicts = {key: verdict_of(standings.get(key)) for key in waiting}
    watched = [key for key, verdict in verdicts.items() if verdict != CONVICTED]
    if not watched:
        return []
    undecided = [key for key in watched if verdicts[key] == UNDECIDED]
    weights = [1 / expected_nonces(standings.get(key), alpha=alpha, beta=beta) for key in undecided]
    even = sum(chance.random() < minimum_share for _ in range(turns)) if undecided else turns
    chosen = chance.choices(watched, k=even) if even else []
    if turns > even:
        chosen += chance.choices(undecided, weights, k=turns - even)
    return chosen
