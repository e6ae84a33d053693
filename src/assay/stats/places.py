"""The place test: whether residuals are large at certain places of the prover's batches, or for a part of the run.

A machine can be wrong at fixed places without cheating: the first rows of every batch are overwritten, one rank has
stale weights, the first batch ran before the cache was ready. Its residuals then depend on where a nonce stood. Those
of honest noise do not, nor do those of a cheat who does not choose by place: every assignment of residuals to places
is equally likely. So each suspected set of places gives a two-by-two table (among the largest residuals or not, at
these places or not), and Fisher's exact test of it is valid whatever the law of the residuals is. "Largest" are as many
residuals as the places would hold: if the places are bad, these are the residuals that stand there.

The suspected places are runs of neighbours, position mod m in start … start + length − 1, for every candidate m, and
parts of the whole run. They cover

    a place in the batch      m = batch size, one of its divisors or multiples
    the first of a batch      a run that starts at 0
    the rank                  m = number of ranks, or batch size times the number of ranks
    a change or drift         a part of the run: some of its eighths
    the first nonces          a part of the run: positions below 1, 2, 4, …

Every candidate m has an equal share of α, half of it for runs that start at 0, and its runs divide that (Bonferroni).
So residuals that do not depend on the place are called faulty with probability α at most.

A cheat who cheats at fixed places only gains nothing: a faulty proof is not paid, at most half of the places are set
aside, and the other residuals are judged as always. Residuals that accuse there are fraud.

Suffix: N residuals.
"""

import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt
from scipy import special

from assay.errors import UsageError
from assay.stats.chord import FloatArray

# --------------------------------------------------------------------------------------------------
# Where residuals are clearest: Fisher's exact test over runs of places and over parts of the whole run.
#
# Suffixes: N residuals, M places of one modulus, L lengths of runs, S starts of runs, T parts of the whole run.

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


PLACE_ALPHA = 1e-4
"""Bound on the chance that residuals that do not depend on the place are called faulty."""

MATERIAL_RATIO = 1.5
"""Least factor between the medians at bad places and elsewhere: a smaller dependence may be real, but is no fault."""

SUSPICION = 0.05
"""A p-value up to this is too much to say fraud before more nonces were checked."""

# Once a dependence is shown, further places only change what is set aside, and a bad place that is left among the
# others may look like fraud. So they are added at more doubt.
_EXTENSION_ALPHA = 0.01
_EXTENSIONS = 8
_BLOCKS = 32  # steps in which the edges of a part of the run are looked for


@dataclass(frozen=True, slots=True)
class PlaceTest:
    """The outcome of `place_test`.

    Args:
        faulty: Whether the residuals depend on the place, by a factor that matters.
        suspected: Whether they may depend on it: too little for ``faulty``, but enough to check more nonces before
            large residuals are called fraud. Never true together with ``faulty``.
        p_value: Probability that residuals which do not depend on the place show a pattern as clear as the one named;
            an upper bound, for all patterns that were tried together.
        pattern: Bad places in words, such as "position mod 16 in 0 to 5"; the clearest pattern if nothing is faulty.
        modulus: Number of places; None if a part of the run is meant.
        places: Bad places, each below the modulus; empty for a part of the run.
        share: Share of the places that are bad; share of the residuals for a part of the run.
        ratio: Median residual at the clearest of the bad places, over that elsewhere or the honest size, whichever is
            larger; infinite if that is 0.
        set_aside: Whether each residual stands at a bad place, [N]; all false unless faulty or suspected, so that
            ``~set_aside`` always picks the residuals to judge.
    """

    faulty: bool
    suspected: bool
    p_value: float
    pattern: str
    modulus: int | None
    places: tuple[int, ...]
    share: float
    ratio: float
    set_aside: BoolArray = field(repr=False, compare=False)


def place_test(
    magnitudes: npt.ArrayLike,
    positions: npt.ArrayLike,
    *,
    batch_size: int | None = None,
    honest_size: float = 0.0,
) -> PlaceTest:
    """Test whether residuals depend on the place of their nonces in the prover's batches.

    Residuals are faulty if they depend on the place with a p-value of at most `PLACE_ALPHA`, and if their median at the
    bad places is at least `MATERIAL_RATIO` times both that of the others and the honest size. At most half of the
    places are called bad. No random numbers are drawn.

    Args:
        magnitudes: Sizes of the residuals: differences of distances, whose sign is dropped, or L2 distances of
            vectors. A value that is not finite counts as twice the largest of the others.
        positions: Index of each nonce in the sequence that the prover computed, from 0. A sample may skip any. Where
            published records leave out nonces, the index among the records is not the position.
        batch_size: Batch size that the proof states; only the usual powers of two are tried when None.
        honest_size: Size of a typical honest residual. Without it, two machines that agree to the bit except at some
            places would be called faulty for an ordinary rounding difference there.

    Raises:
        UsageError: Residuals and positions differ in number, a position is not a whole number from 0, or
            ``batch_size`` or ``honest_size`` is out of range.

    Example:
        >>> test = place_test([0.9 if n % 8 == 0 else 0.1 for n in range(64)], range(64), batch_size=8)
        >>> test.faulty, test.pattern, test.share
        (True, 'position mod 8 in 0', 0.125)
    """
    size_N, positions_N = _checked(magnitudes, positions)
    if not (batch_size is None or batch_size >= 1) or not 0 <= honest_size < math.inf:
        raise UsageError(
            f"batch_size {batch_size}, honest_size {honest_size}",
            wanted="a batch of at least 1, a finite size of at least 0",
            do="pass the batch size of the proof's header, or None",
        )
    if size_N.size < 2:
        return PlaceTest(False, False, 1.0, "", None, (), 0.0, 1.0, np.zeros(size_N.size, dtype=np.bool_))
    moduli = moduli_of(batch_size)
    found = sorted(clearest(size_N, positions_N, moduli), key=lambda pattern: pattern.log_p)
    ratios = [_ratio(size_N, pattern.holds(positions_N), honest_size) for pattern in found]
    guilty = [p.p_value <= PLACE_ALPHA and ratio >= MATERIAL_RATIO for p, ratio in zip(found, ratios, strict=True)]
    faulty = any(guilty)
    best = guilty.index(True) if faulty else 0
    named = found[best]
    dependent = faulty or named.p_value <= SUSPICION
    if dependent and isinstance(named, Run):
        named = _extended(size_N, positions_N, named, moduli, honest_size)
    elif dependent and isinstance(named, Part):
        named = _with_edges(size_N, positions_N, named, honest_size)
    return PlaceTest(
        faulty=faulty,
        suspected=dependent and not faulty,
        p_value=found[best].p_value,
        pattern=str(named),
        modulus=named.modulus,
        places=tuple(sorted(named.places)),
        share=named.share(positions_N),
        ratio=ratios[best],
        set_aside=named.holds(positions_N) & dependent,
    )


def _checked(magnitudes: npt.ArrayLike, positions: npt.ArrayLike) -> tuple[FloatArray, IntArray]:
    """Return the sizes, with the largest for a value that is not finite, and the positions, both [N]."""
    values_N, positions_N = np.asarray(magnitudes, dtype=np.float64), np.asarray(positions)
    if values_N.ndim != 1 or values_N.shape != positions_N.shape:
        raise UsageError(
            f"residuals of shape {values_N.shape} at positions of shape {positions_N.shape}",
            wanted="two lists of one length",
            do="pass one position per residual",
        )
    if values_N.size and (not np.issubdtype(positions_N.dtype, np.integer) or positions_N.min() < 0):
        raise UsageError(
            f"positions such as {positions_N.min()}",
            wanted="whole numbers from 0",
            do="pass the index of each nonce in the prover's own sequence",
        )
    size_N = np.abs(np.where(np.isfinite(values_N), values_N, 0.0))
    largest = 2 * float(size_N.max(initial=0.0)) or 1.0
    return np.where(np.isfinite(values_N), size_N, largest), positions_N.astype(np.int64)


def _medians(size_N: FloatArray, inside_N: BoolArray, honest_size: float) -> tuple[float, float]:
    """Return the median residual inside, and that outside or the honest one if that is larger."""
    if inside_N.all() or not inside_N.any():
        return honest_size, honest_size
    return float(np.median(size_N[inside_N])), max(float(np.median(size_N[~inside_N])), honest_size)


def _ratio(size_N: FloatArray, inside_N: BoolArray, honest_size: float) -> float:
    inside, base = _medians(size_N, inside_N, honest_size)
    if base == 0.0:
        return math.inf if inside else 1.0
    return inside / base


def _extended(size_N: FloatArray, positions_N: IntArray, run: Run, moduli: Sequence[int], honest_size: float) -> Run:
    """Return the run with the further places at which what is left is large too, up to half of all places.

    Two machines may each have a fault, so places are added of the same modulus, of its divisors and of its multiples.
    """
    run = _with_neighbours(size_N, positions_N, run, honest_size)
    for _ in range(_EXTENSIONS):
        rest_N = ~run.holds(positions_N)
        related = [modulus for modulus in moduli if modulus % run.modulus == 0 or run.modulus % modulus == 0]
        rest = clearest(size_N[rest_N], positions_N[rest_N], related) if np.count_nonzero(rest_N) > 1 else []
        more = min((r for r in rest if isinstance(r, Run)), key=lambda r: r.log_p, default=None)
        if more is None or more.p_value > _EXTENSION_ALPHA:
            break
        modulus = max(run.modulus, more.modulus)
        places = run.lifted(modulus) | more.lifted(modulus)
        if 2 * len(places) > modulus:
            break
        run = _with_neighbours(size_N, positions_N, Run(modulus, places), honest_size)
    for modulus in moduli:  # ascending: the first that says the same is the shortest
        if run.modulus % modulus == 0:
            shorter = Run(modulus, frozenset(place % modulus for place in run.places))
            if shorter.lifted(run.modulus) == run.places:
                return shorter
    return run


def _with_neighbours(size_N: FloatArray, positions_N: IntArray, run: Run, honest_size: float) -> Run:
    """Return the run with the places next to it that resemble it more than the others, up to half of all places.

    A sparse sample has one or two residuals of a place: too few to show that it is bad, and enough to accuse.
    """
    inside, base = _medians(size_N, run.holds(positions_N), honest_size)
    middle = math.sqrt(inside * base)
    place_N = positions_N % run.modulus
    typical = {place: float(np.median(size_N[place_N == place])) for place in set(place_N.tolist())}
    places = set(run.places)
    for last in run.places:
        for step in (1, -1):
            place, between = (last + step) % run.modulus, 1
            while place not in places and 2 * (len(places) + between) <= run.modulus:
                if place in typical:  # places that were not checked are bad if those on both sides are
                    if not middle <= typical[place] > base:
                        break
                    places |= {(place - step * back) % run.modulus for back in range(between)}
                    between = 0
                place, between = (place + step) % run.modulus, between + 1
    return Run(run.modulus, frozenset(places))


def _with_edges(size_N: FloatArray, positions_N: IntArray, part: Part, honest_size: float) -> Part:
    """Return the part with its edges moved outwards while the residuals there resemble it, up to half of the run."""
    inside, base = _medians(size_N, part.holds(positions_N), honest_size)
    order_N = np.argsort(positions_N, kind="stable")
    ordered_N, sizes_N = positions_N[order_N], size_N[order_N]
    alike_N = (sizes_N >= math.sqrt(inside * base)) & (sizes_N > base)
    longest = (int(ordered_N[-1]) + 2) // 2
    before_N, after_N = ordered_N < part.low, ordered_N >= part.high
    later, sooner = _reach(alike_N[after_N]), _reach(alike_N[before_N][::-1])
    high = min(int(ordered_N[after_N][later - 1]) + 1, part.low + longest) if later else part.high
    low = max(int(ordered_N[before_N][-sooner]), high - longest) if sooner else part.low
    return Part(low, high)


def _reach(alike_N: BoolArray) -> int:
    """Return how far alike residuals go on: over blocks of mostly such ones, and to the last one in the next block."""
    block = max(1, alike_N.size // _BLOCKS)
    reached = 0
    while reached < alike_N.size:
        next_N = alike_N[reached : reached + block]
        if 2 * np.count_nonzero(next_N) < next_N.size:
            return reached + int(np.max(np.flatnonzero(next_N) + 1, initial=0))
        reached += next_N.size
    return reached
