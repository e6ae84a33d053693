"""One test of a life, and what is left of its e-value without any one block."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from assay import stats
from assay.poc.verdict.laws import FloatArray
from assay.poc.verdict.response_noise import ResponseBlocks, ResponseTest

Residuals = Sequence[float] | npt.NDArray[np.float64] | ResponseBlocks

# counted nonces after which the next audit begins another test, and the pool of places another one
EPOCH = 1024
# blocks of older pools that can be left out: those that accuse most, because leaving out another
# takes less
APART = 8
# Largest logarithm that is written, because JSON has no infinity.
LARGEST_LOG = 1e9


@dataclass
class PooledAudit:
    """Residuals of one audit, [N], over the typical one of their law, with their block and
    places.
    """

    law: str
    block: str
    sizes: FloatArray
    positions: npt.NDArray[np.int64]
    aside: npt.NDArray[np.bool_] | None = (
        None  # those at places that may be faulty; None before a pool tells
    )


@dataclass
class LifeTest:
    """One test of a life, its log share of the error rates, and its current numbers."""

    test: stats.SequentialTest | ResponseTest
    log_weight: float
    law: str
    size: float = 0.0  # typical residual of its law; 0 for responses
    log_e: float = 0.0
    log_e_max: float = 0.0
    log_honest: float = 0.0
    log_e_held: float = 0.0
    n: int = 0
    begins: int = 0  # audit of the pool from which on it takes residuals
    blocks: dict[str | None, FloatArray] = field(default_factory=dict)
    """What earlier pools add to its paths, by block; under None, what can no longer be left out."""

    def update(self, residuals: Residuals) -> None:
        """Take the residuals of one audit, in its own unit, or those of a response."""
        result = self.test.update(residuals).result  # type: ignore[arg-type]  # of its kind: see `Life.update`
        numbers = (result.log_e_value, result.log_e_max, result.log_evidence_honest)
        self.log_e, self.log_e_max, self.log_honest = (
            max(-LARGEST_LOG, min(LARGEST_LOG, number)) for number in numbers
        )
        self.n = result.n

    def held(self, pool: Sequence[PooledAudit]) -> float:
        """Return the smallest log e-value without any one block and the faulty places."""
        # All of it for responses: tokens have no place in a batch.
        if not isinstance(self.test, stats.SequentialTest):
            return self.log_e
        if len({audit.block for audit in pool[self.begins :]} | self.blocks.keys()) < 2:
            return 0.0  # nothing is left
        sums = self._sums(self.test, pool)
        path = self.test.prior + sum(sums.values())
        remaining = (
            float(self.test.log_e(path - part)) for block, part in sums.items() if block is not None
        )
        return min(remaining, default=0.0)

    def settle(self, pool: Sequence[PooledAudit]) -> None:
        """Keep what a pool adds to the paths, apart for the blocks that accuse most."""
        test = self.test
        if not isinstance(test, stats.SequentialTest):
            return
        sums = self._sums(test, pool)
        weights = {
            block: float(test.log_e(test.prior + part))
            for block, part in sums.items()
            if block is not None
        }
        for block in sorted(weights, key=weights.__getitem__, reverse=True)[APART:]:
            sums[None] = sums.get(None, 0.0) + sums.pop(block)
        self.blocks = sums
        self.begins = 0

    def _sums(
        self, test: stats.SequentialTest, pool: Sequence[PooledAudit]
    ) -> dict[str | None, FloatArray]:
        """Return what all residuals add to the paths, those at places that may be faulty left out,
        by block.
        """
        sums = dict(self.blocks)
        for audit in (audit for audit in pool[self.begins :] if audit.law == self.law):
            values = self.size * (audit.sizes if audit.aside is None else audit.sizes[~audit.aside])
            # Bounds memory.
            parts = (values[start : start + EPOCH] for start in range(0, len(values), EPOCH))
            start = sums.get(audit.block, np.zeros_like(test.prior))
            sums[audit.block] = sum((test.steps(part).sum(axis=0) for part in parts), start=start)
        return sums
