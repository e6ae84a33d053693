"""The evidence of a node's whole life, under however many laws its residuals were judged.

A life is a sequence of tests k = 1, 2, … with e-values E_k and weights w_k, Σ w_k = 1. Test k convicts when
E_k ≥ 1/(alpha · w_k), which happens to an honest node with chance alpha · w_k at most (Ville 1939). So the whole life
convicts with chance alpha at most, however its tests depend on each other. Evidence for honesty is bounded by beta in
the same way. It is that of the last two tests, because what a node did long ago does not show that it is honest now.

A new calibration begins a test of its own, because an e-value multiplies likelihoods of one law only. The scale of a
machine is the same under both laws, so their e-values are not independent and must not be multiplied. After every
`EPOCH` nonces another test begins from nothing. It catches a node that was honest for long and then cheats; the first
test would first have to make up for everything that spoke for the node.

This is the arithmetic alone: `Ledger` keeps it on disk.
"""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Self

import numpy as np
import numpy.typing as npt

from assay import stats
from assay.errors import DataError
from assay.files.jsonl import dumps
from assay.poc.verdict.noise import AnyNoise, ResponseBlocks, ResponseNoise, ResponseTest, sequential_test
from assay.stats.sequential import Verdict, decide

Residuals = Sequence[float] | npt.NDArray[np.float64] | ResponseBlocks

EPOCH = 1024
"""Number of counted nonces after which the next audit begins another test."""

FIRST_WEIGHT = 0.9
"""Share of the error rates that the first test has."""

_LARGEST = 1e9  # largest logarithm that is written, because JSON has no infinity


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What a life says after its last residual.

    Args:
        verdict: Verdict by :func:`assay.stats.sequential.decide`.
        n: Number of residuals that count.
        tests: Number of tests that have begun.
        log_e_value: Natural logarithm of the e-value: the weighted average over the tests.
        log_e_max: Logarithm of the largest e-value that one test had, times its weight; it decides fraud.
        log_evidence_honest: Logarithm of the larger evidence for honesty of the last two tests, times their weights.
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

    Raises:
        UsageError: A rate is not in (0, 1), when the first residuals come.

    Example:
        >>> from assay.poc import default_noise
        >>> from assay.poc.verdict import Life
        >>> noise = default_noise("vector", "bfloat16", "bfloat16")
        >>> life = Life(alpha=1e-3, beta=1e-2)
        >>> life.update(noise, [noise.size] * 60).evidence.verdict
        'honest'
        >>> life.update(noise, [1.0] * 60).evidence.verdict
        'fraud'
    """

    def __init__(self, *, alpha: float, beta: float) -> None:
        self.alpha, self.beta = alpha, beta
        self.tests: list[LifeTest] = []
        self._first: dict[str, LifeTest] = {}
        self._epochs: dict[str, LifeTest] = {}
        self._n = 0

    def update(self, noise: AnyNoise, residuals: Residuals, *, doubted: Sequence[float] = ()) -> Self:
        """Take the residuals of one audit, in the order in which they were checked; NaN for a missing value.

        Args:
            noise: Honest noise that they are judged under, chosen without looking at them.
            residuals: Residuals that count, of nonces that did not count before; or the evidence of one response.
            doubted: Further residuals, of nonces at places that may be faulty. They do not accuse, but the evidence for
                honesty is that of all residuals together.
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

    def _begin(self, noise: AnyNoise) -> "LifeTest":
        weight = error_share(len(self.tests) + 1)
        rates = {"alpha": self.alpha * weight, "beta": self.beta * weight}
        if isinstance(noise, ResponseNoise):
            test: ResponseTest | stats.SequentialTest = ResponseTest(noise, **rates)
        else:
            test = sequential_test(noise, **rates)
        self.tests.append(LifeTest(test, math.log(weight)))
        return self.tests[-1]

    @property
    def evidence(self) -> Evidence:
        """The evidence, and the verdict that follows from it."""
        log_e_max = max([0.0, *(test.log_weight + test.log_e_max for test in self.tests)])
        honest = max([test.log_weight + test.log_honest for test in self.tests[-2:]], default=0.0)
        return Evidence(
            verdict=decide(log_e_max, honest, alpha=self.alpha, beta=self.beta),
            n=self._n,
            tests=len(self.tests),
            log_e_value=log_average([(test.log_weight, test.log_e) for test in self.tests]),
            log_e_max=log_e_max,
            log_evidence_honest=honest,
        )


@dataclass
class LifeTest:
    """A test of a life, and its numbers after the last residual.

    Args:
        test: Test of residuals or of responses.
        log_weight: Logarithm of its share of the error rates.
        log_e: Logarithm of its e-value.
        log_e_max: Running maximum of that.
        log_honest: Logarithm of its evidence for honesty.
        n: Number of residuals that count.
    """

    test: stats.SequentialTest | ResponseTest
    log_weight: float
    log_e: float = 0.0
    log_e_max: float = 0.0
    log_honest: float = 0.0
    n: int = 0
    _of_all: stats.SequentialTest | None = field(default=None, repr=False)
    """The test of doubted residuals too, from the first of them on."""

    def update(self, residuals: Residuals, doubted: Sequence[float]) -> None:
        """Take the residuals of one audit, which must be of responses where the law is."""
        if isinstance(self.test, ResponseTest) != isinstance(residuals, ResponseBlocks):
            raise DataError(
                "residuals of another kind than the law that they are judged under",
                wanted="responses under a law of responses, and nonces under one of nonces",
                do="ask for the file again",
            )
        if doubted and self._of_all is None and isinstance(self.test, stats.SequentialTest):
            self._of_all = copy.deepcopy(self.test)
        result = self.test.update(residuals).result  # type: ignore[arg-type]  # of this kind, by the line above
        honest = result.log_evidence_honest
        if self._of_all is not None:
            honest = self._of_all.update(residuals).update(doubted).result.log_evidence_honest  # type: ignore[arg-type]
        numbers = (result.log_e_value, result.log_e_max, honest)
        self.log_e, self.log_e_max, self.log_honest = (max(-_LARGEST, min(_LARGEST, number)) for number in numbers)
        self.n = result.n


def error_share(number: int) -> float:
    """Return the share of the error rates that a test has: .9 for k = 1, else .1/(k(k − 1)); all shares sum to 1."""
    return FIRST_WEIGHT if number == 1 else (1 - FIRST_WEIGHT) / (number * (number - 1))


def log_average(tests: Sequence[tuple[float, float]]) -> float:
    """Return the logarithm of the average of e-values (log weight, log E); the rest of the weight has E = 1."""
    logs = [log_weight + log_e for log_weight, log_e in tests]
    rest = 1 - math.fsum(math.exp(log_weight) for log_weight, _ in tests)
    return float(np.logaddexp.reduce([*logs, math.log(rest)]))
