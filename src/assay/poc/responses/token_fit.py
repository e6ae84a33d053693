"""The maximum-likelihood fit of the law of claimed tokens to honest replays.

Suffixes: N values, G columns of a profile, L clusters, U scales of clusters.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import scipy

from assay.errors import UsageError
from assay.stats.chord import FloatArray
from assay.stats.cluster_test import STEP, cluster_scales
from assay.stats.token_law import COLUMNS, LEAST_STRAY, TokenNoise, shift_matrix

# loss of log-likelihood, a natural logarithm, up to which a wider law replaces the likeliest one
INDIFFERENT = 0.5
# tokens that a law adds, spread over all columns: what none of n tokens shows may be in 3/n of them
UNSEEN = 3.0
# Spreads of ln scale between clusters; not zero: no small sample has an odd response.
BETWEEN = (0.2, 0.4, 0.7, 1.1)
FEWEST_TOKENS = 256  # fewest honest tokens that a law is fitted to
# Largest error of ln scale: two engines that agree on every token say no more.
_LARGEST_ERROR = 0.5
_ROUNDS = 300  # of the search, three of the EM algorithm each
# Gain of a round below which it ends, in natural logarithms.
_CONVERGED = 0.003


@dataclass(frozen=True, slots=True)
class TokenFit:
    """The law of honest tokens, the spread of ln scale between clusters, and its standard error."""

    law: TokenNoise
    between: float
    error: float


def fit_token_noise(clusters: Sequence[npt.ArrayLike]) -> TokenFit:
    """Fit scale weights to honest tokens by EM (Kiefer and Wolfowitz 1956).

    The weights are fitted for every spread between clusters in :data:`BETWEEN`. The largest spread
    is taken whose log-likelihood is within `INDIFFERENT` of the best. :data:`UNSEEN` tokens are
    added.

    Args:
        clusters: Profiles [N, G] of the honest tokens of every cluster; one without tokens says
            nothing.

    Raises:
        UsageError: There are too few tokens, or a number that is not a logarithm of a probability.
    """
    logs = [
        log_ratios
        for cluster in clusters
        if (log_ratios := np.asarray(cluster, dtype=np.float64)).size
    ]
    n = sum(map(len, logs))
    good = all(
        cluster.ndim == 2 and cluster.shape[1] == COLUMNS and bool(np.all(cluster <= 0))
        for cluster in logs
    )
    check_number_of_tokens(n if good else 0, len(logs))
    chances = np.exp(np.concatenate(logs))
    starts = np.cumsum([0, *map(len, logs[:-1])])
    fits: list[tuple[FloatArray, float]] = []
    for between in BETWEEN:
        fits.append(
            _likeliest(
                chances, starts, between, fits[-1][0] if fits else np.full(COLUMNS, 1 / COLUMNS)
            )
        )
    best = max(likelihood for _, likelihood in fits)
    chosen = max(i for i, (_, likelihood) in enumerate(fits) if likelihood >= best - INDIFFERENT)
    weights = (n * fits[chosen][0] + UNSEEN / COLUMNS) / (n + UNSEEN)
    weights[-1] = max(weights[-1], LEAST_STRAY)
    law = TokenNoise(tuple((weights / weights.sum()).tolist()))
    error = _error(law, BETWEEN[chosen], np.concatenate(logs), starts)
    return TokenFit(law, BETWEEN[chosen], error)


def check_number_of_tokens(tokens: int, clusters: int) -> None:
    """Refuse fewer honest tokens than :func:`fit_token_noise` fits a law to, with a UsageError."""
    if tokens < FEWEST_TOKENS:
        raise UsageError(
            f"{tokens} honest tokens in {clusters} response{'s' * (clusters != 1)}",
            wanted=f"at least {FEWEST_TOKENS} tokens with {COLUMNS} log-probabilities each",
            do="replay receipts of more honest responses (RECEIPTS)",
        )


def _likeliest(
    chances_NG: FloatArray, starts: npt.NDArray[np.int64], between: float, weights: FloatArray
) -> tuple[FloatArray, float]:
    """Return the likeliest weights for one spread between clusters, and the logarithm of their
    likelihood.

    The search begins at ``weights``, none of which is 0. EM alone takes thousands of rounds here,
    so its rounds are extrapolated (SQUAREM, Varadhan and Roland 2008).
    """
    steps, weight_U = cluster_scales(between)
    moved = [chances_NG @ shift_matrix(step * STEP) for step in steps]
    sizes = np.diff([*starts, len(chances_NG)])

    def improved(current: FloatArray) -> tuple[FloatArray, float]:
        """Return the weights after one round of EM, and the logarithm of the likelihood before
        it.
        """
        mixtures = [mixture @ current for mixture in moved]
        logs_LU = np.stack(
            [np.add.reduceat(np.log(mixture), starts) for mixture in mixtures], axis=1
        ) + np.log(weight_U)
        totals_L = scipy.special.logsumexp(logs_LU, axis=1)
        posterior_LU = np.exp(logs_LU - totals_L[:, None])
        gained = sum(
            (np.repeat(posterior, sizes) / mixture) @ part
            for posterior, mixture, part in zip(posterior_LU.T, mixtures, moved, strict=True)
        )
        return current * gained / len(chances_NG), float(totals_L.sum())

    weights = (weights + 1e-3) / (weights + 1e-3).sum()
    best = -math.inf
    for _round in range(_ROUNDS):
        once, _ = improved(weights)
        twice, before = improved(once)
        first = once - weights
        change = twice - 2 * once + weights
        stretch = max(1.0, math.sqrt(float(first @ first) / max(float(change @ change), 1e-300)))
        far = np.maximum(weights + 2 * stretch * first + stretch**2 * change, 1e-12)
        weights, reached = improved(far / far.sum())
        if reached < before:  # too far
            weights, reached = improved(twice)
        gain = reached - best
        best = reached
        if gain < _CONVERGED:
            break
    return weights, best


def _error(
    law: TokenNoise, between: float, profiles_NG: FloatArray, starts: npt.NDArray[np.int64]
) -> float:
    """Return the standard error of ln scale, from the curvature of the likelihood of the
    clusters.
    """
    steps, weight_U = cluster_scales(between)
    width = 0.25
    totals = []
    for moved in (-width, 0.0, width):
        logs_C = np.asarray(steps * STEP + moved, dtype=np.float64)
        logs_LU = np.add.reduceat(law.log_likelihoods(profiles_NG, logs_C), starts)
        totals.append(float(scipy.special.logsumexp(logs_LU + np.log(weight_U), axis=1).sum()))
    curvature = (2 * totals[1] - totals[0] - totals[2]) / width**2
    return min(_LARGEST_ERROR, 1 / math.sqrt(max(curvature, 1e-9)))
