"""The whole lives of many nodes, nonce by nonce, under the rule of :class:`assay.poc.verdict.Life`.

A life is too long to take logarithms of densities at every nonce of a hundred thousand nodes. So the sizes of residuals
are drawn from a fine grid, and what each size of it multiplies every path of the e-value by is looked up. The steps
are those of :class:`assay.stats.SequentialTest`, the shares and lengths of the tests those of ``Life``.

Legend of shapes: N nodes, C nonces of a round, A sizes of the grid, P paths of the e-value.
"""

import math
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numba
import numpy as np
import numpy.typing as npt
from scipy import special

from assay import stats
from assay.poc.verdict.life import EPOCH, error_share
from assay.poc.verdict.noise import Noise, sequential_test
from assay.stats.noise import Spread

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

SIZES = 2048  # neighbours lie less than 1 % apart
SMALLEST = 1e-3  # of a typical residual: what is smaller says the same
LARGEST = 2.0
TOGETHER = 512  # nodes of one task
SEGMENT = 64  # nonces after which the paths are divided by the honest ones
FORGOTTEN = 1e-60  # share of the honest paths below which a path is dropped; others convict long before it comes back


@dataclass(frozen=True)
class Kind:
    """A kind of node.

    Args:
        name: Name in tables.
        multiple: Size of the residuals that it computes cheaply over that of honest ones.
        junk: Share of its nonces that are invented.
        share: Share of the other nonces that are computed cheaply.
        honest_for: Share of the rounds that it is honest for at first.
    """

    name: str
    multiple: float = 1.0
    junk: float = 0.0
    share: float = 1.0
    honest_for: float = 0.0

    @property
    def honest(self) -> bool:
        """Whether it does not cheat at all."""
        return self.multiple == 1 and self.junk == 0


@dataclass(frozen=True)
class Machines:
    """How the noise of honest machines differs from the law.

    Args:
        spread: Law of the scale of a machine, which is drawn once for its life.
        block: Standard deviation of ln of the scale of a block, which is drawn for every node and round.
    """

    spread: Spread = field(default_factory=Spread)
    block: float = 0.0


class Grid:
    """Sizes of residuals, equally far apart in their logarithms, and the laws of honest and invented ones on them.

    Args:
        law: Law of honest residuals.
    """

    def __init__(self, law: stats.NoiseLaw) -> None:
        log_A = np.linspace(math.log(law.size * SMALLEST), math.log(LARGEST), SIZES)
        self.sizes_A = np.exp(log_A)
        self.step = float(log_A[1] - log_A[0])
        edges = np.exp(log_A[:-1] + self.step / 2)
        self.honest = Draws.of(np.diff(1 - np.concatenate([[1.0], law.survival(edges), [0.0]])))
        self.junk = Draws.of(np.diff(np.concatenate([[0.0], _invented(law, edges), [1.0]])))

    def shifts(self, log_scale_N: FloatArray, rng: np.random.Generator) -> IntArray:
        """Return numbers of places on the grid, rounded at random so that their mean is right."""
        return np.floor(log_scale_N / self.step + rng.random(log_scale_N.shape)).astype(np.int64)


@dataclass(frozen=True)
class Draws:
    """A law on the grid, ready to be drawn from with one look-up (Walker 1977).

    Args:
        kept: Chance that a place which was hit is taken, [A].
        other: Place that is taken instead, [A].
    """

    kept: FloatArray
    other: IntArray

    @classmethod
    def of(cls, chance_A: FloatArray) -> "Draws":
        """Build the tables."""
        left_A = chance_A / chance_A.sum() * chance_A.size
        kept_A, other_A = np.ones(chance_A.size), np.arange(chance_A.size)
        poor = [int(i) for i in np.flatnonzero(left_A < 1)]
        rich = [int(i) for i in np.flatnonzero(left_A >= 1)]
        while poor and rich:
            here, there = poor.pop(), rich[-1]
            kept_A[here], other_A[here] = left_A[here], there
            left_A[there] -= 1 - left_A[here]
            if left_A[there] < 1:
                poor.append(rich.pop())
        return cls(kept_A, other_A)


class SizeEvidence:
    """What every size on a grid does to the e-value of a law: the factors of its paths.

    Args:
        noise: Honest noise that is judged by.
        sizes_A: Sizes of residuals.
    """

    def __init__(self, noise: Noise, sizes_A: FloatArray) -> None:
        test = sequential_test(noise)
        steps, self.honest = test.steps(sizes_A), test.honest_paths
        # Paths that fall fastest under honest noise come last, so that the dropped ones need not be visited.
        width_A = np.ones(sizes_A.size) if isinstance(noise.law, stats.LogNoise) else sizes_A
        fall_P = (np.exp(noise.law.log_density(sizes_A, 1.0)) * width_A) @ steps
        order = np.concatenate([np.arange(self.honest), self.honest + np.argsort(-fall_P[self.honest :])])
        self.prior_P = np.exp(test.prior[order])
        self.factor_AP = np.exp(steps[:, order]).astype(np.float32, order="C")


class ManyLives:
    """The running tests of many nodes that are all judged alike: as :class:`assay.poc.verdict.Life`, for each of them.

    Args:
        evidence: What residuals do to the e-value.
        nodes: Number of nodes.
        alpha: Bound on the chance that an honest node is ever accused, in its whole life.
    """

    def __init__(self, evidence: SizeEvidence, *, nodes: int, alpha: float) -> None:
        self._evidence, self._alpha = evidence, alpha
        self._shape = (nodes, evidence.prior_P.size)
        self._tests = [self._begin(1)]
        self._since = 0
        self.convicted_N = np.zeros(nodes, dtype=np.bool_)

    def _begin(self, number: int) -> tuple[int, FloatArray, IntArray]:
        self._number = number
        path_NP = np.broadcast_to(self._evidence.prior_P, self._shape).copy()
        return number, path_NP, np.full(self._shape[0], self._shape[1])

    def update(self, places_NC: npt.NDArray[np.int16]) -> npt.NDArray[np.bool_]:
        """Take the residuals of one audit, as places on the grid; return who is convicted by now, [N]."""
        if self._since >= EPOCH:
            self._tests[1:], self._since = [self._begin(self._number + 1)], 0
        factor_AP, honest = self._evidence.factor_AP, self._evidence.honest
        for number, path_NP, last_N in self._tests:
            bound = 1 / (self._alpha * error_share(number))
            _multiply(path_NP, last_N, factor_AP, places_NC, honest, bound, self.convicted_N)
        self._since += places_NC.shape[1]
        return self.convicted_N


def convicted_in(
    kind: Kind,
    noise: Noise,
    machines: Machines,
    *,
    nodes: int,
    rounds: int,
    nonces: int,
    alpha: float,
    seed: tuple[int, ...],
) -> FloatArray:
    """Return the round in which each of many nodes of a kind is convicted, [N]; infinity for never.

    Args:
        kind: Kind of all the nodes.
        noise: Honest noise that they are judged under.
        machines: How machines differ from it.
        nodes: Number of nodes.
        rounds: Number of rounds of their lives.
        nonces: Number of nonces that are checked in a round; each round is one audit.
        alpha: Bound on the chance that an honest node is ever accused, in its whole life.
        seed: Seed of everything that is drawn.
    """
    grid = Grid(noise.law)
    evidence = SizeEvidence(noise, grid.sizes_A)

    def live(start: int) -> FloatArray:
        rng = np.random.default_rng((*seed, start))
        count = min(TOGETHER, nodes - start)
        lives = ManyLives(evidence, nodes=count, alpha=alpha)
        log_scale_N = machines.spread.sd * rng.standard_t(machines.spread.dof, count)
        caught_N = np.full(count, np.inf)
        for round in range(1, rounds + 1):
            cheats = kind if round > kind.honest_for * rounds else Kind("honest")
            here_N = log_scale_N + machines.block * rng.standard_normal(count)
            before_N = lives.convicted_N.copy()
            lives.update(draw_round(grid, cheats, here_N, nonces, rng))
            caught_N[lives.convicted_N & ~before_N] = round
            if lives.convicted_N.all():
                break
        return caught_N

    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        return np.concatenate(list(pool.map(live, range(0, nodes, TOGETHER))))


def draw_round(
    grid: Grid, kind: Kind, log_scale_N: FloatArray, nonces: int, rng: np.random.Generator
) -> npt.NDArray[np.int16]:
    """Draw the residuals of a round as places on the grid, [N, C].

    Args:
        grid: Grid of sizes.
        kind: What the nodes do in this round.
        log_scale_N: Logarithm of the scale of every node's honest noise over that of the law.
        nonces: Number of nonces.
        rng: Generator of everything that is drawn.
    """
    places_NC = np.empty((log_scale_N.size, nonces), dtype=np.int16)
    seed_N = rng.integers(np.iinfo(np.uint64).max, size=log_scale_N.size, dtype=np.uint64, endpoint=True)
    honest_N = grid.shifts(log_scale_N, rng)
    cheap_N = grid.shifts(log_scale_N + math.log(kind.multiple), rng)
    share = 0.0 if kind.multiple == 1 else kind.share
    tables = (grid.honest.kept, grid.honest.other, grid.junk.kept, grid.junk.other)
    _draw(seed_N, tables, honest_N, cheap_N, kind.junk, kind.junk + (1 - kind.junk) * share, places_NC)
    return places_NC


def _invented(law: stats.NoiseLaw, sizes_A: FloatArray) -> FloatArray:
    """Return the chance that an invented value misses by less."""
    if isinstance(law, stats.ScaleNoise):
        return np.asarray(special.erf(sizes_A / law.junk_sigma / math.sqrt(2)), dtype=np.float64)
    return np.asarray(stats.chord_cdf(sizes_A, law.dimension), dtype=np.float64)


# Without the GIL, so that threads share the work; sums in any order, so that they are vectorised.
@numba.njit(nogil=True, fastmath={"reassoc", "contract", "nsz"}, inline="never")
def _step(path: Any, factors: Any) -> Any:
    """Multiply some paths of a node by the factors of a residual; return their sum."""
    total = 0.0
    for p in range(path.size):
        path[p] *= factors[p]
        total += path[p]
    return total


@numba.njit(nogil=True)
def _multiply(path: Any, last: Any, factor: Any, places: Any, honest: int, bound: float, convicted: Any) -> None:
    """Multiply the paths of every node by the factors of its residuals, and convict where the e-value is reached."""
    for n in range(path.shape[0]):
        row, stop = path[n], last[n]
        for c in range(places.shape[1]):
            if convicted[n]:
                break
            factors = factor[places[n, c]]
            for_honest = _step(row[:honest], factors[:honest])
            for_cheats = _step(row[honest:stop], factors[honest:stop])
            if not for_cheats < bound * for_honest:  # infinite evidence included
                convicted[n] = True
            elif c % SEGMENT == SEGMENT - 1 or c == places.shape[1] - 1:
                for p in range(stop):
                    row[p] = row[p] / for_honest if row[p] > FORGOTTEN * for_honest else 0.0
                while stop > honest and row[stop - 1] == 0.0:
                    stop -= 1
        last[n] = stop


@numba.njit(nogil=True, inline="always")
def _next(state: Any) -> Any:
    """Return 64 random bits of a state (SplitMix64; Steele, Lea and Flood 2014)."""
    z = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


@numba.njit(nogil=True)
def _draw(seed: Any, tables: Any, honest: Any, cheap: Any, junk: float, cheating: float, places: Any) -> None:
    """Draw places: of junk with the first chance, of cheap nonces up to the second, else of honest ones."""
    kept, other, kept_junk, other_junk = tables
    count = np.uint64(kept.size)
    gamma, half = np.uint64(0x9E3779B97F4A7C15), np.uint64(32)
    for n in range(places.shape[0]):
        state = seed[n]
        for c in range(places.shape[1]):
            chance = 1.0
            if cheating > 0:
                state += gamma
                chance = np.float64(_next(state) >> np.uint64(11)) * 2.0**-53
            state += gamma
            bits = _next(state)
            place = np.int64(((bits >> half) * count) >> half)
            within = np.float64(bits & np.uint64(0xFFFFFFFF)) * 2.0**-32
            if chance < junk:
                if within >= kept_junk[place]:
                    place = other_junk[place]
            else:
                if within >= kept[place]:
                    place = other[place]
                place += cheap[n] if chance < cheating else honest[n]
            places[n, c] = min(max(place, 0), kept.size - 1)
