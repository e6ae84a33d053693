"""Published sets by round and build, copies dropped, and faulty ones told from sound ones.

Legend of shapes: N nonces.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import combinations

import numpy as np
import numpy.typing as npt

from assay import stats
from assay_research.vector_sets import VectorSet

COPIED = 0.5  # share of equal vectors from which a set is a copy of an earlier one
FEWEST_COMMON = 30  # nonces of a pair that is compared

FloatArray = npt.NDArray[np.float64]
Rows = tuple[int, int]
_STORED = re.compile(r"models--[^/]*?--([^/]+)")  # as the hub's cache writes it
_MONTH = re.compile(r"(\d{4}-\d{2})[_-]+")


@dataclass(frozen=True)
class Pair:
    """Two sets of one round.

    Args:
        one: Earlier set.
        other: Later set.
    """

    one: VectorSet
    other: VectorSet

    @property
    def names(self) -> tuple[str, str]:
        """Names of the two sets."""
        return self.one.name, self.other.name

    @cached_property
    def nonces(self) -> list[int]:
        """Nonces that both have, ascending."""
        return self.one.common(self.other)

    @cached_property
    def distances(self) -> FloatArray:
        """L2 distances [N] of these nonces."""
        return self.one.distances(self.other)

    def places(
        self, honest_size: float, chosen: npt.NDArray[np.int64] | None = None
    ) -> stats.PlaceTest:
        """Return whether the distances depend on the place in the batches of the set with the
        larger ones.

        Args:
            honest_size: Size of a typical honest distance.
            chosen: Indices among the nonces of those that are looked at; all of them when None.
        """
        looked_at = np.arange(len(self.nonces)) if chosen is None else chosen
        return stats.place_test(
            self.distances[looked_at],
            self.positions[looked_at],
            batch_size=self.batch_size,
            honest_size=honest_size,
        )

    @cached_property
    def positions(self) -> npt.NDArray[np.int64]:
        """Index of every nonce [N] in the sequence of the set with the larger batches."""
        return max(
            (self.one, self.other), key=lambda vector_set: vector_set.batch_size or 0
        ).positions(self.nonces)

    @property
    def batch_size(self) -> int | None:
        """Larger of the two batch sizes; None where neither is known."""
        return max(self.one.batch_size or 0, self.other.batch_size or 0) or None


@dataclass(frozen=True)
class Build:
    """Sets of one model in one round, those of all months or of one.

    Args:
        name: Month and model, such as ``2026-05 minimax-m2.7``.
        model: Model, without owner and path, in lower case.
        sets: Sets of different machines, in the order of the file.
        copies: Names of sets that were dropped, with that which each is a copy of.
        dropped: Pairs of names that are left out for a fault.
    """

    name: str
    model: str
    sets: tuple[VectorSet, ...]
    copies: tuple[tuple[str, str], ...] = ()
    dropped: frozenset[tuple[str, str]] = frozenset()

    @property
    def family(self) -> str:
        """First letters of the model: builds of one family and round may be passed off as each
        other.
        """
        letters = re.match("[a-z]*", self.model)
        return letters[0] if letters else ""

    @property
    def round(self) -> tuple[object, ...]:
        """Round that all sets are of."""
        return self.sets[0].round

    @property
    def kinds(self) -> list[str]:
        """Kind of every machine."""
        return [vector_set.kind for vector_set in self.sets]

    @cached_property
    def pairs(self) -> dict[Rows, Pair]:
        """Pairs of sets that have enough nonces in common, without those dropped."""
        rows = combinations(range(len(self.sets)), 2)
        pairs_by_rows = {(i, j): Pair(self.sets[i], self.sets[j]) for i, j in rows}
        return {
            rows: pair
            for rows, pair in pairs_by_rows.items()
            if len(pair.nonces) >= FEWEST_COMMON and pair.names not in self.dropped
        }

    @cached_property
    def distances(self) -> dict[Rows, FloatArray]:
        """Distances [N] of these pairs."""
        return {rows: pair.distances for rows, pair in self.pairs.items()}

    @cached_property
    def honest_size(self) -> float:
        """Median over all pairs of their median distance; 0 without a pair."""
        medians = [float(np.median(distances_N)) for distances_N in self.distances.values()]
        return float(np.median(medians)) if medians else 0.0

    @cached_property
    def faults(self) -> dict[Rows, stats.PlaceTest]:
        """Tests of the pairs whose distances depend on the place."""
        tests = {rows: pair.places(self.honest_size) for rows, pair in self.pairs.items()}
        return {rows: test for rows, test in tests.items() if test.faulty}

    @cached_property
    def faulty(self) -> frozenset[int]:
        """Sets most of whose pairs are faulty."""
        of_set = {
            i: [rows in self.faults for rows in self.pairs if i in rows]
            for i in range(len(self.sets))
        }
        return frozenset(
            i for i, faults in of_set.items() if faults and 2 * sum(faults) > len(faults)
        )

    def months(self, *, round_too: bool = False) -> "list[Build]":
        """Return the sound sets of every month, with the round in their names where it is
        wanted.
        """
        dropped = frozenset(self.pairs[rows].names for rows in self.faults)
        sound = [vector_set for i, vector_set in enumerate(self.sets) if i not in self.faulty]
        months = dict.fromkeys(month_of(vector_set.name) for vector_set in sound)
        return [
            replace(
                self,
                name=f"{month} {self.name if round_too else self.model}".strip(),
                sets=tuple(
                    vector_set for vector_set in sound if month_of(vector_set.name) == month
                ),
                dropped=dropped,
            )
            for month in months
        ]


def builds_of(sets: Sequence[VectorSet]) -> list[Build]:
    """Group sets by round and model, and drop those that are copies of an earlier one of their
    group.
    """
    models: dict[str, str] = {}  # names that differ in punctuation only are one
    for vector_set in sets:
        if vector_set.model:
            models.setdefault(_plain(vector_set.model), base_name(vector_set.model))
    groups: dict[tuple[object, str], list[VectorSet]] = {}
    for vector_set in sets:
        model = (
            models[_plain(vector_set.model)]
            if vector_set.model
            else _by_prefix(vector_set.name, models)
        )
        groups.setdefault((vector_set.round, model), []).append(vector_set)
    names = [model for _, model in groups]
    builds = []
    for index, ((_, model), members) in enumerate(groups.items()):
        number = names[: index + 1].count(model)
        distinct, copies = _without_copies(members)
        builds.append(
            Build(
                model + (f" (round {number})" if names.count(model) > 1 else ""),
                model,
                distinct,
                copies,
            )
        )
    return builds


def sound_builds(groups: Sequence[Build]) -> list[Build]:
    """Return the sound sets of every group by month, under names of their own."""
    names = [build.name for group in groups for build in group.months()]
    twice = {name for name in names if names.count(name) > 1}
    return [
        build
        for group in groups
        for build in group.months(
            round_too=any(build_of_month.name in twice for build_of_month in group.months())
        )
    ]


def base_name(model: str) -> str:
    """Return the name of a model without owner and path, in lower case.

    Example:
        >>> cached = "/models/hub/models--moonshotai--Kimi-K2.6/snapshots/4f7a"
        >>> base_name(cached), base_name("owner/M-2.7/")
        ('kimi-k2.6', 'm-2.7')
    """
    if stored := _STORED.search(model):
        return stored[1].lower()
    return model.rstrip("/").rpartition("/")[2].lower()


def month_of(name: str) -> str:
    """Return the month that the name of a set begins with; empty where it does not."""
    month = _MONTH.match(name)
    return month[1] if month else ""


def _plain(name: str) -> str:
    return re.sub("[^a-z0-9]", "", base_name(name))


def _by_prefix(name: str, models: dict[str, str]) -> str:
    """Return the model whose name a set's own begins with, the longest one; else what comes before
    the first dash.
    """
    prefix = _MONTH.sub("", name, count=1)
    fitting = [plain for plain in models if plain and _plain(prefix).startswith(plain)]
    return models[max(fitting, key=len)] if fitting else base_name(re.split("[-_]", prefix)[0])


def _without_copies(
    sets: Sequence[VectorSet],
) -> tuple[tuple[VectorSet, ...], tuple[tuple[str, str], ...]]:
    distinct: list[VectorSet] = []
    copies = []
    for vector_set in sets:
        original = next((earlier for earlier in distinct if _is_copy(vector_set, earlier)), None)
        if original is None:
            distinct.append(vector_set)
        else:
            copies.append((vector_set.name, original.name))
    return tuple(distinct), tuple(copies)


def _is_copy(vector_set: VectorSet, earlier: VectorSet) -> bool:
    distances_N = vector_set.distances(earlier)
    return bool(distances_N.size) and float(np.mean(distances_N == 0)) >= COPIED
