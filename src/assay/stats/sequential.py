"""The residual test: a mixture likelihood ratio for residuals that are independent.

    E_n = Σ_r w_r Σ_g v_g Π_i g(x_i)  /  Σ_r w_r Π_i f_r(x_i),    g = (1 − π)·f_r + π·f_rm

docs/statistics.md says what the scales r and the cheats g stand for. E decides fraud
(:mod:`assay.stats.e_values`). The same ratio the other way round, for one cheat at a time, bounds
the chance that this cheat or a larger one is called honest; it is weighed by the ratios of the law.
For E, the ratio f_rm/f_r is capped and priced where honest residuals are known
(:mod:`assay.stats.fair_bets`).

Suffixes: N values, H scales of honest machines, J scales of cheats, M multiples, P shares, K
cheats, R simulated nodes, C values of a node, U different values.
"""

import math
from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt

from assay.errors import UsageError
from assay.stats.chord import FloatArray
from assay.stats.e_values import (
    CHEAP,
    Decision,
    EValueResult,
    check_rates,
    decide,
    grid_of_multiples,
    log_sum,
)
from assay.stats.fair_bets import fair_bets
from assay.stats.noise_laws import LARGEST_LOG, NoiseLaw, Spread

SHARES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.4, 1.0)
"""Shares π of a node's nonces that the e-value looks for."""

EXCLUDED = ((0.1, 1.25), (0.4, 2.5))
"""Shares π of cheaply computed nonces that an honest verdict excludes, each with a factor c.

A nonce gives at most −ln(1 − π) of evidence against a share, and most give less. So the smallest
share is excluded for which n nonces can give c times the evidence that is needed.
"""

LARGEST_SIMULATION = 20_000
"""Different values of simulated nodes whose steps are in memory together."""

_SHARE_WEIGHTS = np.array([0.02, 0.02, 0.04, 0.12, 0.15, 0.2, 0.45])  # of SHARES
_CHUNK = 256  # values taken at a time
_ROUNDING = 1e-6  # of logarithms of e-values


@dataclass(frozen=True, slots=True)
class SequentialResult(EValueResult):
    """All numbers behind the verdict of a `SequentialTest`.

    ``alpha``, ``beta`` and ``effect`` are those of the test.

    Args:
        weakest: Name of the cheat that the evidence for honesty is weakest against.
        share_excluded: Share of cheaply computed nonces that an honest verdict excludes; None if n
            is too small.
        gross: Number of residuals above ``gross_threshold``.
        gross_threshold: Residual that honest noise exceeds once in ten thousand.
    """

    weakest: str
    share_excluded: float | None
    gross: int
    gross_threshold: float
    alpha: float
    beta: float
    effect: float


class SequentialTest:
    """The sequential residual test for one noise law.

    The bound alpha is that of one object over all its values: keep one per node and calibration, or
    divide alpha among several. An object can be pickled.

    Args:
        law: Law of honest noise, and of its larger versions.
        spread: Law of the scale of a machine relative to ``law``; a known scale when None.
        alpha: Bound on the chance that an honest node is ever accused.
        beta: Bound on the chance that a cheat which an honest verdict excludes is called honest.
        effect: Smallest factor of noise that counts as another computation.
        honest: Honest residuals that the law was measured on, [N], which price the bets; the law
            prices them when None.
        widest: Honest residuals of the pair of machines whose shape is the widest, [N], which price
            the bets on a share of the nonces, because a share looks like a wider shape; ``honest``
            when None.

    Raises:
        UsageError: A rate is out of range, or invented values are within ``effect`` of honest
            noise.
    """

    def __init__(
        self,
        law: NoiseLaw,
        *,
        spread: Spread | None = None,
        alpha: float = 1e-3,
        beta: float = 1e-2,
        effect: float,
        honest: npt.ArrayLike | None = None,
        widest: npt.ArrayLike | None = None,
    ) -> None:
        check_rates(alpha, beta, effect)
        junk = law.junk_multiple
        if junk <= effect:
            raise UsageError(
                f"honest noise only {junk:.3g} times smaller than invented values",
                wanted=f"more than effect = {effect:g} times",
                do="calibrate on closer hardware, or lower effect",
            )
        self.law = law
        self.spread = spread or Spread()
        self.alpha = alpha
        self.beta = beta
        self.effect = effect
        also = [CHEAP] if effect < CHEAP < junk else []
        self._multiples_M = grid_of_multiples(effect, junk, also)
        self._cheap = int(np.argmin(np.abs(self._multiples_M - CHEAP)))
        # Logarithms of caps and of prices: of bets on all nonces, and on a share of them.
        self._whole_2M, self._share_2M = (
            np.array([[np.inf], [0.0]])
            if priced_by is None
            else np.log(fair_bets(law, priced_by, self._multiples_M))
            for priced_by in (honest, honest if widest is None else widest)
        )
        self._scales_J, weight_J = self.spread.atoms
        self._honest_H, honest_weight_H = self.spread.fine
        count = self._multiples_M.size
        log_scale_J = np.log(weight_J)
        log_cheat_K = np.log(np.repeat(_SHARE_WEIGHTS / count, count))
        bets_JK = log_scale_J[:, None] + log_cheat_K
        excluded_JP = np.repeat(log_scale_J, len(SHARES))
        self.honest_paths: int = honest_weight_H.size
        """Number of paths of honest noise, which stand first: E divides by the sum of their exp."""
        self.excluding: int = excluded_JP.size
        """Number of paths of cheats that an honest verdict excludes, which stand last.

        Their ratios are those of the law. Between are the paths of the bets.
        """
        self.prior: FloatArray = np.concatenate(
            [np.log(honest_weight_H), bets_JK.ravel(), excluded_JP]
        )
        """Logarithms of the weights of all paths: honest [H], bets [J·K], excluded [J·P]."""
        self._log_path = self.prior
        self._log_e_max = 0.0
        self._n = 0
        self._gross = 0

    def update(self, values: npt.ArrayLike) -> Self:
        """Take residuals, or L2 distances if the law is of those, [N], in the order of checking.

        A non-finite value counts as the largest residual that is possible: gross, and the strongest
        evidence of fraud.
        """
        magnitude_N = self.law.magnitudes(values)
        for start in range(0, magnitude_N.size, _CHUNK):
            size_N = magnitude_N[start : start + _CHUNK]
            # The sum starts from the state, so that the result does not depend on how the values
            # were split into updates.
            path = np.cumsum(np.vstack([self._log_path, self.steps(size_N)]), axis=0)[1:]
            # A view would keep the paths of all values in memory.
            self._log_path = path[-1].copy()
            self._log_e_max = max(self._log_e_max, float(self.log_e(path).max()))
            self._n += size_N.size
            self._gross += int(np.count_nonzero(size_N > self.law.gross_threshold))
        return self

    def accusations(self, values_RC: npt.ArrayLike) -> npt.NDArray[np.bool_]:
        """Return whether simulated nodes are accused after each of their residuals, [R, C].

        The state of this object does not change.
        """
        size_RC: FloatArray = self.law.magnitudes(values_RC).reshape(np.shape(values_RC))
        accused_RC = np.zeros(size_RC.shape, dtype=np.bool_)
        together = max(1, LARGEST_SIMULATION // max(1, size_RC.shape[1]))
        for start in range(0, len(size_RC), together):
            self._accuse(size_RC[start : start + together], accused_RC[start : start + together])
        return accused_RC

    def _accuse(self, size_RC: FloatArray, accused_RC: npt.NDArray[np.bool_]) -> None:
        """Set ``accused_RC`` to True from the residual on with which a node is accused."""
        # Audits drawn from the same residuals share their steps, which cost more than their sums.
        value_U, index = np.unique(size_RC, return_inverse=True)
        index_RC = index.reshape(size_RC.shape)
        steps_U = self.steps(value_U)
        needed = -math.log(self.alpha)
        # Nodes that are not accused yet.
        open_R = np.arange(len(size_RC))
        path = np.tile(self.prior, (open_R.size, 1))
        for column in range(size_RC.shape[1]):
            path += steps_U[index_RC[open_R, column]]
            # A sum is at most its largest term times their number, so most e-values need not be
            # computed.
            bets = path[:, self.honest_paths : -self.excluding]
            largest_R = bets.max(axis=1) - path[:, : self.honest_paths].max(axis=1)
            near = np.flatnonzero(largest_R + math.log(bets.shape[1]) > needed - _ROUNDING)
            over = near[self.log_e(path[near]) >= needed]
            if over.size:
                accused_RC[open_R[over], column:] = True
                open_R = np.delete(open_R, over)
                path = np.delete(path, over, axis=0)

    def steps(self, values: npt.ArrayLike) -> FloatArray:
        """Return the logarithms that every value adds to every path, [N, paths].

        They are relative to the density of the law.
        """
        size_N1 = self.law.magnitudes(values)[:, None]
        # All paths are ratios to the typical scale, so that sums of thousands stay small.
        base_N1 = self.law.log_density(size_N1, 1.0)
        honest_NH = self.law.log_density(size_N1, self._honest_H) - base_N1
        scaled_NJ1 = self.law.log_density(size_N1, self._scales_J)[:, :, None]
        cheats_JM = self._scales_J[:, None] * self._multiples_M
        ratio_NJM = self.law.log_density(size_N1[:, :, None], cheats_JM) - scaled_NJ1
        # Ratios are cut off at their caps, and divided by their prices.
        share_NJM = np.minimum(ratio_NJM, self._share_2M[0]) - self._share_2M[1]
        whole_NJM = np.minimum(ratio_NJM, self._whole_2M[0]) - self._whole_2M[1]
        scale_NJ11 = (scaled_NJ1 - base_N1[:, :, None])[..., None]
        bets_NJPM = scale_NJ11 + _mixed(share_NJM, whole_NJM)
        cheap_NJ1 = ratio_NJM[:, :, [self._cheap]]
        excluded_NJP1 = scale_NJ11 + _mixed(cheap_NJ1, ratio_NJM[:, :, [0]])
        paths = [honest_NH, bets_NJPM, excluded_NJP1]
        return np.concatenate([path.reshape(size_N1.size, -1) for path in paths], axis=1)

    def log_e(self, path: FloatArray) -> FloatArray:
        """Return the log e-value of paths, which are `prior` plus the steps of residuals."""
        bets = path[..., self.honest_paths : -self.excluding]
        return log_sum(bets) - log_sum(path[..., : self.honest_paths])

    def honest_over(self) -> FloatArray:
        """Return the log likelihood ratio of honest noise to every share of `SHARES`, [P].

        A share below one is at `CHEAP` times the noise, and all nonces are at ``effect`` times.
        """
        honest = float(log_sum(self._log_path[: self.honest_paths]))
        excluded_JP = self._log_path[-self.excluding :].reshape(-1, len(SHARES))
        return honest - log_sum(excluded_JP.T)

    @property
    def verdict(self) -> Decision:
        """Decision by :func:`decide`."""
        return self.result.verdict

    @property
    def result(self) -> SequentialResult:
        """The verdict with the numbers that it rests on."""
        log_beta = math.log(self.beta)
        # The smallest share for which so many nonces can give enough.
        share = next((pi for pi, c in EXCLUDED if self._n * math.log1p(-pi) <= c * log_beta), None)
        over_P = self.honest_over().tolist()
        evidence = {f"{self.effect:g} times the honest noise": over_P[-1]}
        if share is not None:
            cheap = self._multiples_M[self._cheap]
            cheat = f"{share:.0%} of the nonces at {cheap:.3g} times the honest noise"
            evidence[cheat] = over_P[SHARES.index(share)]
        weakest = min(evidence, key=lambda cheat: evidence[cheat])
        return SequentialResult(
            verdict=decide(self._log_e_max, evidence[weakest], alpha=self.alpha, beta=self.beta),
            n=self._n,
            log_e_value=float(self.log_e(self._log_path)) if self._n else 0.0,
            log_e_max=self._log_e_max,
            log_evidence_honest=float(evidence[weakest]) if self._n else 0.0,
            weakest=weakest,
            share_excluded=share,
            gross=self._gross,
            gross_threshold=self.law.gross_threshold,
            alpha=self.alpha,
            beta=self.beta,
            effect=self.effect,
        )


def _mixed(share: FloatArray, whole: FloatArray) -> FloatArray:
    """Return ln((1 − π) + π·R) for every share π below one, and for one ``whole``, [..., P, M].

    ``share`` has the logarithms of R, [..., M].
    """
    shares_P1 = np.array(SHARES)[:-1, None]
    mixed = np.log1p(shares_P1 * np.expm1(np.minimum(share, LARGEST_LOG))[..., None, :])
    return np.concatenate([mixed, whole[..., None, :]], axis=-2)
