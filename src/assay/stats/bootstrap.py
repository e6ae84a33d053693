"""The percentile bootstrap over whole groups."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from assay.errors import UsageError

_Array = npt.NDArray[np.generic]
_REDRAWS = 100  # draws in a row that may leave a sample empty


@dataclass(frozen=True, slots=True)
class BootstrapInterval:
    """A statistic on the data as measured, and both ends of its percentile interval."""

    value: float
    low: float
    high: float


def group_bootstrap(
    statistic: Callable[..., float],
    samples: Sequence[npt.ArrayLike],
    groups: Sequence[Sequence[object]],
    *,
    n_resamples: int = 2000,
    seed: int = 0,
    confidence: float = 0.95,
) -> BootstrapInterval:
    """Return a statistic with the interval of its percentile bootstrap over groups.

    Samples of one group (the same task, the same block) resemble each other. Drawing single samples
    would treat them as independent and make every interval too short. So each resample draws whole
    groups with replacement, as many as there are; a group drawn twice gives its rows twice. The
    draw is common to all samples, so pairs stay pairs.

    Args:
        statistic: Function that is called as ``statistic(*samples)``, with arrays of the same rank
            as given.
        samples: Arrays whose first axis runs over rows, for example (scores of hacks, scores of
            clean).
        groups: Group label of every row, per sample.
        n_resamples: Number of draws.
        seed: Seed of numpy's default generator; the same seed gives the same interval.
        confidence: Nominal coverage.

    Raises:
        UsageError: Labels and rows differ in number, there are fewer than 2 groups, no draw fills
            every sample, or the statistic is no finite number for the samples or for a draw.
    """
    arrays = [np.asarray(sample) for sample in samples]
    rows = rows_of_groups(arrays, groups)
    if n_resamples < 1 or not 0.0 < confidence < 1.0:
        raise UsageError(
            f"{n_resamples} resamples, confidence {confidence}",
            wanted="at least 1 resample and a confidence in (0, 1)",
            do="use the defaults",
        )
    generator = np.random.default_rng(seed)
    value = float(statistic(*arrays))
    draws = [statistic(*_resample(arrays, rows, generator)) for _ in range(n_resamples)]
    # Between infinities, a quantile is not a number.
    if undefined := np.count_nonzero(~np.isfinite([value, *draws])):
        raise UsageError(
            f"a statistic that is no finite number in {undefined} of {n_resamples} draws and the "
            f"samples themselves",
            wanted="a finite number for every draw of groups",
            do="leave rows without one out, or choose a statistic that every draw has",
        )
    low, high = np.quantile(draws, [(1 - confidence) / 2, (1 + confidence) / 2])
    return BootstrapInterval(value, float(low), float(high))


def rows_of_groups(
    arrays: Sequence[_Array], groups: Sequence[Sequence[object]]
) -> list[list[list[int]]]:
    """Return the row numbers of every group in every sample; one group alone is a UsageError."""
    lengths = [len(array) for array in arrays]
    label_counts = [len(labels) for labels in groups]
    if lengths != label_counts:
        raise UsageError(
            f"{lengths} rows with {label_counts} group labels",
            wanted="one label per row in every sample",
            do="pass groups in the order of the samples",
        )
    rows: dict[object, list[list[int]]] = {}
    for sample, labels in enumerate(groups):
        for row, label in enumerate(labels):
            rows.setdefault(label, [[] for _ in groups])[sample].append(row)
    if len(rows) < 2:
        raise UsageError(
            f"{len(rows)} group",
            wanted="at least 2 groups to draw from",
            do="add data of other groups",
        )
    return list(rows.values())


def _resample(
    arrays: Sequence[_Array],
    rows: Sequence[Sequence[Sequence[int]]],
    generator: np.random.Generator,
) -> list[_Array]:
    """Draw as many groups as there are, with replacement; return the rows of each sample."""
    for _ in range(_REDRAWS):
        drawn = generator.integers(len(rows), size=len(rows))
        resampled = [
            array[[row for group in drawn for row in rows[group][sample]]]
            for sample, array in enumerate(arrays)
        ]
        # No statistic has a value for an empty sample.
        if all(map(len, resampled)):
            return resampled
    raise UsageError(
        f"{_REDRAWS} draws of {len(rows)} groups that left a sample empty",
        wanted="samples that share most groups",
        do="check the group labels of every sample",
    )
