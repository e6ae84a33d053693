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
        self._honest_A, self._junk_A = 1 - law.survival(edges), _invented(law, edges)

    def shifts(self, log_scale_N: FloatArray, rng: np.random.Generator) -> IntArray:
        """Return numbers of places on the grid, rounded at random so that their mean is right."""
        return np.floor(log_scale_N / self.step + rng.random(log_scale_N.shape)).astype(np.int64)

    def draw(self, kind: Kind, log_scale_N: FloatArray, nonces: int, rng: np.random.Generator) -> IntArray:
        """Draw the residuals of a round as places on the grid, [N, C].

        Args:
            kind: What the nodes do in this round.
            log_scale_N: Logarithm of the scale of every node's honest noise over that of the law.
            nonces: Number of nonces.
            rng: Generator of everything that is drawn.
        """
        shape = log_scale_N.size, nonces
        honest_N, cheap_N = (self.shifts(log_scale_N + math.log(size), rng) for size in (1.0, kind.multiple))
        places_NC = np.searchsorted(self._honest_A, rng.random(shape))
        chance_NC = rng.random(shape)
        cheap_NC = chance_NC < kind.junk + (1 - kind.junk) * kind.share
        places_NC += np.where(cheap_NC, cheap_N[:, None], honest_N[:, None])
        if kind.junk:
            junk_NC = np.searchsorted(self._junk_A, rng.random(shape))
            places_NC = np.where(chance_NC < kind.junk, junk_NC, places_NC)
        return np.clip(places_NC, 0, SIZES - 1)


class SizeEvidence:
    """What every size on a grid does to the e-value of a law: the factors of its paths.

    Args:
        noise: Honest noise that is judged by.
        sizes_A: Sizes of residuals.
    """

    def __init__(self, noise: Noise, sizes_A: FloatArray) -> None:
        test = sequential_test(noise)
        steps, self.honest = test.steps(sizes_A), test.honest_paths
        self.prior_P, self.factor_AP = np.exp(test.prior), np.exp(steps)


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

    def _begin(self, number: int) -> tuple[int, FloatArray]:
        self._number = number
        return number, np.broadcast_to(self._evidence.prior_P, self._shape).copy()

    def update(self, places_NC: IntArray) -> npt.NDArray[np.bool_]:
        """Take the residuals of one audit, as places on the grid; return who is convicted by now, [N]."""
        if self._since >= EPOCH:
            self._tests[1:], self._since = [self._begin(self._number + 1)], 0
        honest, nonces = self._evidence.honest, places_NC.shape[1]
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):  # infinite evidence convicts
            for number, path_NP in self._tests:
                bound = 1 / (self._alpha * error_share(number))
                for place, places_N in enumerate(places_NC.T, start=1):
                    path_NP *= self._evidence.factor_AP[places_N]
                    for_honest_N = path_NP[:, :honest].sum(axis=1)
                    self.convicted_N |= ~(path_NP[:, honest:].sum(axis=1) < bound * for_honest_N)
                    if place % SEGMENT == 0 or place == nonces:
                        path_NP /= for_honest_N[:, None]
        self._since += nonces
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
            lives.update(grid.draw(cheats, here_N, nonces, rng))
            caught_N[lives.convicted_N & ~before_N] = round
            if lives.convicted_N.all():
                break
        return caught_N

    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        return np.concatenate(list(pool.map(live, range(0, nodes, TOGETHER))))


def _invented(law: stats.NoiseLaw, sizes_A: FloatArray) -> FloatArray:
    """Return the chance that an invented value misses by less."""
    if isinstance(law, stats.ScaleNoise):
        return np.asarray(special.erf(sizes_A / law.junk_sigma / math.sqrt(2)), dtype=np.float64)
    return np.asarray(stats.chord_cdf(sizes_A, law.dimension), dtype=np.float64)
