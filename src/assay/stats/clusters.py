"""The residual test for values that come in clusters, such as the tokens of one response.

    h_r = Σ_u q_u Π_i f_ru(x_i)
    E = Σ_r w_r Σ_g v_g Π_clusters g_r  /  Σ_r w_r Π_clusters h_r

h_r is the likelihood of a cluster x_1 … x_n of an honest machine, with f_s the likelihood at noise s times that of the
law. The scale r of the machine is drawn once for a life. The scale u of the cluster is drawn once for it, ln u ~
between · t, because values of one cluster share more than the law says: a long prompt, a repeated phrase, a batch mate.

g_r is the likelihood of a cluster of a cheat: noise m times larger in all values, h_rm; in a share π of the values,
with (1 − π)·f_ru + π·f_rum in place of f_ru; or in a share ρ of the clusters, (1 − ρ)·h_r + ρ·h_rm. w and v are weights
over scales and cheats. Under honest noise E is a non-negative martingale that starts at 1, at every value and not only
at the end of a cluster. Everything is evaluated on one grid of ln scale, so that r, u and m are steps on it.

Suffixes: N values, B ends of blocks, C points of the grid, H scales of honest machines, J scales of cheats, U scales of
clusters, M multiples, K paths.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import scipy

from assay.stats.chord import FloatArray
from assay.stats.noise import REACH, LogNoise, Spread, require
from assay.stats.sequential import CHEAP, FAR, Result, check_rates, decide, grid_of_multiples, log_sum
from assay.stats.tokens import STEP, TokenNoise, cluster_scales

ClusteredLaw = TokenNoise | LogNoise
"""The laws of values that come in clusters: tokens by their profiles, and sketches by their distances."""

WITHIN = (0.02, 0.1, 0.4)
"""Shares π of the values of every cluster that the e-value looks for."""

CLUSTERS = (0.05, 0.3)
"""Shares ρ of the clusters that it looks for; an honest verdict on enough clusters excludes the last one."""

_WEIGHTS = {"whole": 0.4, "within": 0.3, "clusters": 0.3}
_LEAST = 2.0  # multiple that is looked for
_ENOUGH = 1.25  # an honest cluster speaks with at most −ln(1 − ρ) against a share; most say less
_NARROWEST = 2 * STEP  # spread of a machine that the grid resolves


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterResult(Result):
    """All numbers behind the verdict of a `ClusterTest`, which looks at the ends of blocks.

    Args:
        clusters: Number of clusters.
        weakest: Name of the cheat that the evidence for honesty is weakest against.
    """

    clusters: int
    weakest: str


class ClusterTest:
    """The test of clusters for one law: feed it clusters as they come, read the verdict at any time.

    Args:
        law: Law of honest values.
        spread: Law of the scale of a machine over that of ``law``.
        between: Spread of ln scale between clusters of one machine.
        alpha: Bound on the chance that an honest node is ever accused.
        beta: Bound on the chance that a cheat which an honest verdict excludes is called honest.
        effect: Smallest multiple of the noise that an honest verdict excludes; cheats are looked for from 2 on.

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
        self.law, self.alpha, self.beta, self.effect, self.between = law, alpha, beta, effect, between
        self._prepare(spread or Spread())
        self._path_K = np.zeros(self._log_prior_K.size)
        self._log_e_max = 0.0
        self.n = self.clusters = 0

    def _prepare(self, spread: Spread) -> None:
        """Lay all scales on the grid, and the paths of the e-value in one row."""
        sd = max(spread.sd, _NARROWEST)
        reach = math.ceil(REACH * sd / STEP)
        machines = np.arange(-reach, reach + 1)
        of_cluster, weight_U = cluster_scales(self.between)
        few = np.unique(np.rint(np.linspace(-2, 2, 3) * sd / STEP).astype(int))
        weight_H = scipy.stats.t.pdf(machines * STEP / sd, spread.dof)
        weight_J = scipy.stats.t.pdf(few * STEP / sd, spread.dof)
        cheap, fours = max(CHEAP, self.effect), math.log(max(self.law.junk_multiple, FAR) / FAR) / math.log(4)
        self._multiples = grid_of_multiples(_LEAST, FAR * 4.0 ** math.ceil(fours), [self.effect, cheap])
        steps = np.rint(np.log(self._multiples) / STEP).astype(int)
        self._excluded = int(np.argmin(np.abs(self._multiples - self.effect)))
        self._cheap = int(np.argmin(np.abs(self._multiples - cheap)))
        self._log_U = np.log(weight_U / weight_U.sum())
        self._log_J = np.log(weight_J / weight_J.sum())
        log_H = np.log(weight_H / weight_H.sum())
        points_HU = machines[:, None] + of_cluster
        points_JU = few[:, None] + of_cluster
        points_JMU = few[:, None, None] + steps[:, None] + of_cluster
        points = np.unique(np.concatenate([points_HU.ravel(), points_JU.ravel(), points_JMU.ravel()]))
        self._logs_C = points * STEP
        self._at_HU, self._at_JU, self._at_JMU = (
            np.searchsorted(points, each) for each in (points_HU, points_JU, points_JMU)
        )
        cheats_JM = (self._log_J[:, None] - np.log(steps.size) + np.zeros((1, steps.size))).ravel()
        kinds = (("whole", 1), ("within", len(WITHIN)), ("clusters", len(CLUSTERS)))
        cheats = [cheats_JM + math.log(_WEIGHTS[kind] / count) for kind, count in kinds for _ in range(count)]
        self._log_prior_K = np.concatenate([log_H, *cheats])
        self._honest, self._size = log_H.size, cheats_JM.size

    def paths(self, values: npt.ArrayLike, ends: Sequence[int]) -> FloatArray:
        """Return the logarithms that the values of one cluster add to every path up to each end of a block, [B, K].

        Args:
            values: Values of the cluster in their order.
            ends: Number of values before the end of each block; they do not descend.
        """
        logs_NC = _log_likelihoods(self.law, values, self._logs_C)
        sums_BC = _sum_to_ends(logs_NC, ends)
        log_U = self._log_U
        honest_BH = log_sum(sums_BC[:, self._at_HU] + log_U)
        own_BJ = log_sum(sums_BC[:, self._at_JU] + log_U)
        whole_BJM = log_sum(sums_BC[:, self._at_JMU] + log_U)
        parts = [honest_BH, whole_BJM.reshape(len(sums_BC), -1)]
        plain_NJ1U = logs_NC[:, self._at_JU][:, :, None]
        for share in WITHIN:
            mixed = np.logaddexp(plain_NJ1U + math.log1p(-share), logs_NC[:, self._at_JMU] + math.log(share))
            parts.append(log_sum(_sum_to_ends(mixed, ends) + log_U).reshape(len(sums_BC), -1))
        for share in CLUSTERS:
            either = np.logaddexp(own_BJ[:, :, None] + math.log1p(-share), whole_BJM + math.log(share))
            parts.append(either.reshape(len(sums_BC), -1))
        return np.concatenate(parts, axis=1)

    def log_e(self, paths: FloatArray) -> FloatArray:
        """Return the logarithm of the e-value of paths [..., K] from the beginning of a life."""
        whole = paths + self._log_prior_K
        return log_sum(whole[..., self._honest :]) - log_sum(whole[..., : self._honest])

    def take(self, values: npt.ArrayLike, ends: Sequence[int]) -> FloatArray:
        """Take one cluster; return the logarithm of the e-value at the end of each of its blocks, [B]."""
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
        """The logarithm of the likelihood ratio of honest noise to every cheat that an honest verdict excludes."""
        whole = self._path_K + self._log_prior_K
        honest = float(log_sum(whole[: self._honest]))
        first = self._honest

        def against(kind: int, multiple: int) -> float:
            paths_JM = self._path_K[first + kind * self._size : first + (kind + 1) * self._size].reshape(
                self._log_J.size, -1
            )
            return honest - float(log_sum(paths_JM[:, multiple] + self._log_J))

        found = {f"{self.effect:g} times the honest noise": against(0, self._excluded)}
        if -self.clusters * math.log1p(-CLUSTERS[-1]) >= -_ENOUGH * math.log(self.beta):
            name = f"{CLUSTERS[-1]:.0%} of the responses at {self._multiples[self._cheap]:.3g} times the honest noise"
            found[name] = against(len(WITHIN) + len(CLUSTERS), self._cheap)
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


def _log_likelihoods(law: ClusteredLaw, values: Any, logs_C: FloatArray) -> FloatArray:
    if isinstance(law, TokenNoise):
        return law.log_likelihoods(np.asarray(values, dtype=np.float64), logs_C)
    size_N = law.magnitudes(values)
    return np.stack([law.log_density(size_N, math.exp(log)) for log in logs_C], axis=1)


def _sum_to_ends(values: FloatArray, ends: Sequence[int]) -> FloatArray:
    """Return the sums of the values before each end, [B, ...]."""
    total = np.concatenate([np.zeros((1, *values.shape[1:])), values.cumsum(axis=0)])
    return total[np.asarray(ends, dtype=np.int64)]
