"""Confidence and significance by resampling, with groups kept together.

Samples of one group (the same task, the same block) resemble each other. Drawing single samples would treat them as
independent and make every interval too short, so whole groups are drawn.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from assay.errors import UsageError

_REDRAWS = 100


@dataclass(frozen=True, slots=True)
class BootstrapInterval:
    """A statistic with its percentile interval.

    Attributes:
        value: the statistic on the data as measured.
        low: lower end of the interval.
        high: upper end of the interval.
        confidence: nominal coverage.
        n_groups: number of distinct groups that were drawn from.
        n_resamples: number of draws.
    """

    value: float
    low: float
    high: float
    confidence: float
    n_groups: int
    n_resamples: int


def group_bootstrap(
    statistic: Callable[..., float],
    samples: Sequence[npt.ArrayLike],
    groups: Sequence[Sequence[object]],
    *,
    n_resamples: int = 2000,
    seed: int = 0,
    confidence: float = 0.95,
) -> BootstrapInterval:
    """Percentile bootstrap over groups.

    Each resample draws as many groups as there are, with replacement, and hands every sample the rows of those
    groups; a group drawn twice brings its rows twice. The draw is common to all samples, so what was paired stays
    paired.

    Args:
        statistic: called as ``statistic(*samples)``, with arrays of the same rank as given.
        samples: arrays whose first axis runs over rows, for example (scores of hacks, scores of clean).
        groups: Group label of every row, per sample.
        n_resamples: number of draws.
        seed: Seed of numpy's default generator; the same seed gives the same interval.
        confidence: nominal coverage.

    Raises:
        UsageError: labels and rows differ in number, fewer than 2 groups, or no draw fills every sample.
    """
    arrays = [np.asarray(sample) for sample in samples]
    labels = _common_labels(arrays, groups)
    if n_resamples < 1 or not 0.0 < confidence < 1.0:
        raise UsageError(
            f"{n_resamples} resamples, confidence {confidence}",
            wanted="at least 1 resample and a confidence in (0, 1)",
            do="use the defaults",
        )
    rows = [_rows_of(labels, side) for side in groups]
    generator = np.random.default_rng(seed)
    draws = [statistic(*_resample(arrays, rows, generator)) for _ in range(n_resamples)]
    low, high = np.quantile(draws, [(1 - confidence) / 2, (1 + confidence) / 2])
    value = float(statistic(*arrays))
    return BootstrapInterval(value, float(low), float(high), confidence, len(labels), n_resamples)


def _common_labels(arrays: Sequence[npt.NDArray[np.generic]], groups: Sequence[Sequence[object]]) -> list[object]:
    if [len(array) for array in arrays] != [len(side) for side in groups]:
        raise UsageError(
            f"{[len(array) for array in arrays]} rows with {[len(side) for side in groups]} group labels",
            wanted="one label per row in every sample",
            do="pass groups in the order of the samples",
        )
    labels = list(dict.fromkeys(label for side in groups for label in side))
    if len(labels) < 2:
        raise UsageError(f"{len(labels)} group", wanted="at least 2 groups to draw from", do="add data of other groups")
    return labels


def _rows_of(labels: Sequence[object], side: Sequence[object]) -> list[list[int]]:
    rows: dict[object, list[int]] = {label: [] for label in labels}
    for row, label in enumerate(side):
        rows[label].append(row)
    return list(rows.values())


def _resample(
    arrays: Sequence[npt.NDArray[np.generic]], rows: Sequence[Sequence[Sequence[int]]], generator: np.random.Generator
) -> list[npt.NDArray[np.generic]]:
    n_groups = len(rows[0])
    for _ in range(_REDRAWS):
        drawn = generator.integers(n_groups, size=n_groups)
        taken = [[row for g in drawn for row in side[g]] for side in rows]
        if all(taken):
            return [array[index] for array, index in zip(arrays, taken, strict=True)]
    raise UsageError(
        f"{_REDRAWS} draws of {n_groups} groups that left a sample empty",
        wanted="samples that share most groups",
        do="check the group labels of every sample",
    )
