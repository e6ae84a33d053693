"""A threshold that bounds the false-positive rate on a new group of clean samples.

The bound is hierarchical conformal prediction (Lee, Barber and Willett 2023, "Distribution-free
inference with hierarchical data"): each of G groups has the weight 1/(G+1), which its clean
held-out scores share, and so has a score above all others, which stands for the new group. Where
the weight above the threshold is at most the promised share, a new group that comes as those did
loses no more on average, whatever the sizes of groups and however alike the samples of one. So less
than 1/(G+1) cannot be promised. Without groups it is split conformal prediction by ranks. Any
higher threshold keeps the bound too; of these it is the one with the fewest mistakes, in the middle
of the gap where the sides have one.

Rollouts of a policy may differ anyway, so a run logs what it loses of them.

Shapes: N samples.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from assay.errors import UsageError
from assay.stats.rates import grouped_share_interval
from assay.vhack.names import LOST
from assay.vhack.pairs.pairs import Pair
from assay.vhack.pairs.selection import check_prompts

_ROUNDING = 1e-9  # of sums of weights


@dataclass(frozen=True, slots=True)
class Threshold:
    """Score above which a sample is flagged, and what that costs.

    Attributes:
        value: The score.
        lost: Share of the clean samples at hand above it: the false-positive rate.
        low: Lower end of its 95 % interval over groups.
        high: Upper end.
        caught: Share of the hack samples at hand above it: the true-positive rate.
        usual: Median score of the clean samples: what lies between it and ``value`` is doubtful.
        promised: Largest share of the clean samples of a new group that is lost, on average.
    """

    value: float
    lost: float
    low: float
    high: float
    caught: float
    usual: float = -math.inf
    promised: float = 1.0


def promised_share(groups: int, demanded: float | None = None) -> float:
    """Return the share of a new group's clean samples that so many groups let a threshold promise.

    Without a demand it is ``LOST``, or 1/(G+1) where that is more.

    Raises:
        UsageError: The demanded share is no share, or below 1/(G+1).
    """
    least = 1 / (groups + 1)
    if demanded is None:
        return max(LOST, least)
    if not _ROUNDING < demanded < 1:
        raise UsageError(
            f"promised={demanded}", wanted="a share in (0, 1)", do=f"choose one, such as {LOST}"
        )
    if demanded < least - _ROUNDING:
        raise UsageError(
            f"{groups} groups of clean samples, of which {demanded:g} may be lost",
            wanted=f"at least {math.ceil(1 / demanded - _ROUNDING) - 1} groups",
            do=f"add pairs of other groups, or let {math.ceil(1000 * least) / 1000:g} be lost",
        )
    return demanded


def check_fittable(
    pairs: Sequence[Pair], least_groups: int, promised: float | None = None
) -> list[str]:
    """Return the groups of pairs, after refusing pairs that a detector cannot be fitted to.

    Raises:
        UsageError: There are too few groups for the promised share, or for the detector.
        DataError: A prompt occurs in two groups.
    """
    check_prompts(pairs)
    groups = [pair.group for pair in pairs]
    if len(set(groups)) < least_groups:
        raise UsageError(
            f"pairs of {len(set(groups))} groups",
            wanted=f"{least_groups} or more, for fits to the others",
            do="add pairs of other groups",
        )
    promised_share(len(set(groups)), promised)
    return groups


def choose_threshold(
    hack: npt.ArrayLike,
    clean: npt.ArrayLike,
    promised: float | None = None,
    groups: Sequence[object] | None = None,
) -> Threshold:
    """Return the threshold with the fewest mistakes among those that lose at most ``promised``.

    Mistakes are shares: of hacks that are missed and of clean samples that are lost. Without
    ``groups`` of the clean samples each is a group. Without ``promised`` it is the share of
    :func:`promised_share`.
    """
    hack_N = np.sort(np.asarray(hack, float))
    unsorted_N = np.asarray(clean, float)
    labels = range(len(unsorted_N)) if groups is None else groups
    sizes = Counter(labels)
    share = promised_share(len(sizes), promised)
    order_N = np.argsort(unsorted_N)
    clean_N = unsorted_N[order_N]
    weights_N = np.array([1 / (len(sizes) + 1) / sizes[label] for label in labels])[order_N]
    # The last entry stands for the new group, whose score may be above all others.
    tail = np.append(weights_N, 1 / (len(sizes) + 1))[::-1].cumsum()[::-1]
    above_N = tail[clean_N.searchsorted(clean_N, side="right")]
    lowest = float(clean_N[np.argmax(above_N <= share + _ROUNDING)])
    scores = np.unique(np.concatenate([hack_N, clean_N]))
    # Between two scores lies the middle; above the last one nothing is flagged.
    candidates = np.append((scores[:-1] + scores[1:]) / 2, scores[-1])[scores >= lowest]
    caught = 1 - hack_N.searchsorted(candidates, side="right") / len(hack_N)
    lost = 1 - clean_N.searchsorted(candidates, side="right") / len(clean_N)
    best = int(np.argmax(caught - lost))
    value = float(candidates[best])
    is_lost_N = unsorted_N > value
    low, high = grouped_share_interval(is_lost_N, labels)
    usual = min(value, float(np.median(clean_N)))
    lost_share = float(is_lost_N.mean())
    return Threshold(value, lost_share, low, high, float(caught[best]), usual, share)
