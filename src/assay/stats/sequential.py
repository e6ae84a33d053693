"""The residual test: a mixture likelihood ratio whose false-accusation bound holds however long one
looks.

    E_n = Σ_r w_r Σ_g v_g Π_i g(x_i)  /  Σ_r w_r Π_i f_r(x_i),    g = (1 − π)·f_r + π·f_rm

docs/statistics.md says what the scales r and the cheats g stand for, and why P(sup_n E_n ≥ 1/α) ≤ α
(Ville 1939; Ramdas, Grünwald, Vovk and Shafer 2023). The same ratio the other way round, for one
cheat at a time, bounds the chance that this cheat or a larger one is called honest; it is weighed
by the ratios of the law. For E, the ratio f_rm/f_r is capped and priced where honest residuals are
known (`assay.stats.noise.fair_bets`).

Suffixes: N values, H scales of honest machines, J scales of cheats, M multiples, P shares, K
    cheats.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Self

import numpy as np
import numpy.typing as npt

from assay.errors import UsageError
from assay.stats.chord import FloatArray
from assay.stats.noise import LARGEST_LOG, NoiseLaw, Spread, fair_bets

Verdict = Literal["honest", "fraud", "undecided"]  # verdict of a sequential test
CHEAP = 5.0  # multiple of honest noise at which a share of the nonces counts as computed cheaply
FAR = 16.0  # multiple beyond which neighbours on the grid are further apart
SHARES = (
    0.01,
    0.02,
    0.05,
    0.1,
    0.2,
    0.4,
    1.0,
)  # shares π of a node's nonces that the e-value looks for
_SHARE_WEIGHTS = np.array([0.02, 0.02, 0.04, 0.12, 0.15, 0.2, 0.45])
_CHUNK = 256  # values taken at a time
_SIMULATED = 20_000  # values simulated at a time, to bound memory
_TOGETHER = 256  # nodes simulated at a time, whose sums fit into a cache
_ROUNDING = 1e-6  # of logarithms of e-values

# Shares π of cheaply computed nonces that an honest verdict excludes, each with a factor c. A nonce
# gives at most −ln(1 − π) of evidence against a share, and most give less. So the smallest share is
# excluded for which n nonces can give c times the evidence that is needed.
EXCLUDED = ((0.1, 1.25), (0.4, 2.5))


def decide(log_e_max: float, log_evidence_honest: float, *, alpha: float, beta: float) -> Verdict:
    """Return ``fraud`` if log_e_max ≥ ln 1/alpha, else ``honest`` if the evidence ≥ ln 1/beta, else
    ``undecided``.
    """
    if log_e_max >= -math.log(alpha):
        return "fraud"
    return "honest" if log_evidence_honest >= -math.log(beta) else "undecided"


def grid_of_multiples(low: float, high: float, also: Sequence[float] = ()) -> FloatArray:
    """Return the multiples from ``low`` to ``high`` and ``also``, in ascending order, [M].

    Neighbours are at most a factor of two apart, and of four beyond `FAR`, where honest noise
    explains no multiple. Between neighbours little evidence per value is lost, and every further
    multiple takes weight from the others.
    """
    near = max(min(FAR, high), low)
    return np.unique(
        np.concatenate([_geometric(low, near, 2.0), _geometric(near, high, 4.0), also])
    )


def _geometric(low: float, high: float, factor: float) -> FloatArray:
    return (
        np.geomspace(low, high, math.ceil(math.log(high / low) / math.log(factor)) + 1)
        if low < high
        else np.ones(0)
    )


def log_sum(path: FloatArray) -> FloatArray:
    """Return the logarithm of the sum of exp over the last axis, which has finite values."""
    top = path.max(axis=-1, keepdims=True)
    return np.asarray(top[..., 0] + np.log(np.exp(path - top).sum(axis=-1)), dtype=np.float64)


def check_rates(alpha: float, beta: float, effect: float) -> None:
    """Refuse error rates and a multiple of noise that no test can have, with a UsageError."""
    if not (0 < alpha < 1 and 0 < beta < 1 and 1 < effect < math.inf):
        wanted = "alpha and beta in (0, 1), effect above 1"
        do = "use 1e-3, 1e-2, and an effect of 4 for distances or 2 for vectors"
        raise UsageError(f"alpha {alpha}, beta {beta}, effect {effect}", wanted=wanted, do=do)


@dataclass(frozen=True, slots=True)
class Result:
    """What every test says of the values that it has seen; logarithms are natural ones.

    Args:
        verdict: Verdict by :func:`decide`.
        n: Number of values seen, non-finite ones included; of responses, of their blocks of 32
            tokens.
        log_e_value: Logarithm of the e-value after the last value; it does not depend on their
            order.
        log_e_max: Running maximum of that, which decides fraud; it depends on the order.
        log_evidence_honest: Least evidence against any cheat that an honest verdict excludes, as
            the logarithm of a likelihood ratio; it does not depend on the order.
    """

    verdict: Verdict
    n: int
    log_e_value: float
    log_e_max: float
    log_evidence_honest: float


@dataclass(frozen=True, slots=True)
class SequentialResult(Result):
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
    """The residual test for one noise law: feed it residuals as they come, read the verdict at any
    time.

    The bound alpha belongs to one object, over everything it will ever see: keep one per node and
    calibration, or divide alpha among several. An object can be pickled.

    Args:
        law: Law of honest noise, and of its larger versions.
        spread: Law of the scale of a machine over that of ``law``; a known scale when None.
        alpha: Bound on the chance that an honest node is ever accused.
        beta: Bound on the chance that a cheat which an honest verdict excludes is called honest.
        effect: Smallest factor of noise that counts as another computation.
        honest: Honest residuals that the law was measured on, [N], which price the bets; the law is
            believed when None.
        widest: Those of the pair of machines whose shape is the widest, [N], which price the bets
            on a share of the nonces, because a share looks like a wider shape; ``honest`` when
            None.

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
        if (junk := law.junk_multiple) <= effect:
            seen = f"honest noise only {junk:.3g} times smaller than invented values"
            do = "calibrate on closer hardware, or lower effect"
            raise UsageError(seen, wanted=f"more than effect = {effect:g} times", do=do)
        self.law = law
        self.spread = spread or Spread()
        self.alpha = alpha
        self.beta = beta
        self.effect = effect
        self._multiples_M = grid_of_multiples(
            effect, junk, [CHEAP] if effect < CHEAP < junk else []
        )
        self._cheap = int(np.argmin(np.abs(self._multiples_M - CHEAP)))
        self._whole_2M = self._share_2M = np.array(
            [[np.inf], [0.0]]
        )  # logarithms of caps, and of prices
        if honest is not None:
            self._whole_2M = self._share_2M = np.log(fair_bets(law, honest, self._multiples_M))
        if widest is not None:
            self._share_2M = np.log(fair_bets(law, widest, self._multiples_M))
        self._scales_J, weight_J = self.spread.atoms
        self._honest_H, honest_H = self.spread.fine
        count = self._multiples_M.size
        weight_K = np.repeat(_SHARE_WEIGHTS / count, count)
        self._log_scale_J = np.log(weight_J)
        self._log_cheat_K = np.log(weight_K)
        # Number of paths of honest noise: E is Σ exp over those of the bets, over Σ exp over these.
        self.honest_paths: int = honest_H.size
        bets_JK = self._log_scale_J[:, None] + self._log_cheat_K
        self.excluding: int = self._scales_J.size * len(SHARES)
        """Number of paths of cheats that an honest verdict excludes, by the ratios of the law; they
        stand last.
        """
        excluded_JP = np.repeat(self._log_scale_J, len(SHARES))
        self.prior: FloatArray = np.concatenate([np.log(honest_H), bets_JK.ravel(), excluded_JP])
        """The logarithms of the weights with which all paths begin: honest ones [H], the bets'
        [J·K], and [J·P].
        """
        self._log_path = self.prior
        self._log_e_max = 0.0
        self._n = 0
        self._gross = 0

    def update(self, values: npt.ArrayLike) -> Self:
        """Take more residuals (or L2 distances, as the law has it), [N], in the order in which they
        were checked.

        A non-finite value counts as the largest residual there can be: gross, and the strongest
        evidence of fraud.
        """
        every_N = self.law.magnitudes(values)
        for start in range(0, every_N.size, _CHUNK):
            size_N = every_N[start : start + _CHUNK]
            # Starting the sum from the state makes the result independent of how the values were
            # split into updates.
            path = np.cumsum(np.vstack([self._log_path, self.steps(size_N)]), axis=0)[1:]
            self._log_path = path[-1]
            self._log_e_max = max(self._log_e_max, float(self.log_e(path).max()))
            self._n += size_N.size
            self._gross += int(np.count_nonzero(size_N > self.law.gross_threshold))
        return self

    def accusations(self, values_RC: npt.ArrayLike) -> npt.NDArray[np.bool_]:
        """Return whether R simulated nodes with C residuals are accused after each, [R, C]; no
        state changes.
        """
        nodes, checked = np.shape(values_RC)
        size_RC: FloatArray = self.law.magnitudes(values_RC).reshape(nodes, checked)
        accused_RC = np.zeros((nodes, checked), dtype=np.bool_)
        first = self.honest_paths
        needed = -math.log(self.alpha)
        # Audits drawn from the same residuals share their steps, which cost more than the sums of
        # them.
        rows = (
            _TOGETHER
            if np.unique(size_RC).size <= _SIMULATED
            else max(1, _SIMULATED // max(1, checked))
        )
        for start in range(0, nodes if checked else 0, rows):
            value_U, where = np.unique(size_RC[start : start + rows], return_inverse=True)
            which_RC = where.reshape(-1, checked)
            steps_U = self.steps(value_U)
            left_R = np.arange(len(which_RC))  # those that are not accused yet
            path = np.tile(self.prior, (left_R.size, 1))
            for column in range(checked):
                path += steps_U[which_RC[left_R, column]]
                # A sum is at most its largest term times their number, so most e-values need not be
                # computed.
                bets = path[:, first : -self.excluding]
                most_R = bets.max(axis=1) - path[:, :first].max(axis=1) + math.log(bets.shape[1])
                near = np.flatnonzero(most_R > needed - _ROUNDING)
                over = near[self.log_e(path[near]) >= needed]
                accused_RC[start + left_R[over], column:] = True
                left_R = np.delete(left_R, over)
                path = np.delete(path, over, axis=0) if over.size else path
                if not left_R.size:
                    break
        return accused_RC

    def steps(self, values: npt.ArrayLike) -> FloatArray:
        """Return the logarithms that every value adds to every path, over the density of the law:
        [N, paths].
        """
        size_N = self.law.magnitudes(values)
        base_N = self.law.log_density(size_N, 1.0)
        honest = [self.law.log_density(size_N, float(scale)) - base_N for scale in self._honest_H]
        bets = []
        excluded = []
        for scale in self._scales_J:
            own_N = self.law.log_density(size_N, float(scale))
            ratio_NM = np.stack(
                [self.law.log_density(size_N, float(scale * m)) - own_N for m in self._multiples_M],
                axis=1,
            )
            share_NM, whole_NM = (
                np.minimum(ratio_NM, cap) - price for cap, price in (self._share_2M, self._whole_2M)
            )
            of_scale_N1 = (own_N - base_N)[:, None]
            bets.append(of_scale_N1 + _mixed(share_NM, whole_NM).reshape(size_N.size, -1))
            cheap_NP1 = _mixed(ratio_NM[:, [self._cheap]], ratio_NM[:, [0]])
            excluded.append(of_scale_N1 + cheap_NP1[:, :, 0])
        return np.column_stack([*honest, *bets, *excluded])

    def log_e(self, path: FloatArray) -> FloatArray:
        """Return the logarithm of the e-value of paths: `prior` plus the steps of some
        residuals.
        """
        bets = path[..., self.honest_paths : -self.excluding]
        return log_sum(bets) - log_sum(path[..., : self.honest_paths])

    def honest_over(self) -> FloatArray:
        """Return the logarithm of the likelihood ratio of honest noise to every share of `SHARES`,
        [P].

        A share below one is at `CHEAP` times the noise, and all nonces are at ``effect`` times.
        """
        honest = float(log_sum(self._log_path[: self.honest_paths]))
        return honest - log_sum(self._log_path[-self.excluding :].reshape(-1, len(SHARES)).T)

    @property
    def verdict(self) -> Verdict:
        """Verdict by :func:`decide`."""
        return self.result.verdict

    @property
    def result(self) -> SequentialResult:
        """The verdict with every number it rests on."""
        known = (
            share
            for share, times in EXCLUDED
            if self._n * math.log1p(-share) <= times * math.log(self.beta)
        )
        share = next(known, None)
        over_P = self.honest_over().tolist()
        evidence = {f"{self.effect:g} times the honest noise": over_P[-1]}
        if share is not None:
            name = (
                f"{share:.0%} of the nonces at {self._multiples_M[self._cheap]:.3g} times the "
                f"honest noise"
            )
            evidence[name] = over_P[SHARES.index(share)]
        weakest = min(evidence, key=lambda name: evidence[name])
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


def _mixed(share_NM: FloatArray, whole_NM: FloatArray) -> FloatArray:
    """Return ln((1 − π) + π·R) for every share π below one and logarithm of R, and for one what
    stands beside it.
    """
    shares_P1 = np.array(SHARES)[:-1, None]
    mixed_NPM = np.log1p(shares_P1 * np.expm1(np.minimum(share_NM, LARGEST_LOG))[:, None, :])
    return np.concatenate([mixed_NPM, whole_NM[:, None, :]], axis=1)
