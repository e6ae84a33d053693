"""The evidence of a node's whole life, under however many laws its residuals were judged.

A life is a sequence of tests k = 1, 2, … with e-values E_k and weights w_k, Σ w_k = 1. An honest
node ever has E_k ≥ 1/(alpha · w_k) with chance alpha · w_k at most (Ville 1939), so in its whole
life with chance alpha at most, however its tests depend on each other. That raises a suspicion.
docs/statistics.md ("The account") says what a test needs besides to convict, which can only lower
the chance, when a node is honest, and which laws share a test.

A test that began after `EPOCH` nonces catches a node that was honest for long and then cheats: the
first test would first have to make up for everything that spoke for the node. Of older pools of
places, the blocks that accuse most are kept apart. For responses, which have no places in a batch,
a test convicts by its e-value alone.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Self

import numpy as np
import numpy.typing as npt

from assay import stats
from assay.errors import DataError
from assay.files.jsonl import dumps
from assay.poc.verdict.entries import AccountEvidence, verdict_on_life
from assay.poc.verdict.pool_faults import POOLS, FaultyPool, count_strikes
from assay.poc.verdict.response_noise import AnyNoise, ResponseBlocks, ResponseNoise, ResponseTest
from assay.poc.verdict.sample_plan import sequential_test
from assay.stats.chord import FloatArray
from assay.stats.places import Places
from assay.stats.sequential import SHARES

Residuals = Sequence[float] | npt.NDArray[np.float64] | ResponseBlocks

# counted nonces after which the next audit begins another test, and the pool of places another one
EPOCH = 1024
# blocks of older pools that can be left out: those that accuse most, because leaving out another
# takes less
APART = 8
# Largest logarithm that is written, because JSON has no infinity.
LARGEST_LOG = 1e9
FIRST_WEIGHT = 0.9  # share of the error rates that the first test has
# nonces of a pool from which it convicts: fewer may not show that a machine is wrong at fixed
# places
PLACES = 128


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
    ends: int | None = None  # audit of the pool from which on it takes none; None while it runs
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
        if len({audit.block for audit in self._taken(pool)} | self.blocks.keys()) < 2:
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
        # Of later pools, a test that has ended takes nothing.
        self.ends = None if self.ends is None else 0

    def _taken(self, pool: Sequence[PooledAudit]) -> list[PooledAudit]:
        """Return the audits of a pool whose residuals the test has."""
        return [audit for audit in pool[self.begins : self.ends] if audit.law == self.law]

    def _sums(
        self, test: stats.SequentialTest, pool: Sequence[PooledAudit]
    ) -> dict[str | None, FloatArray]:
        """Return what all residuals add to the paths, those at places that may be faulty left out,
        by block.
        """
        sums = dict(self.blocks)
        for audit in self._taken(pool):
            values = self.size * (audit.sizes if audit.aside is None else audit.sizes[~audit.aside])
            # Bounds memory.
            parts = (values[start : start + EPOCH] for start in range(0, len(values), EPOCH))
            start = sums.get(audit.block, np.zeros_like(test.prior))
            sums[audit.block] = sum((test.steps(part).sum(axis=0) for part in parts), start=start)
        return sums


class Life:
    """The evidence of one account: add the residuals of audits, read it at any time.

    Args:
        alpha: Bound on the chance that an honest node is ever accused, in its whole life.
        beta: Bound on the chance that a share of cheap nonces is excluded that a node has.
        one_unit: Whether later tests take residuals in the unit of the first test, as they wrongly
            did before 0.4.

    Raises:
        UsageError: A rate is not in (0, 1), when the first residuals come.

    Example:
        >>> from assay.poc.verdict.honest_noise import Noise
        >>> from assay.poc.verdict.honest_noise import read_law
        >>> from assay.poc.verdict import Life
        >>> noise = Noise(read_law({"kind": "log", "mu": -3.7, "sd": 0.7}), "an example")
        >>> life = Life(alpha=1e-3, beta=1e-2)
        >>> life.update(noise, [noise.size] * 60, block="one").evidence.verdict
        'honest'
        >>> [
        ...     life.update(noise, [1.0] * 60, block=block).evidence.verdict
        ...     for block in ("two", "three")
        ... ]
        ['honest', 'fraud']
    """

    def __init__(self, *, alpha: float, beta: float, one_unit: bool = False) -> None:
        self.alpha = alpha
        self.beta = beta
        self._one_unit = one_unit
        self.tests: list[LifeTest] = []
        # For each law, its first test and the newest one.
        self._running: dict[str, list[LifeTest]] = {}
        self._n = 0
        self._pool: list[PooledAudit] = []
        self._open = np.ones(len(SHARES), dtype=np.bool_)  # shares that are not excluded yet
        self._called: Places | None = None  # those that the last look at a pool called faulty
        self._fault: Places | None = None  # or that an accusation rests on
        self._faulty_pools: list[FaultyPool | None] = []
        self._strikes = 0
        self._uncredited = 0  # nonces at faulty places of complete pools
        self._only_responses = True

    def update(
        self,
        noise: AnyNoise,
        residuals: Residuals,
        *,
        block: str = "",
        positions: Sequence[int] | None = None,
        batch_size: int | None = None,
    ) -> Self:
        """Add the residuals of one audit in checked order; NaN for a missing value.

        Args:
            noise: Honest noise that they are judged under, chosen without looking at them.
            residuals: Residuals that count, of nonces that did not count before; or the evidence of
                one response.
            block: Block of the nonces.
            positions: Index of each nonce in the node's own sequence; its place in ``residuals``
                when None.
            batch_size: Batch size that the node states.

        Raises:
            DataError: The residuals are of nonces and the noise of responses, or the other way
                round.
        """
        if not len(residuals):
            return self
        self._n += len(residuals)
        if isinstance(noise, ResponseNoise) and isinstance(residuals, ResponseBlocks):
            for test in self._tests_of(noise, dumps(noise.as_dict())):
                test.update(residuals)
        elif isinstance(noise, ResponseNoise) or isinstance(residuals, ResponseBlocks):
            raise DataError(
                "residuals of another kind than the law that they are judged under",
                wanted="responses under a law of responses, and nonces under one of nonces",
                do="ask for the file again",
            )
        else:
            law = noise.shape
            self._only_responses = False
            # Another pool begins; residuals at places that may be faulty never convict.
            if self._pooled_count >= EPOCH:
                for test in self.tests:
                    if test.ends != 0:
                        test.settle(self._pool)
                self._complete_pool()
            running = self._tests_of(noise, law)
            sizes = np.asarray(residuals, dtype=np.float64) / noise.size
            for test in running:
                test.update(sizes * (running[0] if self._one_unit else test).size)
            places = (
                np.arange(len(sizes))
                if positions is None
                else np.asarray(positions, dtype=np.int64)
            )
            self._pool.append(PooledAudit(law, block, sizes, places))
            self._look(running, batch_size)
        return self

    def _tests_of(self, noise: AnyNoise, law: str) -> list["LifeTest"]:
        """Return the tests that residuals under a law go to; another one begins where it is
        time.
        """
        running = self._running.setdefault(law, [])
        if not running or running[-1].n >= EPOCH:
            weight = error_share(len(self.tests) + 1)
            rates = {"alpha": self.alpha * weight, "beta": self.beta * weight}
            test = (
                ResponseTest(noise, **rates)
                if isinstance(noise, ResponseNoise)
                else sequential_test(noise, **rates)
            )
            size = 0.0 if isinstance(noise, ResponseNoise) else noise.size
            life_test = LifeTest(test, math.log(weight), law, size, begins=len(self._pool))
            self.tests.append(life_test)
            for ended in running[1:]:
                ended.ends = len(self._pool)
            running[1:] = [life_test]
        return running

    @property
    def _pooled_count(self) -> int:
        return sum(len(audit.sizes) for audit in self._pool)

    def _look(self, running: Sequence["LifeTest"], batch_size: int | None) -> None:
        """Exclude shares, look for faulty places in the pool, and weigh what a suspicion stands
        on.
        """
        for test in running:
            if isinstance(test.test, stats.SequentialTest):
                self._open &= test.log_weight + test.test.honest_over() < -math.log(self.beta)
        pool = self._pool
        needed = -math.log(self.alpha)
        if self._pooled_count >= PLACES:
            sizes, positions = (
                np.concatenate([getattr(audit, name) for audit in pool])
                for name in ("sizes", "positions")
            )
            place_result = stats.place_test(
                sizes, positions, batch_size=batch_size, honest_size=1.0
            )
            self._called = place_result.bad_places if place_result.faulty else None
            # Residuals at suspected places convict no node, so an accused one is not paid for them:
            # lies in a part of half of the places would hide there for ever.
            is_accused = any(test.log_weight + test.log_e >= needed for test in running)
            is_excused = is_accused and place_result.suspected
            self._fault = place_result.bad_places if is_excused else self._called
            ends = np.cumsum([len(audit.sizes) for audit in pool])[:-1]
            for audit, aside in zip(pool, np.split(place_result.set_aside, ends), strict=True):
                audit.aside = aside
        for test in running:
            if test.log_weight + test.log_e_max >= needed > test.log_e_held:
                remaining = test.log_weight + min(self.held(test), test.log_e_max)
                test.log_e_held = max(test.log_e_held, min(LARGEST_LOG, remaining))

    def _complete_pool(self) -> None:
        """Count a pool's fault and what it leaves uncredited, and begin another pool."""
        self._uncredited += self._uncredited_now
        blocks = frozenset(audit.block for audit in self._pool)
        faulty = None if self._fault is None else FaultyPool(self._fault, blocks)
        self._faulty_pools = [*self._faulty_pools, faulty][-POOLS:]
        # A conviction stays, also where later pools show nothing.
        self._strikes = max(self._strikes, count_strikes(self._faulty_pools))
        self._pool = []

    @property
    def _uncredited_now(self) -> int:
        """Nonces of the pool at faulty places: before it tells, those of the pool before it."""
        fault = self._fault
        if fault is None:
            return 0
        return sum(int(np.count_nonzero(fault.contain(audit.positions))) for audit in self._pool)

    @property
    def called_fault(self) -> str | None:
        """Places that the last look at a pool called faulty, whether or not the life is accused."""
        return None if self._called is None else str(self._called)

    def held(self, test: "LifeTest") -> float:
        """Return the smallest log e-value without any one block and without faulty places."""
        return test.held(self._pool if self._pooled_count >= PLACES else [])

    @property
    def evidence(self) -> AccountEvidence:
        """The evidence, and the verdict that follows from it."""
        honest = max([test.log_weight + test.log_honest for test in self.tests[-2:]], default=0.0)
        uncredited = self._uncredited + self._uncredited_now
        has_faults = bool(uncredited or self._strikes)
        before_verdict = AccountEvidence(
            n=self._n,
            tests=len(self.tests),
            log_e_value=log_average([(test.log_weight, test.log_e) for test in self.tests]),
            log_e_max=max([0.0, *(test.log_weight + test.log_e_max for test in self.tests)]),
            log_evidence_honest=honest,
            log_e_held=None
            if self._only_responses
            else max([0.0, *(test.log_e_held for test in self.tests)]),
            share=None
            if self._only_responses
            else max([0.0, *np.array(SHARES)[self._open].tolist()]),
            credited=self._n - uncredited if has_faults else None,
            strikes=self._strikes if has_faults else None,
            faulty_places=None if self._fault is None else str(self._fault),
        )
        return before_verdict.model_copy(
            update={"verdict": verdict_on_life(before_verdict, alpha=self.alpha, beta=self.beta)}
        )


def error_share(number: int) -> float:
    """Return the share of alpha and beta of test k: .9 for k = 1, else .1/(k(k − 1))."""
    return FIRST_WEIGHT if number == 1 else (1 - FIRST_WEIGHT) / (number * (number - 1))


def log_average(tests: Sequence[tuple[float, float]]) -> float:
    """Return the log of the weighted average of e-values; the remaining weight has E = 1."""
    logs = [log_weight + log_e for log_weight, log_e in tests]
    unused = 1 - math.fsum(math.exp(log_weight) for log_weight, _ in tests)
    return float(np.logaddexp.reduce([*logs, math.log(unused)]))
