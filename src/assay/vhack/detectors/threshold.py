"""A threshold that bounds the false-positive rate: the share of clean samples flagged.

The bound comes from the rank among clean held-out scores (split conformal prediction; Vovk,
Gammerman and Shafer 2005). Any higher threshold keeps it too; of these it is the one with the
fewest mistakes, in the middle of the gap where the sides have one.

It holds for samples that come as those did. For samples of new groups it holds only where there are
many groups, such as 19: with 8, in a simulation, .08 were lost where .05 was promised. Rollouts of
a policy may differ anyway, so a run logs what it loses of them.

Shapes: N samples.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from assay.errors import UsageError
from assay.stats.rates import grouped_share_interval
from assay.vhack.pairs.pairs import Pair
from assay.vhack.pairs.selection import check_prompts

MIN_GROUPS = 3  # for fits to the other groups


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
    """

    value: float
    lost: float
    low: float
    high: float
    caught: float
    usual: float = -math.inf


def conformal_rank(n: int, promised: float) -> int:
    """Return the rank among n clean scores that bounds the false-positive rate.

    Raises:
        UsageError: ``promised`` is no share, or there are too few samples for it.
    """
    if not 1e-9 < promised < 1:
        raise UsageError(
            f"promised={promised}", wanted="a share in (0, 1)", do="choose one, such as 0.05"
        )
    rank = math.ceil((n + 1) * (1 - promised))
    if rank > n:
        raise UsageError(
            f"{n} clean samples, of which {promised:g} may be lost",
            wanted=f"at least {math.ceil(1 / promised) - 1}",
            do="add pairs, or let clean_lost be larger",
        )
    return rank


def check_fittable(pairs: Sequence[Pair], promised: float) -> list[str]:
    """Return the groups of pairs, after refusing pairs that no detector can be fitted to.

    Raises:
        UsageError: There are too few pairs for the promised share, or fewer than three groups.
        DataError: A prompt occurs in two groups.
    """
    conformal_rank(len(pairs), promised)
    check_prompts(pairs)
    groups = [pair.group for pair in pairs]
    if len(set(groups)) < MIN_GROUPS:
        raise UsageError(
            f"pairs of {len(set(groups))} groups",
            wanted="three or more, for fits to the others",
            do="add pairs of other groups",
        )
    return groups


def choose_threshold(
    hack: npt.ArrayLike,
    clean: npt.ArrayLike,
    promised: float = 0.05,
    groups: Sequence[object] | None = None,
) -> Threshold:
    """Return the threshold with the fewest mistakes among those that lose at most ``promised``.

    Mistakes are shares: of hacks that are missed and of clean samples that are lost. ``groups`` of
    the clean samples widen the interval; without them each sample is a group.
    """
    hack_N = np.sort(np.asarray(hack, float))
    clean_N = np.sort(np.asarray(clean, float))
    lowest = float(clean_N[conformal_rank(len(clean_N), promised) - 1])
    scores = np.unique(np.concatenate([hack_N, clean_N]))
    # Between two scores lies the middle; above the last one nothing is flagged.
    candidates = np.append((scores[:-1] + scores[1:]) / 2, scores[-1])[scores >= lowest]
    caught = 1 - hack_N.searchsorted(candidates, side="right") / len(hack_N)
    lost = 1 - clean_N.searchsorted(candidates, side="right") / len(clean_N)
    best = int(np.argmax(caught - lost))
    is_lost = np.asarray(clean) > candidates[best]
    low, high = grouped_share_interval(is_lost, range(len(clean_N)) if groups is None else groups)
    value = float(candidates[best])
    usual = min(value, float(np.median(clean_N)))
    return Threshold(value, float(is_lost.mean()), low, high, float(caught[best]), usual)
