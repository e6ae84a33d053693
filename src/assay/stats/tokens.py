"""Laws and test of sampled tokens: the chance of a claimed token where the scores of two engines
differ by a little.

    p_σ(v) = exp(−gap_v/σ) / Σ_w exp(−gap_w/σ)

docs/statistics.md ("Tokens of responses") says what the gaps are, and why p_σ is the chance of
token v where scores differ at the scale σ, in units of the logits. The *profile* of a claimed token
is its log p_σ on a fixed grid of σ, and ln 1/V: the law of a token that does not depend on the
scores. An honest law is a mixture over that grid. So every law, every larger noise and every share
of it is one vector of weights.

The residual test for values that come in clusters, such as the tokens of one response, is

    h_r = Σ_u q_u Π_i f_ru(x_i)
    E = Σ_r w_r Σ_g v_g Π_clusters g_r  /  Σ_r w_r Π_clusters h_r

h_r is the likelihood of a cluster x_1 … x_n of an honest machine, with f_s the likelihood at noise
s times that of the law. The scale r of the machine is drawn once for a life, and the scale u of a
cluster once for it, ln u ~ between · t: values of one cluster share more than the law says, such as
a long prompt or a batch mate. g_r is the likelihood of a cluster of a cheat: noise m times larger
in all values, h_rm; in a share π of the values, with (1 − π)·f_ru + π·f_rum in place of f_ru; or in
a share ρ of the clusters, (1 − ρ)·h_r + ρ·h_rm. w and v are weights over scales and cheats. Under
honest noise E is a non-negative martingale from 1, at every value and not only at the end of a
cluster. Everything is evaluated on one grid of ln scale, so that r, u and m are steps on it.

Suffixes: N values, G columns of a profile, B ends of blocks, C points of the grid, H scales of
    honest machines, J
scales of cheats, U scales of clusters, M multiples, K paths.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt
import scipy

from assay.errors import UsageError
from assay.stats.chord import FloatArray
from assay.stats.noise import REACH, LogNoise, Spread, Strict, require
from assay.stats.sequential import (
    CHEAP,
    FAR,
    Result,
    check_rates,
    decide,
    grid_of_multiples,
    log_sum,
)

# Grid of scales σ of a profile, in units of the logits: from the rounding of float32 to anything.
SCALES: FloatArray = np.exp2(np.arange(-20, 7, dtype=np.float64))
COLUMNS = SCALES.size + 1  # number of columns of a profile: the scales, and 1/V
LEAST_LOG = -6e4  # logarithm of the smallest probability of a profile, which float16 holds
LEAST_STRAY = 1e-6  # least share of tokens that do not depend on the scores
CLUSTER_DOF = 4.0  # degrees of freedom of the law of the scales of clusters
STEP = 1 / 64  # distance of neighbours on the grid of ln scale on which tests stand


@dataclass(frozen=True, slots=True)
class TokenNoise(Strict):
    """The law of claimed tokens: weights of the scales in :data:`SCALES`, and of tokens that ignore
    the scores.

    Args:
        weights: Weight of every column of a profile; they sum to 1.

    Raises:
        UsageError: The weights are not probabilities, or leave no room for a stray token.
    """

    weights: tuple[float, ...]

    def __post_init__(self) -> None:
        good = len(self.weights) == COLUMNS and all(0 <= weight <= 1 for weight in self.weights)
        if (
            not good
            or abs(math.fsum(self.weights) - 1) > 1e-9
            or self.weights[-1] < LEAST_STRAY * 0.999
        ):
            seen = (
                f"{len(self.weights)} weights of a law of tokens with sum "
                f"{math.fsum(self.weights):.6g}"
            )
            wanted = f"{COLUMNS} probabilities with sum 1, the last one at least {LEAST_STRAY:g}"
            raise UsageError(
                seen, wanted=wanted, do="check the calibration that this law comes from"
            )

    @property
    def size(self) -> float:
        """The scale that nine tenths of the differences do not exceed, in units of the logits."""
        within = np.cumsum(self.weights[:-1])
        return float(SCALES[int(np.searchsorted(within, 0.9 * within[-1]))])

    @property
    def junk_multiple(self) -> float:
        """Multiple of this noise at which a token hardly depends on the scores."""
        return max(4.0, float(SCALES[-3]) / self.size)

    def scaled(self, factor: float) -> Self:
        """Return the law of differences ``factor`` times larger."""
        return type(self)(tuple(self.weights_at(np.array([math.log(factor)]))[:, 0]))

    def weights_at(self, logs_C: FloatArray) -> FloatArray:
        """Return the weights of the law with all its scales multiplied by exp(logs), [G, C]."""
        own = np.array(self.weights)
        return np.stack([shift_matrix(float(log)) @ own for log in logs_C], axis=1)

    def log_likelihoods(self, profiles_NG: npt.ArrayLike, logs_C: FloatArray) -> FloatArray:
        """Return the log-probability of tokens under the law with its scales multiplied by
        exp(logs), [N, C].
        """
        chances_NG = np.exp(np.asarray(profiles_NG, dtype=np.float64))
        return np.asarray(np.log(chances_NG @ self.weights_at(logs_C)), dtype=np.float64)


def shift_matrix(log: float) -> FloatArray:
    """Return the matrix [G, G] that takes weights to those of the law with all scales multiplied by
    exp(log).

    A scale between two of the grid is a mixture of these. What leaves the grid stays at its end.
    """
    count = SCALES.size
    places = np.clip(np.arange(count) + log / math.log(2), 0, count - 1)
    low = np.minimum(places.astype(int), count - 2)
    matrix = np.zeros((COLUMNS, COLUMNS))
    matrix[low, np.arange(count)] = 1 - (places - low)
    matrix[low + 1, np.arange(count)] += places - low
    matrix[-1, -1] = 1
    return matrix


def round_profiles(profiles_NG: npt.ArrayLike) -> FloatArray:
    """Return profiles as they are stored: not below :data:`LEAST_LOG`, and rounded to float16."""
    with np.errstate(under="ignore"):  # whatever a host program has asked numpy to raise
        rounded = np.maximum(np.asarray(profiles_NG, dtype=np.float64), LEAST_LOG).astype(
            np.float16
        )
    return rounded.astype(np.float64)


def cluster_scales(between: float) -> tuple[npt.NDArray[np.int64], FloatArray]:
    """Return the scales of clusters as steps on the grid of ln scale, and their probabilities, [U]
    each.

    Their logarithms follow Student's t with :data:`CLUSTER_DOF` degrees of freedom, so that one odd
    response in a few hundred does not accuse its node.
    """
    if not between:
        return np.zeros(1, dtype=np.int64), np.ones(1)
    deviations = np.linspace(-4, 4, 13)
    weights = (1 + deviations**2 / CLUSTER_DOF) ** (-(CLUSTER_DOF + 1) / 2)
    return np.rint(deviations * between / STEP).astype(np.int64), np.asarray(
        weights / weights.sum()
    )


ClusteredLaw = (
    TokenNoise | LogNoise
)  # of values that come in clusters: tokens by profiles, and sketches by distances
WITHIN = (0.02, 0.1, 0.4)  # shares π of the values of every cluster that the e-value looks for
CLUSTERS = (
    0.05,
    0.3,
)  # shares ρ of the clusters that it looks for; an honest verdict on enough excludes the last one
_WEIGHTS = {"whole": 0.4, "within": 0.3, "clusters": 0.3}
_LEAST = 2.0  # multiple that is looked for
_ENOUGH = 1.25  # an honest cluster speaks with at most −ln(1 − ρ) against a share; most say less
_NARROWEST = 2 * STEP  # spread of a machine that the grid resolves


@dataclass(frozen=True, slots=True)
class ClusterResult(Result):
    """All numbers behind the verdict of a `ClusterTest`; ``weakest`` is as in
    `SequentialResult`.
    """

    clusters: int
    weakest: str


class ClusterTest:
    """The test of clusters for one law: feed it clusters as they come, read the verdict at any
    time.

    Arguments that are not named here are those of `SequentialTest`.

    Args:
        law: Law of honest values.
        between: Spread of ln scale between clusters of one machine.
        effect: Smallest multiple of the noise that an honest verdict excludes; cheats are looked
            for from 2 on.

    Raises:
        UsageError: A rate, a spread or the effect is out of range.
    """

    def __init__(
        self,
        law: ClusteredLaw,
        *,
        spread: Spread | None = None,
        between: float = 0.0,
        alpha: float = 1e-3,
        beta: float = 1e-2,
        effect: float = 2.0,
    ) -> None:
        check_rates(alpha, beta, effect)
        require(0 <= between < 2, f"a spread of clusters of {between}", "a number in [0, 2)")
        self.law = law
        self.alpha = alpha
        self.beta = beta
        self.effect = effect
        self.between = between
        spread = spread or Spread()
        sd = max(spread.sd, _NARROWEST)
        reach = math.ceil(REACH * sd / STEP)
        machines = np.arange(-reach, reach + 1)
        of_cluster, weight_U = cluster_scales(self.between)
        few = np.unique(np.rint(np.linspace(-2, 2, 3) * sd / STEP).astype(int))
        weight_H = scipy.stats.t.pdf(machines * STEP / sd, spread.dof)
        weight_J = scipy.stats.t.pdf(few * STEP / sd, spread.dof)
        cheap = max(CHEAP, self.effect)
        fours = math.log(max(self.law.junk_multiple, FAR) / FAR) / math.log(4)
        self._multiples = grid_of_multiples(
            _LEAST, FAR * 4.0 ** math.ceil(fours), [self.effect, cheap]
        )
        steps = np.rint(np.log(self._multiples) / STEP).astype(int)
        self._excluded = int(np.argmin(np.abs(self._multiples - self.effect)))
        self._cheap = int(np.argmin(np.abs(self._multiples - cheap)))
        self._log_U = np.log(weight_U / weight_U.sum())
        self._log_J = np.log(weight_J / weight_J.sum())
        log_H = np.log(weight_H / weight_H.sum())
        points_JMU = few[:, None, None] + steps[:, None] + of_cluster
        every = (
            machines[:, None] + of_cluster,
            few[:, None] + of_cluster,
            points_JMU,
        )  # [H, U], [J, U], [J, M, U]
        points = np.unique(np.concatenate([each.ravel() for each in every]))
        self._logs_C = points * STEP
        self._at_HU, self._at_JU, self._at_JMU = (np.searchsorted(points, each) for each in every)
        cheats_JM = (self._log_J[:, None] - np.log(steps.size) + np.zeros((1, steps.size))).ravel()
        kinds = (("whole", 1), ("within", len(WITHIN)), ("clusters", len(CLUSTERS)))
        cheats = [
            cheats_JM + math.log(_WEIGHTS[kind] / count)
            for kind, count in kinds
            for _ in range(count)
        ]
        self._log_prior_K = np.concatenate([log_H, *cheats])
        self._honest = log_H.size
        self._path_K = np.zeros(self._log_prior_K.size)
        self._log_e_max = 0.0
        self.n = self.clusters = 0

    def paths(self, values: npt.ArrayLike, ends: Sequence[int]) -> FloatArray:
        """Return the logarithms that the values of one cluster add to every path up to each end of
        a block, [B, K].

        An end is the number of values before it; ``ends`` do not descend.
        """
        logs_NC = self.law.log_likelihoods(values, self._logs_C)
        sums_BC = _sum_to_ends(logs_NC, ends)
        log_U = self._log_U
        every = (self._at_HU, self._at_JU, self._at_JMU)
        honest_BH, own_BJ, whole_BJM = (log_sum(sums_BC[:, at] + log_U) for at in every)
        parts = [honest_BH, whole_BJM]
        plain_NJ1U = logs_NC[:, self._at_JU][:, :, None]
        for share in WITHIN:
            mixed = np.logaddexp(
                plain_NJ1U + math.log1p(-share), logs_NC[:, self._at_JMU] + math.log(share)
            )
            parts.append(log_sum(_sum_to_ends(mixed, ends) + log_U))
        own_BJ1 = own_BJ[:, :, None]
        parts += [
            np.logaddexp(own_BJ1 + math.log1p(-share), whole_BJM + math.log(share))
            for share in CLUSTERS
        ]
        return np.concatenate([part.reshape(len(sums_BC), -1) for part in parts], axis=1)

    def log_e(self, paths: FloatArray) -> FloatArray:
        """Return the logarithm of the e-value of paths [..., K] from the beginning of a life."""
        whole = paths + self._log_prior_K
        return log_sum(whole[..., self._honest :]) - log_sum(whole[..., : self._honest])

    def take(self, values: npt.ArrayLike, ends: Sequence[int]) -> FloatArray:
        """Take one cluster; return the logarithm of the e-value at the end of each of its blocks,
        [B].
        """
        ends = [*ends] or [0]
        paths_BK = self._path_K + self.paths(values, ends)
        logs_B = self.log_e(paths_BK)
        self._path_K = paths_BK[-1]
        self._log_e_max = max(self._log_e_max, float(logs_B.max()))
        self.n += ends[-1]
        self.clusters += bool(ends[-1])
        return logs_B

    def update(self, values: npt.ArrayLike) -> Self:
        """Take one cluster, and look at its end only."""
        self.take(values, [len(np.asarray(values))])
        return self

    @property
    def evidence(self) -> dict[str, float]:
        """The logarithm of the likelihood ratio of honest noise to every cheat that an honest
        verdict excludes.
        """
        honest_H, cheats = np.split(self._path_K, [self._honest])
        honest = float(log_sum(honest_H + self._log_prior_K[: self._honest]))
        paths_KJM = cheats.reshape(-1, self._log_J.size, self._multiples.size)  # K kinds of cheats

        def against(kind: int, multiple: int) -> float:
            return honest - float(log_sum(paths_KJM[kind, :, multiple] + self._log_J))

        found = {f"{self.effect:g} times the honest noise": against(0, self._excluded)}
        if -self.clusters * math.log1p(-CLUSTERS[-1]) >= -_ENOUGH * math.log(self.beta):
            name = (
                f"{CLUSTERS[-1]:.0%} of the responses at {self._multiples[self._cheap]:.3g} times "
                f"the honest noise"
            )
            found[name] = against(-1, self._cheap)
        return found

    @property
    def result(self) -> ClusterResult:
        """The verdict with every number that it rests on."""
        evidence = self.evidence
        weakest = min(evidence, key=lambda name: evidence[name])
        return ClusterResult(
            verdict=decide(self._log_e_max, evidence[weakest], alpha=self.alpha, beta=self.beta),
            n=self.n,
            clusters=self.clusters,
            log_e_value=float(self.log_e(self._path_K)),
            log_e_max=self._log_e_max,
            log_evidence_honest=evidence[weakest],
            weakest=weakest,
        )


def _sum_to_ends(values: FloatArray, ends: Sequence[int]) -> FloatArray:
    """Return the sums of the values before each end, [B, ...]."""
    total = np.concatenate([np.zeros((1, *values.shape[1:])), values.cumsum(axis=0)])
    return total[np.asarray(ends, dtype=np.int64)]
