"""The evidence of a node's whole life, under however many laws its residuals were judged.

A life is a sequence of tests. The first sees everything that is judged under the first law. A new calibration begins a
test of its own, because what a test multiplies up holds under one law only: the scale of a machine is drawn once for
each, but it is the scale of the same machine, so that the e-values of two laws are not independent and must not be
multiplied. And after every `EPOCH` nonces another test begins beside the first, from nothing: a node that was honest
for long and then cheats is caught by it, while the first test would have to make up for all that spoke for the node.

The k-th test has the weight w_k, and these sum to 1. It convicts when its e-value reaches 1/(alpha · w_k), which has
chance alpha · w_k at most for an honest node (Ville 1939), so that the whole life convicts with chance alpha at most,
however its tests depend on each other. Evidence for honesty is bounded by beta in the same way; it is that of the last
two tests, because what a node did long ago does not say that it is honest now.

This is the arithmetic alone; `Ledger` keeps it on disk, and the simulated year runs it for many nodes.
"""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt

from assay import stats
from assay.errors import DataError
from assay.files.jsonl import dumps
from assay.poc.verdict.response_noise import AnyNoise, ResponseBlocks, ResponseResult, ResponseTest, test_of
from assay.stats.sequential import Verdict

Residuals = Sequence[float] | npt.NDArray[np.float64] | ResponseBlocks

EPOCH = 1024
"""Nonces that count, after which the next audit begins another test beside the first."""

_LARGEST = 1e9  # logarithm of an e-value that is written: where it is infinite, JSON has no number for it
FIRST_WEIGHT = 0.9
"""Share of the error rates that the first test has."""


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What a life says after its last residual.

    Args:
        verdict: ``fraud`` when ``log_e_max`` ≥ ln 1/alpha; else ``honest`` when ``log_evidence_honest`` ≥ ln 1/beta;
            else ``undecided``.
        n: Number of residuals that count.
        tests: Number of tests that have begun.
        log_e_value: Natural logarithm of the e-value: the weighted average over the tests.
        log_e_max: Logarithm of the largest value that one test had, times its weight; it decides fraud.
        log_evidence_honest: Logarithm of the evidence for honesty in the last two tests, times their weights: the
            larger one.
    """

    verdict: Verdict = "undecided"
    n: int = 0
    tests: int = 0
    log_e_value: float = 0.0
    log_e_max: float = 0.0
    log_evidence_honest: float = 0.0


class Life:
    """The evidence of one account: feed it the residuals of audits as they come, read it at any time.

    Args:
        alpha: Bound on the chance that an honest node is ever accused, in its whole life.
        beta: Bound on the chance that a node that cheats is ever called honest while it does.
        ledgers: Number of ledgers that a decision is made from. Each test then stops, for `stopped`, after the first
            audit at which it would decide alone among them.

    Raises:
        UsageError: A rate is not in (0, 1), when the first residuals come.

    Example:
        >>> from assay.poc.verdict import Life, default_noise
        >>> noise = default_noise("vector", "bfloat16", "bfloat16")
        >>> life = Life(alpha=1e-3, beta=1e-2)
        >>> life.update(noise, [noise.size] * 60).evidence.verdict
        'honest'
        >>> life.update(noise, [1.0] * 60).evidence.verdict
        'fraud'
    """

    def __init__(self, *, alpha: float, beta: float, ledgers: int = 1) -> None:
        self.alpha, self.beta, self.ledgers = alpha, beta, ledgers
        self._numbers: list[_Numbers] = []
        self._first: dict[str, _Test] = {}
        self._epochs: dict[str, _Test] = {}
        self._n = 0

    def update(self, noise: AnyNoise, residuals: Residuals, *, doubted: Sequence[float] = ()) -> Self:
        """Take the residuals of one audit, in the order in which they were checked; NaN for a missing value.

        Args:
            noise: Honest noise that they are judged under. It must not be chosen after a look at them.
            residuals: Residuals that count, of nonces that did not count before; or the evidence of one response.
            doubted: Further residuals, of nonces at places that may be faulty. They do not accuse, but evidence for
                honesty is only what all residuals give together. Without any residual nothing changes.
        """
        if not (len(residuals) or doubted):
            return self
        law = dumps(noise.as_dict())
        newest = self._epochs.get(law) or self._first.get(law)
        if newest is None:
            self._first[law] = self._begin(noise)
        elif newest.n >= EPOCH:
            self._epochs[law] = self._begin(noise)
        for test in (self._first[law], self._epochs.get(law)):
            if test is not None:
                test.update(residuals, doubted)
        self._n += len(residuals)
        return self

    def _begin(self, noise: AnyNoise) -> "_Test":
        share = share_of_test(len(self._numbers) + 1)
        test = test_of(noise, alpha=self.alpha * share, beta=self.beta * share)
        levels = (math.log(self.ledgers / self.alpha), math.log(self.ledgers / self.beta))
        self._numbers.append(_Numbers(math.log(share), *levels))
        return _Test(test, self._numbers[-1])

    @property
    def evidence(self) -> Evidence:
        """The evidence, and the verdict that follows from it."""
        log_e_max = max([0.0, *(one.log_weight + one.log_e_max for one in self._numbers)])
        honest = max([one.log_weight + one.log_honest for one in self._numbers[-2:]], default=0.0)
        return Evidence(
            verdict=verdict_of(log_e_max, honest, alpha=self.alpha, beta=self.beta),
            n=self._n,
            tests=len(self._numbers),
            log_e_value=_log_average([(one.log_weight, one.log_e) for one in self._numbers]),
            log_e_max=log_e_max,
            log_evidence_honest=honest,
        )

    @property
    def stopped(self) -> tuple[float, float]:
        """Logarithms of the e-value and of the evidence for honesty, each test stopped where it would decide alone.

        Both have mean 1 at most, the one under honest noise and the other under a cheat, because each test stops by a
        rule that looks at this test alone. So they can be averaged over ledgers.
        """
        return (
            _log_average([(one.log_weight, one.stopped_e) for one in self._numbers]),
            _log_average([(one.log_weight, one.stopped_honest) for one in self._numbers[-2:]]),
        )


@dataclass
class _Numbers:
    """What is left of a test when it has ended; all are logarithms."""

    log_weight: float
    level_e: float
    level_honest: float
    log_e: float = 0.0
    log_e_max: float = 0.0
    log_honest: float = 0.0
    stopped_e: float = 0.0
    stopped_honest: float = 0.0

    def take(self, result: stats.SequentialResult | ResponseResult, log_honest: float) -> None:
        numbers = (result.log_e_value, result.log_e_max, log_honest)
        self.log_e, self.log_e_max, self.log_honest = (max(-_LARGEST, min(_LARGEST, number)) for number in numbers)
        if self.log_weight + self.stopped_e < self.level_e:
            self.stopped_e = self.log_e
        if self.log_weight + self.stopped_honest < self.level_honest:
            self.stopped_honest = self.log_honest


class _Test:
    """A test that runs, and where its numbers go."""

    def __init__(self, test: stats.SequentialTest | ResponseTest, numbers: _Numbers) -> None:
        self._test, self._numbers = test, numbers
        self._of_all: stats.SequentialTest | None = None  # sees what is doubted too, from the first such residual on
        self.n = 0

    def update(self, residuals: Residuals, doubted: Sequence[float]) -> None:
        if isinstance(self._test, ResponseTest) != isinstance(residuals, ResponseBlocks):
            raise DataError(
                "residuals of another kind than the law that they are judged under",
                wanted="responses under a law of responses, and nonces under one of nonces",
                do="ask for the file again",
            )
        if doubted and self._of_all is None and isinstance(self._test, stats.SequentialTest):
            self._of_all = copy.deepcopy(self._test)
        result = self._test.update(residuals).result  # type: ignore[arg-type]  # of this kind, by the line above
        self.n = result.n
        honest = result.log_evidence_honest
        if self._of_all is not None:
            honest = self._of_all.update(residuals).update(doubted).result.log_evidence_honest  # type: ignore[arg-type]
        self._numbers.take(result, honest)


def share_of_test(number: int) -> float:
    """Return the share of the error rates that a test has; the shares of all tests, from number 1 on, sum to 1."""
    return FIRST_WEIGHT if number == 1 else (1 - FIRST_WEIGHT) / (number * (number - 1))


def verdict_of(log_e: float, log_evidence_honest: float, *, alpha: float, beta: float) -> Verdict:
    """Return the verdict that two numbers give: fraud first, then honest, else undecided."""
    if log_e >= -math.log(alpha):
        return "fraud"
    return "honest" if log_evidence_honest >= -math.log(beta) else "undecided"


def _log_average(tests: Sequence[tuple[float, float]]) -> float:
    """Return the logarithm of an average, of which the weight that no test has yet stands at 1; all are logarithms."""
    logs = [log_weight + log_e for log_weight, log_e in tests]
    rest = 1 - math.fsum(math.exp(log_weight) for log_weight, _ in tests)
    return float(np.logaddexp.reduce([*logs, math.log(rest)]))
