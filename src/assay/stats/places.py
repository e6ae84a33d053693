"""The place test: whether residuals are large at certain places of the prover's batches.

docs/statistics.md says what faults these are, which places are suspected, and what a cheat at fixed
places gains. If residuals do not depend on the place, every assignment of them to positions p is
equally likely. So Fisher's exact test is valid for any law of them: of the table of those at the
suspected places or elsewhere, among the largest or not, with as many largest ones as stand there.

The places tried are runs p mod m in start … start + length − 1, with an equal share of α for every
modulus m (Bonferroni), half of which is for runs that start at 0. So α bounds the chance that a
sound machine is called faulty.

Suffixes: N residuals, M places of one modulus, L lengths of runs, S starts of runs.
"""

import math
import sys
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt
import scipy

from assay.errors import UsageError
from assay.stats.chord import FloatArray, IntArray

BoolArray = npt.NDArray[np.bool_]

PLACE_ALPHA = 1e-4
"""Bound on the false-positive rate: that residuals independent of the place are called faulty."""

MATERIAL_RATIO = 1.5
"""Least factor between the medians at bad places and elsewhere; a smaller one may be no fault."""

SUSPICION = 0.05
"""Largest p-value at which more nonces must be checked before large residuals are called fraud."""

# Once a dependence is shown, more places only change what is set aside, and a missed one may look
# like fraud. So they need less evidence.
_EXTENSION_ALPHA = 0.01
_EXTENSIONS = 8

# Usual batch sizes and numbers of ranks, tried in every proof.
_POWERS = (2, 4, 8, 16, 32, 64)
# Multiples of the stated batch size: ranks that take turns, batches that the engine joined.
_MULTIPLES = (1, 2, 3, 4, 8)
_LARGEST_MODULUS = 256  # a header may state any batch size
_MOST_STARTS = 64


@dataclass(frozen=True, slots=True)
class Places:
    """Positions p of a run with p mod modulus in ``places``."""

    modulus: int
    places: frozenset[int]
    log_p: float = 0.0  # logarithm of the p-value of independence from these places

    @property
    def p_value(self) -> float:
        """The p-value, which is never 0."""
        return max(math.exp(self.log_p), sys.float_info.min)

    def contain(self, positions_N: IntArray) -> BoolArray:
        """Return whether each position is at one of the places, [N]."""
        return np.isin(positions_N % self.modulus, list(self.places))

    def at_multiple(self, modulus: int) -> frozenset[int]:
        """Return these places as places of a multiple of the modulus."""
        return frozenset(
            place + start for place in self.places for start in range(0, modulus, self.modulus)
        )

    def __str__(self) -> str:
        firsts = [place for place in sorted(self.places) if place - 1 not in self.places]
        lasts = [place for place in sorted(self.places) if place + 1 not in self.places]
        runs = [
            f"{first}" if first == last else f"{first} to {last}"
            for first, last in zip(firsts, lasts, strict=True)
        ]
        return f"position mod {self.modulus} in {', '.join(runs)}"


@dataclass(frozen=True, slots=True)
class PlaceTest:
    """The outcome of `place_test`.

    Args:
        faulty: Whether the residuals depend on the place, by a factor that matters.
        suspected: Whether they may depend on it: too little for ``faulty``, but enough to check
            more nonces before large residuals are called fraud. Never true together with
            ``faulty``.
        p_value: Upper bound of the probability that residuals which do not depend on the place show
            a pattern as clear as this one, for all patterns that were tried together.
        pattern: Bad places in words, such as "position mod 16 in 0 to 5"; the clearest pattern if
            nothing is faulty.
        modulus: Number of places; None with fewer than two residuals.
        places: Bad places, each below the modulus.
        share: Share of the places that are bad.
        ratio: Median residual at the clearest of the bad places, over the larger of the median
            elsewhere and the honest size; infinite if that is 0.
        set_aside: Whether each residual stands at a bad place, [N]; all false unless faulty or
            suspected, so that ``~set_aside`` always picks the residuals to judge.
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

    @property
    def bad_places(self) -> Places:
        """The bad places, of which there are some where there are two residuals or more."""
        return Places(self.modulus or 1, frozenset(self.places))


def place_test(
    magnitudes: npt.ArrayLike,
    positions: npt.ArrayLike,
    *,
    batch_size: int | None = None,
    honest_size: float = 0.0,
) -> PlaceTest:
    """Test whether residuals depend on the place of their nonces in the prover's batches.

    Residuals are faulty if they depend on the place with a p-value of at most `PLACE_ALPHA`, and if
    their median at the bad places is at least `MATERIAL_RATIO` times both that of the others and
    the honest size. At most half of the places are called bad. No random numbers are drawn.

    Args:
        magnitudes: Sizes of the residuals: differences of distances, whose sign is dropped, or L2
            distances of vectors. A value that is not finite counts as twice the largest of the
            others.
        positions: Index of each nonce in the sequence that the prover computed, from 0. A sample
            may skip any. Where published records leave out nonces, the index among the records is
            not the position.
        batch_size: Batch size that the proof states; only the usual powers of two are tried when
            None.
        honest_size: Size of a typical honest residual. Without it, two machines that agree to the
            bit except at some places would be called faulty for an ordinary rounding difference
            there.

    Raises:
        UsageError: Residuals and positions differ in number, a position is not a whole number from
            0, or ``batch_size`` or ``honest_size`` is out of range.

    Example:
        >>> residuals = [0.9 if n % 8 == 0 else 0.1 for n in range(64)]
        >>> test = place_test(residuals, range(64), batch_size=8)
        >>> test.faulty, test.pattern, test.share
        (True, 'position mod 8 in 0', 0.125)
    """
    values_N = np.asarray(magnitudes, dtype=np.float64)
    positions_N = np.asarray(positions)
    _check_arguments(values_N, positions_N, batch_size, honest_size)
    if values_N.size < 2:
        return PlaceTest(
            faulty=False,
            suspected=False,
            p_value=1.0,
            pattern="",
            modulus=None,
            places=(),
            share=0.0,
            ratio=1.0,
            set_aside=np.zeros(values_N.size, dtype=np.bool_),
        )
    size_N = np.abs(np.where(np.isfinite(values_N), values_N, 0.0))
    # A value that is not a number is the largest, also where all others are 0.
    size_N[~np.isfinite(values_N)] = 2 * float(size_N.max()) or 1.0
    sample = _Sample(size_N, positions_N.astype(np.int64), choose_moduli(batch_size), honest_size)
    candidates = sorted(sample.find_runs(sample.moduli), key=lambda places: places.log_p)
    faults = [
        places
        for places in candidates
        if places.p_value <= PLACE_ALPHA and sample.ratio(places) >= MATERIAL_RATIO
    ]
    clearest = faults[0] if faults else candidates[0]
    dependent = clearest.p_value <= SUSPICION
    bad = sample.extend_run(clearest) if dependent else clearest
    return PlaceTest(
        faulty=bool(faults),
        suspected=dependent and not faults,
        p_value=clearest.p_value,
        pattern=str(bad),
        modulus=bad.modulus,
        places=tuple(sorted(bad.places)),
        share=len(bad.places) / bad.modulus,
        ratio=sample.ratio(clearest),
        set_aside=bad.contain(sample.positions) & dependent,
    )


def _check_arguments(
    values_N: FloatArray,
    positions_N: npt.NDArray[np.generic],
    batch_size: int | None,
    honest_size: float,
) -> None:
    natural = np.issubdtype(positions_N.dtype, np.integer) and positions_N.min(initial=0) >= 0
    alike = values_N.ndim == 1 and values_N.shape == positions_N.shape
    if not alike or (values_N.size and not natural):
        raise UsageError(
            f"residuals of shape {values_N.shape} at positions {positions_N!s:.60} of shape "
            f"{positions_N.shape}",
            wanted="one whole number from 0 for each residual",
            do="pass the index of each nonce in the prover's own sequence",
            field="positions",
        )
    if not (batch_size is None or batch_size >= 1) or not 0 <= honest_size < math.inf:
        raise UsageError(
            f"batch_size {batch_size}, honest_size {honest_size}",
            wanted="a batch of at least 1, a finite size of at least 0",
            do="pass the batch size of the proof's header, or None",
        )


def choose_moduli(batch_size: int | None) -> tuple[int, ...]:
    """Return every modulus that is tried, in ascending order."""
    if batch_size is None:
        return _POWERS
    multiples = [batch_size * factor for factor in _MULTIPLES]
    return tuple(
        modulus
        for modulus in range(2, _LARGEST_MODULUS + 1)
        if modulus in (*_POWERS, *multiples) or batch_size % modulus == 0
    )


@dataclass(frozen=True, slots=True)
class _Sample:
    """Sizes and positions of residuals, [N] each, the moduli to try, and the honest size."""

    sizes: FloatArray
    positions: IntArray
    moduli: tuple[int, ...]
    honest_size: float

    def ratio(self, places: Places) -> float:
        """Return the median residual at the places over that elsewhere, or over the honest size.

        The larger of the two is the base. Places that have all residuals or none have ratio 1.
        """
        inside_N = places.contain(self.positions)
        if inside_N.all() or not inside_N.any():
            return 1.0
        inside = float(np.median(self.sizes[inside_N]))
        base = max(float(np.median(self.sizes[~inside_N])), self.honest_size)
        if base:
            return inside / base
        return math.inf if inside else 1.0

    def find_runs(self, moduli: tuple[int, ...]) -> list[Places]:
        """Return the clearest run of every modulus, with p-values for all that were tried."""
        runs = map(self._find_run, moduli)
        log_count = math.log(len(moduli))
        return [replace(run, log_p=min(0.0, run.log_p + log_count)) for run in runs]

    def _find_run(self, modulus: int) -> Places:
        """Return the clearest run of places of a modulus, of any length up to half.

        At most 64 starts are tried.
        """
        place_N = self.positions % modulus
        lengths_L = np.arange(1, modulus // 2 + 1)
        starts_S = np.arange(0, modulus, -(-modulus // _MOST_STARTS))
        # As many of the largest residuals as stand at the places, were they spread evenly; at most
        # half of all.
        expected_L = [round(self.sizes.size * length / modulus) for length in lengths_L.tolist()]
        # Those above the next one are large: fewer where equal ones straddle the end.
        order_N = np.argsort(-self.sizes)
        falling_N = self.sizes[order_N]
        number_L = np.searchsorted(-falling_N, -falling_N[expected_L], side="left")
        # Each is large from one length on: counted there, and summed over the shorter ones.
        row_N = np.searchsorted(number_L, np.arange(self.sizes.size), side="right")
        is_large_N = row_N < lengths_L.size
        cell = (row_N * modulus + place_N[order_N])[is_large_N]
        added_LM = np.bincount(cell, minlength=lengths_L.size * modulus).reshape(-1, modulus)
        large_LM = np.cumsum(added_LM, axis=0)
        count_1M = np.bincount(place_N, minlength=modulus)[None, :]
        hits_LS = _sum_runs(large_LM, lengths_L, starts_S)
        count_LS = _sum_runs(count_1M, lengths_L, starts_S)
        large_L1 = large_LM.sum(axis=1, keepdims=True)
        log_p_LS = log_fisher(hits_LS, count_LS, large_L1, self.sizes.size)
        # Half of alpha is for runs from place 0, the first column, where faults of real machines
        # were found.
        runs_S = np.full(starts_S.size, 2.0 * lengths_L.size * (starts_S.size - 1))
        runs_S[0] = 2.0 * lengths_L.size
        log_p_LS += np.log(runs_S)
        row, column = divmod(int(log_p_LS.argmin()), starts_S.size)
        places = frozenset(
            (int(starts_S[column]) + step) % modulus for step in range(int(lengths_L[row]))
        )
        return Places(modulus, places, log_p=float(log_p_LS[row, column]))

    def extend_run(self, run: Places) -> Places:
        """Return the run with further places of large residuals: two machines may have faults."""
        for _ in range(_EXTENSIONS):
            # Places of the same modulus, its divisors and its multiples, up to half of all.
            related = tuple(
                modulus
                for modulus in self.moduli
                if modulus % run.modulus == 0 or run.modulus % modulus == 0
            )
            outside_N = ~run.contain(self.positions)
            if not related or np.count_nonzero(outside_N) < 2:
                break
            outside = replace(
                self, sizes=self.sizes[outside_N], positions=self.positions[outside_N]
            )
            extension = min(outside.find_runs(related), key=lambda places: places.log_p)
            modulus = max(run.modulus, extension.modulus)
            places = run.at_multiple(modulus) | extension.at_multiple(modulus)
            if extension.p_value > _EXTENSION_ALPHA or 2 * len(places) > modulus:
                break
            run = Places(modulus, places)
        # Moduli ascend, so the first that names the same places is the smallest.
        for modulus in self.moduli:
            if run.modulus % modulus == 0:
                shorter = Places(modulus, frozenset(place % modulus for place in run.places))
                if shorter.at_multiple(run.modulus) == run.places:
                    return shorter
        return run


def _sum_runs(counts_LM: IntArray, lengths_L: IntArray, starts_S: IntArray) -> IntArray:
    """Return the sum of the counts in each run, [L, S]; place 0 follows the last place.

    Counts that are those of every length have one row.
    """
    rows, modulus = counts_LM.shape
    before = np.zeros((rows, 2 * modulus + 1), dtype=np.int64)
    np.cumsum(counts_LM, axis=1, out=before[:, 1 : modulus + 1])
    before[:, modulus + 1 :] = before[:, 1 : modulus + 1] + before[:, modulus, None]
    end_LS = starts_S[None, :] + lengths_L[:, None]
    row_L1 = np.arange(rows)[:, None]
    return np.asarray(before[row_L1, end_LS] - before[:, starts_S], dtype=np.int64)


def log_fisher(hits: IntArray, count: IntArray, large: IntArray, n: int) -> FloatArray:
    """Return an upper bound of the logarithm of Fisher's one-sided p-value, elementwise.

    H is how many of the ``large`` residuals are among the ``count`` at the places. P(H ≥ h) ≤ P(H =
    h)/(1 − r) with r = P(H = h + 1)/P(H = h): these ratios fall with h, so the sum lies below a
    geometric series. Far in the tail the bound is close.
    """
    log_factorial = scipy.special.gammaln(np.arange(n + 1) + 1.0)

    def log_choose(total: IntArray | int, chosen: IntArray) -> FloatArray:
        log_ways = log_factorial[total] - log_factorial[chosen] - log_factorial[total - chosen]
        return np.asarray(log_ways)

    log_mass = log_choose(large, hits) + log_choose(n - large, count - hits) - log_choose(n, count)
    ratio = (large - hits) * (count - hits) / ((hits + 1.0) * (n - large - count + hits + 1.0))
    falling = ratio < 1
    bound = log_mass - np.log1p(-np.where(falling, ratio, 0.0))
    return np.where(falling, np.minimum(bound, 0.0), 0.0)
