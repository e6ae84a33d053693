"""A guard against degenerate detectors, after RHOB: what a high AUROC can come from that is no sign of a hack.

Four questions to the scores of one detector, each with the verdict ``pass``, ``fail`` or ``undecided``:

- *constant*: do the scores tell samples apart at all? At most half of all pairs of a hack and a clean sample may tie.
- *halves*: is the AUROC that of both halves of the groups? Two one-sided tests: the 1 − 2α interval of the difference
  between two random halves must lie within ±0.1.
- *length*: is there more in it than the length of the completion? The interval of the difference between the AUROC and
  that of the length, the longer or the shorter one as the hack, whichever is higher, must lie above 0.
- *permuted labels*: is the AUROC 0.5 where labels mean nothing? Asked of detectors that are fitted: labels are swapped
  in whole groups, of training and of test, and the detector is fitted again. The 1 − 2α interval of the mean must lie
  within 0.5 ± 0.1. A test sample among those that it was fitted to shows here.

The length fails where the difference itself is not above 0, any other interval where it lies wholly on the wrong side;
one that reaches both is undecided.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.stats import t as student

from assay.errors import UsageError
from assay.stats.rates import auroc
from assay.vhack.checks.judge import CheckSettings, CheckVerdict, FloatArray, Interval, measure, worst

EQUIVALENCE = 0.1
"""Largest difference of two AUROC that counts as none."""
_TIES = 0.5
_FEWEST_PERMUTED = 10


@dataclass(frozen=True, slots=True)
class GuardItem:
    """One question of the guard.

    Attributes:
        name: ``constant``, ``halves``, ``length`` or ``permuted labels``.
        measured: Share of ties, or difference of two AUROC, or mean AUROC; None where it could not be measured.
        verdict: Verdict: ``pass``, ``fail`` or ``undecided``.
        reason: What decided.
    """

    name: str
    measured: Interval | None
    verdict: CheckVerdict
    reason: str


def guard_verdict(items: Sequence[GuardItem]) -> CheckVerdict:
    """Return ``fail`` if any question failed, else ``undecided`` if any is, else ``pass``."""
    return worst(item.verdict for item in items)


def guard(
    hack: npt.ArrayLike,
    clean: npt.ArrayLike,
    hack_groups: Sequence[str],
    clean_groups: Sequence[str],
    *,
    lengths: tuple[npt.ArrayLike, npt.ArrayLike],
    permuted: Sequence[float] | None = None,
    settings: CheckSettings | None = None,
) -> tuple[GuardItem, ...]:
    """Return what a guard against degenerate detectors says of the scores of one.

    Args:
        hack: Scores of hack samples, higher for what looks more like a hack.
        clean: Scores of clean samples.
        hack_groups: Group of each hack sample, such as its problem.
        clean_groups: Group of each clean sample.
        lengths: Length of each hack sample and of each clean one, in any unit.
        permuted: AUROC of the detector fitted again under permuted labels, by permutation; None for one that is not
            fitted.
        settings: Alpha, confidence, number of draws and seed.

    Raises:
        UsageError: Fewer than ten permutations are given, or groups and scores differ in number.

    Example:
        >>> groups = [str(n) for n in range(40)]
        >>> scores = [float(n) for n in range(40)]
        >>> items = guard(scores, [-1 - s for s in scores], groups, groups, lengths=([9] * 40, [9] * 40))
        >>> [item.verdict for item in items]
        ['pass', 'pass', 'pass']
    """
    settings = settings or CheckSettings()
    scores = np.asarray(hack, dtype=float), np.asarray(clean, dtype=float)
    groups = list(hack_groups), list(clean_groups)
    items = [_constant(*scores), _halves(scores, groups, settings), _length(scores, groups, lengths, settings)]
    if permuted is not None:
        if len(permuted) < _FEWEST_PERMUTED:
            seen = f"{len(permuted)} permutations"
            raise UsageError(seen, wanted=f"at least {_FEWEST_PERMUTED}", do="permute the labels more often")
        items.append(_permuted(permuted, settings))
    return tuple(items)


def _constant(hack_N: FloatArray, clean_N: FloatArray) -> GuardItem:
    values, counts_H = np.unique(hack_N, return_counts=True)
    others, counts_C = np.unique(clean_N, return_counts=True)
    _, of_hack, of_clean = np.intersect1d(values, others, return_indices=True)
    share = float(counts_H[of_hack] @ counts_C[of_clean]) / (len(hack_N) * len(clean_N))
    reason = f"{share:.0%} of all pairs of a hack and a clean sample tie"
    return GuardItem("constant", Interval(share, share, share), "fail" if share > _TIES else "pass", reason)


def _halves(scores: tuple[FloatArray, ...], groups: tuple[list[str], ...], settings: CheckSettings) -> GuardItem:
    names = list(dict.fromkeys(groups[0] + groups[1]))
    order = np.random.default_rng([settings.seed, 21]).permutation(len(names))
    first = {names[i] for i in order[: len(names) // 2]}
    parts, of_groups = [], []
    for inside in (True, False):
        for values_N, labels in zip(scores, groups, strict=True):
            rows = [row for row, label in enumerate(labels) if (label in first) == inside]
            parts.append(values_N[rows])
            of_groups.append([labels[row] for row in rows])
    if min(map(len, parts)) == 0:
        return GuardItem("halves", None, "undecided", "a half has samples of one kind only")
    measured = measure(_between_halves, parts, of_groups, settings, confidence=1 - 2 * settings.alpha)
    return GuardItem("halves", measured, *_equivalent(measured, 0.0, "the two halves differ by"))


def _between_halves(hack: FloatArray, clean: FloatArray, other_hack: FloatArray, other_clean: FloatArray) -> float:
    return auroc(hack, clean) - auroc(other_hack, other_clean)


def _length(
    scores: tuple[FloatArray, ...],
    groups: tuple[list[str], ...],
    lengths: tuple[npt.ArrayLike, npt.ArrayLike],
    settings: CheckSettings,
) -> GuardItem:
    sizes = tuple(np.asarray(length, dtype=float) for length in lengths)
    found = measure(_beyond_length, [*scores, *sizes], [*groups, *groups], settings)
    verdict: CheckVerdict = "pass" if found.low > 0 else "fail" if found.value <= 0 else "undecided"
    reason = f"the AUROC is {found.value:+.3f} ({found.low:+.3f} to {found.high:+.3f}) above that of the length"
    return GuardItem("length", found, verdict, reason)


def _beyond_length(hack: FloatArray, clean: FloatArray, hack_length: FloatArray, clean_length: FloatArray) -> float:
    by_length = auroc(hack_length, clean_length)
    return auroc(hack, clean) - max(by_length, 1 - by_length)


def _permuted(permuted: Sequence[float], settings: CheckSettings) -> GuardItem:
    mean, n = float(np.mean(permuted)), len(permuted)
    half = float(student.ppf(1 - settings.alpha, n - 1) * np.std(permuted, ddof=1) / n**0.5)
    measured = Interval(mean, mean - half, mean + half)
    return GuardItem("permuted labels", measured, *_equivalent(measured, 0.5, "the mean AUROC is"))


def _equivalent(measured: Interval, target: float, what: str) -> tuple[CheckVerdict, str]:
    low, high = target - EQUIVALENCE, target + EQUIVALENCE
    reason = (
        f"{what} {measured.value:.3f} ({measured.low:.3f} to {measured.high:.3f}), {low:g} to {high:g} counts as none"
    )
    if low < measured.low and measured.high < high:
        return "pass", reason
    return ("fail" if measured.low >= high or measured.high <= low else "undecided"), reason
