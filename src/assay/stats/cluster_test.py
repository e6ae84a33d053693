"""The residual test for values that come in clusters, such as the tokens of one response.

    h_r = Σ_u q_u Π_i f_ru(x_i)
    E = Σ_r w_r Σ_g v_g Π_clusters g_r  /  Σ_r w_r Π_clusters h_r

h_r is the likelihood of a cluster x_1 … x_n of an honest machine, with f_s the likelihood at noise
s times that of the law. The scale r of the machine is drawn once for its life, and the scale u of a
cluster once for it, ln u ~ between · t: values of one cluster share more than the law says, such as
a long prompt or a batch mate. g_r is the likelihood of a cluster of a cheat: noise m times larger
in all values, h_rm; in a share π of the values, with (1 − π)·f_ru + π·f_rum in place of f_ru; or in
a share ρ of the clusters, (1 − ρ)·h_r + ρ·h_rm. w and v are weights over scales and cheats. Under
honest noise E is a non-negative martingale from 1, at every value and not only at the end of a
cluster. Everything is evaluated on one grid of ln scale, so that r, u and m are steps on it.

Suffixes: N values, B ends of blocks, C points of the grid, H scales of honest machines, J scales of
cheats, U scales of clusters, M multiples, K paths.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import scipy

from assay.stats.chord import FloatArray, IntArray
from assay.stats.e_values import (
    CHEAP,
    FAR,
    EValueResult,
    check_rates,
    decide,
    grid_of_multiples,
    log_sum,
)
from assay.stats.noise_laws import REACH, LogNoise, Spread, require
from assay.stats.token_law import TokenNoise

ClusteredLaw = TokenNoise | LogNoise
"""Laws of values that come in clusters: tokens by profiles, and sketches by distances."""

CLUSTER_DOF = 4.0
"""Degrees of freedom of the law of the scales of clusters."""

STEP = 1 / 64
"""Distance of neighbours on the grid of ln scale."""

WITHIN = (0.02, 0.1, 0.4)
"""Shares π of the values of every cluster that the e-value looks for."""

CLUSTERS = (0.05, 0.3)
"""Shares ρ of the clusters that the e-value looks for.

An honest verdict on enough clusters excludes the last one.
"""

ENDS = 64
"""Ends of blocks whose paths are computed at a time."""

_KIND_WEIGHTS = ((0.4, 1), (0.3, len(WITHIN)), (0.3, len(CLUSTERS)))  # of kinds of cheats
_LEAST = 2.0  # smallest multiple that is looked for
# An honest cluster gives at most −ln(1 − ρ) of evidence against a share, and most give less.
_ENOUGH = 1.25
_NARROWEST = 2 * STEP  # spread of a machine that the grid resolves


def cluster_scales(between: float) -> tuple[IntArray, FloatArray]:
    """Return the scales of clusters as steps of ln scale, and their probabilities, [U] each.

    Their logarithms follow Student's t with :data:`CLUSTER_DOF` degrees of freedom, so that one odd
    response in a few hundred does not accuse its node.
    """
    if not between:
        return np.zeros(1, dtype=np.int64), np.ones(1)
    deviations = np.linspace(-4, 4, 13)
    weights = (1 + deviations**2 / CLUSTER_DOF) ** (-(CLUSTER_DOF + 1) / 2)
    steps = np.rint(deviations * between / STEP).astype(np.int64)
    return steps, np.asarray(weights / weights.sum())


@dataclass(frozen=True, slots=True)
class ClusterResult(EValueResult):
    """All numbers behind the verdict of a `ClusterTest`.

    ``weakest`` is the name of the cheat that the evidence for honesty is weakest against.
    """

    clusters: int
    weakest: str


class ClusterTest:
    """The sequential test of clusters, such as responses, for one law.

    Other arguments are those of `SequentialTest`.

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
        cheap = max(CHEAP, effect)
        # Beyond FAR, multiples are a factor of four apart.
        far_steps = math.ceil(math.log(max(law.junk_multiple, FAR) / FAR) / math.log(4))
        self._multiples = grid_of_multiples(_LEAST, FAR * 4.0**far_steps, [effect, cheap])
        self._excluded = int(np.argmin(np.abs(self._multiples - effect)))
        self._cheap = int(np.argmin(np.abs(self._multiples - cheap)))
        # Scales of honest machines, of cheats, of multiples and of clusters, as steps of ln scale.
        spread = spread or Spread()
        sd = max(spread.sd, _NARROWEST)
        reach = math.ceil(REACH * sd / STEP)
        machines_H = np.arange(-reach, reach + 1)
        machines_J = np.unique(np.rint(np.linspace(-2, 2, 3) * sd / STEP).astype(int))
        multiples_M = np.rint(np.log(self._multiples) / STEP).astype(int)
        clusters_U, weight_U = cluster_scales(between)
        steps_HU = machines_H[:, None] + clusters_U
        steps_JU = machines_J[:, None] + clusters_U
        steps_JMU = machines_J[:, None, None] + multiples_M[:, None] + clusters_U
        steps_C = np.unique(np.concatenate([steps_HU.ravel(), steps_JU.ravel(), steps_JMU.ravel()]))
        self._logs_C = steps_C * STEP
        self._index_HU = np.searchsorted(steps_C, steps_HU)
        self._index_JU = np.searchsorted(steps_C, steps_JU)
        self._index_JMU = np.searchsorted(steps_C, steps_JMU)
        log_H = _log_shares(scipy.stats.t.pdf(machines_H * STEP / sd, spread.dof))
        self._log_J = _log_shares(scipy.stats.t.pdf(machines_J * STEP / sd, spread.dof))
        self._log_U = _log_shares(weight_U)
        cheats_JM = np.repeat(self._log_J - np.log(multiples_M.size), multiples_M.size)
        cheats = []
        for weight, count in _KIND_WEIGHTS:
            cheats += [cheats_JM + math.log(weight / count)] * count
        self._log_prior_K = np.concatenate([log_H, *cheats])
        self._honest = log_H.size
        self._path_K = np.zeros(self._log_prior_K.size)
        self._log_e_max = 0.0
        self.n = 0
        self.clusters = 0

    def paths(self, values: npt.ArrayLike, ends: Sequence[int]) -> FloatArray:
        """Return the logarithms that one cluster adds to every path up to each end, [B, K].

        An end of a block is the number of values before it; ``ends`` do not descend.
        """
        return np.concatenate([*self._parts(values, ends)])

    def _parts(self, values: npt.ArrayLike, ends: Sequence[int]) -> Iterator[FloatArray]:
        """Yield the paths of some ends at a time, which bounds memory."""
        all_values = np.asarray(values, dtype=np.float64)
        all_ends = np.asarray(ends, dtype=np.int64)
        before = 0
        # Sums of the values before a part: of the logarithms, and for every share of WITHIN.
        sum_C = np.zeros(self._logs_C.size)
        sums_mixed = [np.zeros(self._index_JMU.shape)] * len(WITHIN)
        for first in range(0, len(all_ends), ENDS):
            ends_B = all_ends[first : first + ENDS]
            logs_NC = self.law.log_likelihoods(all_values[before : ends_B[-1]], self._logs_C)
            sums_BC = _sum_to_ends(sum_C, logs_NC, ends_B - before)
            honest_BH = log_sum(sums_BC[:, self._index_HU] + self._log_U)
            honest_BJ1 = log_sum(sums_BC[:, self._index_JU] + self._log_U)[:, :, None]
            whole_BJM = log_sum(sums_BC[:, self._index_JMU] + self._log_U)
            paths = [honest_BH, whole_BJM]
            honest_NJ1U = logs_NC[:, self._index_JU][:, :, None]
            whole_NJMU = logs_NC[:, self._index_JMU]
            for number, share in enumerate(WITHIN):
                mixed_NJMU = _mix(share, honest_NJ1U, whole_NJMU)
                mixed_BJMU = _sum_to_ends(sums_mixed[number], mixed_NJMU, ends_B - before)
                paths.append(log_sum(mixed_BJMU + self._log_U))
                sums_mixed[number] = mixed_BJMU[-1]
            paths += [_mix(share, honest_BJ1, whole_BJM) for share in CLUSTERS]
            sum_C = sums_BC[-1]
            before = ends_B[-1]
            yield np.concatenate([path.reshape(len(ends_B), -1) for path in paths], axis=1)

    def log_e(self, paths: FloatArray) -> FloatArray:
        """Return the log e-value of paths [..., K] from the first cluster on."""
        weighted = paths + self._log_prior_K
        return log_sum(weighted[..., self._honest :]) - log_sum(weighted[..., : self._honest])

    def take(self, values: npt.ArrayLike, ends: Sequence[int]) -> FloatArray:
        """Take one cluster; return the log e-value at the end of each of its blocks, [B]."""
        ends = [*ends] or [0]
        before_K = self._path_K
        logs = []
        for added_BK in self._parts(values, ends):
            paths_BK = before_K + added_BK
            logs.append(self.log_e(paths_BK))
            # A view would keep the paths of all ends in memory.
            self._path_K = paths_BK[-1].copy()
        logs_B = np.concatenate(logs)
        self._log_e_max = max(self._log_e_max, float(logs_B.max()))
        self.n += ends[-1]
        self.clusters += bool(ends[-1])
        return logs_B

    def log_price(self, clusters: Sequence[FloatArray]) -> float:
        """Return the logarithm of the mean that the best bet has on these honest clusters.

        A bet is the likelihood of a cheat over that of an honest scale: of the one that leaves the
        best bet the least. Where the mean is at most 1, a node whose clusters come from these is
        accused with a chance of at most alpha over the weight of that scale, however many it has.
        """
        paths_LK = np.concatenate([self.paths(values, [len(values)]) for values in clusters])
        honest_HL, cheats_KL = np.split(paths_LK.T, [self._honest])
        best_H = [log_sum(cheats_KL - honest_L).max() for honest_L in honest_HL]
        return float(min(best_H)) - math.log(len(clusters))

    @property
    def evidence(self) -> dict[str, float]:
        """Log likelihood ratios of honest noise to the cheats that an honest verdict excludes."""
        honest_H, cheats = np.split(self._path_K, [self._honest])
        honest = float(log_sum(honest_H + self._log_prior_K[: self._honest]))
        # The first axis is the kinds of cheats: of all values, then by WITHIN, then by CLUSTERS.
        cheats_KJM = cheats.reshape(-1, self._log_J.size, self._multiples.size)
        log_cheats_KM = log_sum(np.moveaxis(cheats_KJM, 1, -1) + self._log_J)
        evidence = {
            f"{self.effect:g} times the honest noise": honest
            - float(log_cheats_KM[0, self._excluded])
        }
        if -self.clusters * math.log1p(-CLUSTERS[-1]) >= -_ENOUGH * math.log(self.beta):
            cheap = self._multiples[self._cheap]
            cheat = f"{CLUSTERS[-1]:.0%} of the responses at {cheap:.3g} times the honest noise"
            evidence[cheat] = honest - float(log_cheats_KM[-1, self._cheap])
        return evidence

    @property
    def result(self) -> ClusterResult:
        """The verdict with the numbers that it rests on."""
        evidence = self.evidence
        weakest = min(evidence, key=lambda cheat: evidence[cheat])
        return ClusterResult(
            verdict=decide(self._log_e_max, evidence[weakest], alpha=self.alpha, beta=self.beta),
            n=self.n,
            clusters=self.clusters,
            log_e_value=float(self.log_e(self._path_K)),
            log_e_max=self._log_e_max,
            log_evidence_honest=evidence[weakest],
            weakest=weakest,
        )


def _sum_to_ends(start: FloatArray, values: FloatArray, ends_B: IntArray) -> FloatArray:
    """Return a sum [...] and the values [N, ...] that follow it, added up to each end, [B, ...]."""
    return np.asarray(np.concatenate([start[None], values]).cumsum(axis=0)[ends_B])


def _mix(share: float, honest: FloatArray, cheat: FloatArray) -> FloatArray:
    """Return the log likelihood where a share of the values is the cheat's."""
    return np.asarray(np.logaddexp(honest + math.log1p(-share), cheat + math.log(share)))


def _log_shares(weights: FloatArray) -> FloatArray:
    return np.asarray(np.log(weights / weights.sum()))
