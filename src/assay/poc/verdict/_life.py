"""The evidence of a node's whole life: one e-process, however many laws its residuals were judged under.

Under each law the residuals that were judged under it have a test of their own, a *segment*. A law that was replaced by
a new calibration ends its segment, and one that comes back continues it. The e-value of the life is the product of
those of its segments: each residual multiplies one factor by something whose mean, given all that came before, is at
most 1 for an honest node. So the product is again a non-negative supermartingale that begins at 1, and its running
maximum reaches 1/alpha with chance alpha at most, over the whole life (Ville 1939).

This is the arithmetic alone; `Ledger` keeps it on disk, and the simulated year runs it for many nodes.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy.typing as npt

from assay import stats
from assay.poc.verdict._judge import Noise, law_from_dict, sequential_test
from assay.reports import JsonObject, dumps


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What a life says after its last residual.

    Args:
        verdict: ``fraud`` when ``log_e_max`` ≥ ln 1/alpha; else ``honest`` when ``log_evidence_honest`` ≥ ln 1/beta;
            else ``undecided``.
        n: Number of residuals that count.
        segments: Number of laws that they were judged under.
        log_e_value: Natural logarithm of the e-value: the sum over the segments.
        log_e_max: Largest value that this had, which decides fraud.
        log_evidence_honest: Sum over the segments of the evidence against every alternative that a law names.
    """

    verdict: stats.Verdict = "undecided"
    n: int = 0
    segments: int = 0
    log_e_value: float = 0.0
    log_e_max: float = 0.0
    log_evidence_honest: float = 0.0


class Life:
    """The e-process of one account: feed it the residuals of audits as they come, read the evidence at any time.

    Args:
        alpha: Bound on the chance that an honest node is ever accused, in its whole life.
        beta: Bound on the chance that a node that never computes honestly is called honest.

    Raises:
        UsageError: A rate is not in (0, 1), when the first residuals come.

    Example:
        >>> from assay.poc.verdict import Life, default_noise
        >>> noise = default_noise("vector", "bfloat16", "bfloat16")
        >>> life = Life(alpha=1e-3, beta=1e-2)
        >>> life.update(noise, [noise.size] * 40).evidence.verdict
        'honest'
        >>> life.update(noise, [1.0] * 40).evidence.verdict
        'fraud'
    """

    def __init__(self, *, alpha: float, beta: float) -> None:
        self.alpha, self.beta = alpha, beta
        self._tests: dict[str, stats.SequentialTest] = {}
        self._results: dict[str, stats.SequentialResult] = {}
        self._log_e_max = 0.0

    def update(self, noise: Noise, residuals: npt.ArrayLike | Sequence[float]) -> Self:
        """Take the residuals of one audit, in the order in which they were checked; NaN for a missing value.

        Args:
            noise: Honest noise that they are judged under. It must not be chosen after a look at them.
            residuals: Residuals that count: of nonces that did not count before.
        """
        law = dumps(noise.as_dict())
        if law not in self._tests:
            self._tests[law] = sequential_test(noise.law, alpha=self.alpha, beta=self.beta)
        before = self._results.get(law)
        others = math.fsum(result.log_e_value for name, result in self._results.items() if name != law)
        after = self._results[law] = self._tests[law].update(residuals).result
        # The maximum of a test that had its own earlier, beside other segments, says nothing of today: then the end
        # of this audit counts, which can only miss a maximum, never invent one.
        peak = after.log_e_max if after.log_e_max > (before.log_e_max if before else 0.0) else after.log_e_value
        self._log_e_max = max(self._log_e_max, others + peak)
        return self

    @property
    def evidence(self) -> Evidence:
        """The evidence, and the verdict that follows from it."""
        results = self._results.values()
        honest = math.fsum(result.log_evidence_honest for result in results)
        return Evidence(
            verdict=verdict_of(self._log_e_max, honest, alpha=self.alpha, beta=self.beta),
            n=sum(result.n for result in results),
            segments=len(results),
            log_e_value=math.fsum(result.log_e_value for result in results),
            log_e_max=self._log_e_max,
            log_evidence_honest=honest,
        )


def verdict_of(log_e: float, log_evidence_honest: float, *, alpha: float, beta: float) -> stats.Verdict:
    """Return the verdict that two numbers give: fraud first, then honest, else undecided."""
    if log_e >= -math.log(alpha):
        return "fraud"
    return "honest" if log_evidence_honest >= -math.log(beta) else "undecided"


def noise_from(values: JsonObject) -> Noise:
    """Return the noise that ``Noise.as_dict`` gave.

    Raises:
        CalibrationError: The values are not a law.
    """
    parameters = dict(values)
    source = parameters.pop("source", "")
    return Noise(law_from_dict(parameters), str(source))
