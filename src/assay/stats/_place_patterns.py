"""Where residuals are clearest: Fisher's exact test over runs of places and over parts of the whole run.

Suffixes: N residuals, M places of one modulus, L lengths of runs, S starts of runs, T parts of the whole run.
"""

import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
from scipy import special

from assay.stats._chord import FloatArray

IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]

_POWERS = (2, 4, 8, 16, 32, 64)  # usual batch sizes and numbers of ranks, tried whatever the proof states
_MULTIPLES = (1, 2, 3, 4, 8)  # of the stated batch size: ranks that take turns, batches that the engine joined
_LARGEST_MODULUS = 256  # a header may state any batch size
_MOST_STARTS = 64
_EIGHTHS = 8
_SHORTEST_PART = 2  # eighths: a shorter change looks like a batch of unlucky nonces
_FIRST = (1, 2, 4, 8, 16, 32, 64)


@dataclass(frozen=True, slots=True)
class Run:
    """Places of a modulus, and the logarithm of the p-value that they are bad."""

    modulus: int
    places: frozenset[int]
    log_p: float = 0.0

    @property
    def p_value(self) -> float:
        return _p_value(self.log_p)

    def holds(self, positions_N: IntArray) -> BoolArray:
        return np.isin(positions_N % self.modulus, list(self.places))

    def share(self, positions_N: IntArray) -> float:
        del positions_N  # the share of places does not depend on which were checked
        return len(self.places) / self.modulus

    def lifted(self, modulus: int) -> frozenset[int]:
        """Return the places of a multiple of the modulus that are these places."""
        return frozenset(place + start for place in self.places for start in range(0, modulus, self.modulus))

    def __str__(self) -> str:
        ends = [place for place in sorted(self.places) if place - 1 not in self.places]
        listed = []
        for first in ends:
            last = first
            while last + 1 in self.places:
                last += 1
            listed.append(f"{first}" if first == last else f"{first} to {last}")
        return f"position mod {self.modulus} in {', '.join(listed)}"


@dataclass(frozen=True, slots=True)
class Part:
    """Positions low … high − 1 of the whole run, and the logarithm of the p-value that they are bad."""

    low: int
    high: int
    log_p: float = 0.0
    modulus: None = None
    places: frozenset[int] = frozenset()

    @property
    def p_value(self) -> float:
        return _p_value(self.log_p)

    def holds(self, positions_N: IntArray) -> BoolArray:
        return np.asarray((positions_N >= self.low) & (positions_N < self.high))

    def share(self, positions_N: IntArray) -> float:
        return float(self.holds(positions_N).mean())

    def __str__(self) -> str:
        return f"position {self.low} to {self.high - 1}" if self.high > self.low + 1 else f"position {self.low}"


def _p_value(log_p: float) -> float:
    return max(math.exp(log_p), sys.float_info.min)  # it underflows, but is never 0


def moduli_of(batch_size: int | None) -> tuple[int, ...]:
    """Return every modulus that is tried."""
    chosen = set(_POWERS)
    if batch_size is not None:
        chosen |= {divisor for divisor in range(2, _LARGEST_MODULUS + 1) if batch_size % divisor == 0}
        chosen |= {batch_size * factor for factor in _MULTIPLES}
    return tuple(sorted(modulus for modulus in chosen if 2 <= modulus <= _LARGEST_MODULUS))


def clearest(size_N: FloatArray, positions_N: IntArray, moduli: Sequence[int]) -> list[Run | Part]:
    """Return the clearest run of every modulus and the clearest part of the whole run, with the p-values of all."""
    descending_N = np.sort(size_N)[::-1]
    found: list[Run | Part] = [_clearest_run(size_N, descending_N, positions_N, modulus) for modulus in moduli]
    found.append(_clearest_part(size_N, descending_N, positions_N))
    return [replace(pattern, log_p=min(0.0, pattern.log_p + math.log(len(found)))) for pattern in found]


def _clearest_run(size_N: FloatArray, descending_N: FloatArray, positions_N: IntArray, modulus: int) -> Run:
    """Return the clearest run of places of a modulus: any start (of 64 at most), any length up to half."""
    place_N = positions_N % modulus
    lengths_L = np.arange(1, modulus // 2 + 1)
    starts_S = np.arange(0, modulus, -(-modulus // _MOST_STARTS))
    held_LS = _in_runs(np.tile(np.bincount(place_N, minlength=modulus), (lengths_L.size, 1)), lengths_L, starts_S)
    counts_LM = np.zeros((lengths_L.size, modulus), dtype=np.int64)
    for row, length in enumerate(lengths_L.tolist()):
        large_N = _largest(size_N, descending_N, round(size_N.size * length / modulus))
        counts_LM[row] = np.bincount(place_N[large_N], minlength=modulus)
    hits_LS = _in_runs(counts_LM, lengths_L, starts_S)
    log_p_LS = log_fisher(hits_LS, held_LS, counts_LM.sum(axis=1, keepdims=True), size_N.size)
    # Half of the share is for runs from place 0, the first column, where faults of real machines were found.
    runs_S = np.full(starts_S.size, 2.0 * lengths_L.size * (starts_S.size - 1))
    runs_S[0] = 2.0 * lengths_L.size
    log_p_LS += np.log(runs_S)
    row, column = divmod(int(log_p_LS.argmin()), starts_S.size)
    start, length = int(starts_S[column]), int(lengths_L[row])
    places = frozenset((start + step) % modulus for step in range(length))
    return Run(modulus, places, float(log_p_LS[row, column]))


def _in_runs(counts_LM: IntArray, lengths_L: IntArray, starts_S: IntArray) -> IntArray:
    """Return the sum of the counts in each run, [L, S]; runs go on at place 0 after the last place."""
    before = np.pad(np.cumsum(np.tile(counts_LM, 2), axis=1), ((0, 0), (1, 0)))
    last_LS = starts_S[None, :] + lengths_L[:, None]
    return np.asarray(np.take_along_axis(before, last_LS, axis=1) - before[:, starts_S], dtype=np.int64)


def _clearest_part(size_N: FloatArray, descending_N: FloatArray, positions_N: IntArray) -> Part:
    """Return the clearest part of the whole run."""
    tried = list(parts_of(int(positions_N.max()) + 1))
    log_p_T = np.zeros(len(tried))
    for column, part in enumerate(tried):
        held_N = part.holds(positions_N)
        held = np.count_nonzero(held_N)
        large_N = _largest(size_N, descending_N, int(held))
        hits, large = np.count_nonzero(held_N & large_N), np.count_nonzero(large_N)
        log_p_T[column] = log_fisher(np.array(hits), np.array(held), np.array(large), size_N.size)
    best = int(log_p_T.argmin())
    return replace(tried[best], log_p=float(log_p_T[best]) + math.log(len(tried)))


def parts_of(end: int) -> Iterator[Part]:
    """Yield every part of the run 0 … end − 1 that is tried: neighbouring eighths of it, and the first nonces."""
    edges = [end * eighth // _EIGHTHS for eighth in range(_EIGHTHS + 1)]
    for first in range(_EIGHTHS):
        for last in range(first + _SHORTEST_PART, min(first + _EIGHTHS // 2, _EIGHTHS) + 1):
            yield Part(edges[first], edges[last])
    yield from (Part(0, count) for count in _FIRST if count == 1 or 2 * count <= end)


def _largest(size_N: FloatArray, descending_N: FloatArray, wanted: int) -> BoolArray:
    """Return which residuals are among the ``wanted`` largest, [N]; fewer where equal ones straddle the end."""
    if not 0 < wanted < size_N.size:
        return np.zeros(size_N.size, dtype=np.bool_)
    return np.asarray(size_N > descending_N[wanted])


def log_fisher(hits: IntArray, held: IntArray, large: IntArray, n: int) -> FloatArray:
    """Return a bound of the logarithm of Fisher's one-sided p-value, elementwise.

    With H the number of the ``large`` residuals among the ``held`` at the places, P(H ≥ h) ≤ P(H = h)/(1 − r), where
    r = P(H = h + 1)/P(H = h): these ratios fall with h, so the sum lies below a geometric series. Far in the tail the
    bound is close.
    """
    log_factorial = special.gammaln(np.arange(n + 1) + 1.0)

    def log_choose(total: IntArray | int, chosen: IntArray) -> FloatArray:
        return np.asarray(log_factorial[total] - log_factorial[chosen] - log_factorial[total - chosen])

    log_mass = log_choose(large, hits) + log_choose(n - large, held - hits) - log_choose(n, held)
    ratio = (large - hits) * (held - hits) / ((hits + 1.0) * (n - large - held + hits + 1.0))
    falling = ratio < 1
    bound = log_mass - np.log1p(-np.where(falling, ratio, 0.0))
    return np.where(falling, np.minimum(bound, 0.0), 0.0)
