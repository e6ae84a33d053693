"""The residual test: a mixture likelihood ratio whose false-accusation bound holds however long one looks.

Residuals are independent, honest ones with density f₁. The alternatives are that all values come from noise m times
larger (another computation), for m on a grid from ``effect`` to junk, or that a share π of them is invented:

    g = f_m    or    g = (1 − π)·f₁ + π·f_junk.

The e-value is the average over the K alternatives of the likelihood ratios, E_n = (1/K) Σ_g Π_i g(x_i)/f₁(x_i). Under
honest noise it is a non-negative martingale that starts at 1, so P(sup_n E_n ≥ 1/α) ≤ α (Ville 1939; Ramdas, Grünwald,
Vovk and Shafer 2023). Fraud is declared when its running maximum reaches 1/α. The ratio Π f₁/f_effect bounds in the
same way the chance that noise ``effect`` times larger, or more, is taken for honest.

Suffixes: N values, K alternatives, M multiples.
"""

import math
from dataclasses import dataclass
from typing import Literal, Self

import numpy as np
import numpy.typing as npt
from scipy import special

from assay.errors import UsageError
from assay.stats._chord import FloatArray
from assay.stats._noise import NoiseLaw

Verdict = Literal["honest", "fraud", "undecided"]

JUNK_SHARES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
"""Shares π of invented values that the e-value averages over, beside all of them."""

_CHUNK = 1024
_SIMULATED = 200_000  # values simulated at a time, to bound memory


@dataclass(frozen=True, slots=True)
class SequentialResult:
    """All numbers behind a verdict.

    Args:
        verdict: ``fraud`` when ``log_e_max`` ≥ ln 1/alpha; else ``honest`` when ``log_evidence_honest`` ≥ ln 1/beta;
            else ``undecided``.
        n: Number of residuals seen, non-finite ones included.
        log_e_value: Natural logarithm of the e-value after the last residual; it does not depend on their order.
        log_e_max: Running maximum of that, which decides fraud; it depends on the order.
        log_evidence_honest: Sum of ln f₁/f_effect; it does not depend on the order.
        gross: Number of residuals above ``gross_threshold``.
        gross_threshold: Residual that honest noise exceeds once in ten thousand.
        junk_share_excluded: Share of invented values; the gross count excludes a larger one at confidence 1 − beta.
        alpha: Bound on the chance that an honest node is ever accused.
        beta: Bound on the chance that noise ``effect`` times the honest one, or more, is called honest.
        effect: Smallest factor that counts as another computation.
    """

    verdict: Verdict
    n: int
    log_e_value: float
    log_e_max: float
    log_evidence_honest: float
    gross: int
    gross_threshold: float
    junk_share_excluded: float
    alpha: float
    beta: float
    effect: float


class SequentialTest:
    """The residual test for one noise law: feed it residuals as they come, read the verdict at any time.

    The bound alpha belongs to one object, over everything it will ever see: keep one per node and calibration, or
    divide alpha among several. An object holds no more than a few numbers per alternative and can be pickled.

    Args:
        law: Law of honest noise, and of its larger versions.
        alpha: Bound on the chance that an honest node is ever accused.
        beta: Bound on the chance that noise of at least ``effect`` times the honest one is called honest.
        effect: Smallest factor of noise that counts as another computation.

    Raises:
        UsageError: A rate is out of range, or invented values are within ``effect`` of honest noise.
    """

    def __init__(self, law: NoiseLaw, *, alpha: float = 1e-3, beta: float = 1e-2, effect: float) -> None:
        _check_rates(law, alpha, beta, effect)
        self.law = law
        self.alpha, self.beta, self.effect = alpha, beta, effect
        # One multiple per factor of two: between two of them the loss of evidence per value is small.
        steps = math.ceil(math.log2(law.junk_multiple / effect)) + 1
        self._multiples_M = np.geomspace(effect, law.junk_multiple, max(steps, 2))
        self._log_ratio_K = np.zeros(self._multiples_M.size + len(JUNK_SHARES))
        self._log_e_max = 0.0
        self._log_honest = 0.0
        self._n = 0
        self._gross = 0

    def update(self, values: npt.ArrayLike) -> Self:
        """Take more residuals (or L2 distances, as the law has it), [N], in the order in which they were checked.

        A non-finite value counts as the largest residual there can be: gross, and the strongest evidence of fraud.
        """
        size_N = self.law.magnitudes(values)
        for start in range(0, size_N.size, _CHUNK):
            self._take(size_N[start : start + _CHUNK])
        return self

    def accusations(self, values_RC: npt.ArrayLike) -> npt.NDArray[np.bool_]:
        """Return whether each of R new nodes with C residuals would have been accused after each of them, [R, C].

        For simulation: every row starts from nothing, and this object keeps its state.
        """
        size_RC = self.law.magnitudes(values_RC).reshape(np.shape(values_RC))
        if not size_RC.size:
            return np.zeros(size_RC.shape, dtype=np.bool_)
        accused = []
        for part_RC in np.array_split(size_RC, -(-size_RC.size // _SIMULATED)):
            path_RCK = self._steps(part_RC.ravel()).reshape(*part_RC.shape, -1).cumsum(axis=1)
            accused.append(np.maximum.accumulate(_log_mean(path_RCK), axis=1) >= -math.log(self.alpha))
        return np.concatenate(accused)

    def _steps(self, size_N: FloatArray) -> FloatArray:
        """Return the logarithms of g/f₁ of every value, for every alternative, [N, K]."""
        honest_N = self.law.log_density(size_N, 1.0)
        ratio_NM = np.stack([self.law.log_density(size_N, float(m)) - honest_N for m in self._multiples_M], axis=1)
        # (1 − π) + π·f_junk/f₁ for every share
        mixed = [np.logaddexp(math.log1p(-share), math.log(share) + ratio_NM[:, -1]) for share in JUNK_SHARES]
        return np.column_stack([ratio_NM, *mixed])

    def _take(self, size_N: FloatArray) -> None:
        step_NK = self._steps(size_N)
        # Starting the sum from the state makes the result independent of how the values were split into updates.
        path_NK = np.cumsum(np.vstack([self._log_ratio_K, step_NK]), axis=0)[1:]
        self._log_ratio_K = path_NK[-1]
        self._log_e_max = max(self._log_e_max, float(_log_mean(path_NK).max()))
        self._log_honest -= float(step_NK[:, 0].sum())
        self._n += size_N.size
        self._gross += int(np.count_nonzero(size_N > self.law.gross_threshold))

    @property
    def verdict(self) -> Verdict:
        """``honest``, ``fraud`` or ``undecided``, by the rule of `SequentialResult.verdict`."""
        if self._log_e_max >= -math.log(self.alpha):
            return "fraud"
        return "honest" if self._log_honest >= -math.log(self.beta) else "undecided"

    @property
    def result(self) -> SequentialResult:
        """The verdict with every number it rests on."""
        return SequentialResult(
            verdict=self.verdict,
            n=self._n,
            log_e_value=float(_log_mean(self._log_ratio_K)),
            log_e_max=self._log_e_max,
            log_evidence_honest=self._log_honest,
            gross=self._gross,
            gross_threshold=self.law.gross_threshold,
            junk_share_excluded=self._junk_share_excluded(),
            alpha=self.alpha,
            beta=self.beta,
            effect=self.effect,
        )

    def _junk_share_excluded(self) -> float:
        """Return the Clopper-Pearson bound of the gross share, over the chance that an invented value is gross.

        With no gross residual and certain detection this is 1 − beta^(1/n).
        """
        if self._gross >= self._n:
            return 1.0
        gross_share = float(special.betaincinv(self._gross + 1, self._n - self._gross, 1 - self.beta))
        return min(1.0, gross_share / self.law.junk_detection) if self.law.junk_detection > 0 else 1.0


def _check_rates(law: NoiseLaw, alpha: float, beta: float, effect: float) -> None:
    if not (0 < alpha < 1 and 0 < beta < 1 and 1 < effect < math.inf):
        raise UsageError(
            f"alpha {alpha}, beta {beta}, effect {effect}",
            wanted="alpha and beta in (0, 1), effect above 1",
            do="use the defaults 1e-3, 1e-2 and 4",
        )
    if law.junk_multiple <= effect:
        raise UsageError(
            f"honest noise only {law.junk_multiple:.3g} times smaller than invented values",
            wanted=f"more than effect = {effect:g} times",
            do="calibrate on closer hardware, or lower effect",
        )


def _log_mean(log_K: FloatArray) -> FloatArray:
    """Return the logarithm of the mean of exp over the last axis."""
    top = log_K.max(axis=-1, keepdims=True)
    return np.asarray(top[..., 0] + np.log(np.exp(log_K - top).mean(axis=-1)), dtype=np.float64)
