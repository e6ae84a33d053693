"""Lives of cheats, in a fiftieth of the time of `Life`, and the strategies of a rational cheat.

The rule is that of `assay.poc.verdict.Life`: two tests, of all residuals and of those after an
epoch, a pool of places, an e-value without any one block, and strikes. It is looked at only every
few audits, and of an earlier pool eight blocks can be left out. So it convicts no earlier than a
life does: what survives here is an upper bound. Places are tested only where they may change the
outcome. `research/tests/test_rational.py` compares the two.

What a residual adds to the paths is looked up on a grid, and paths are summed by audit: steps and
sums of every nonce took nine tenths of the time (0.28 s a life before, 0.03 s now).

Suffixes: N nonces, A audits, B blocks, P paths of a test, G residuals of a grid.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from assay import stats
from assay.poc import Noise
from assay.poc.verdict.entries import HONEST
from assay.poc.verdict.life import APART, EPOCH, PLACES, error_share
from assay.poc.verdict.pool_faults import STRIKES, FaultyPool, count_strikes
from assay.poc.verdict.sample_plan import sequential_test
from assay.stats.e_values import log_sum
from assay.stats.sequential import SHARES

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]
Rng = np.random.Generator
ALPHA = 1e-3
BETA = 1e-2
LOOKS = 10  # audits between two looks
BATCH = 32  # batch size that the build states
SMALLEST = 1e-4  # residual of the grid, over the typical one
LARGEST = 2.0
GRID = 0.002  # step of the logarithm
POOL = 64  # audits of a pool of places
HANDED_IN = 200  # nonces of a block of which an audit draws
AT_PLACES = " at places"  # after a way whose lies stand at fixed places, the last two of `more`


@dataclass(frozen=True)
class LifeResult:
    """What an account is paid, which is nothing at places that its pools call faulty.

    Args:
        convicted: Audits after which it is fraud; infinite for never.
        suspected: Audits after which some e-value reached its bound; infinite for never.
        faulty: Whether a fault is open at the end.
        paid: Nonces that are credited; of a convicted life none.
        paid_cheap: Cheap ones among them.
        nonces: All nonces.
        cheap: All cheap ones.
        honest: Audits after which the first test excludes a share of 40 % or more, so that the life
            may be called honest; infinite for never.
    """

    convicted: float
    suspected: float
    faulty: bool
    paid: int
    paid_cheap: int
    nonces: int
    cheap: int
    honest: float


@lru_cache(maxsize=8)
def _test_and_steps(noise: Noise) -> tuple[stats.SequentialTest, FloatArray, FloatArray]:
    """Return a test under a law, a grid of residuals [G], and what each adds to the paths [G, P].

    A residual takes the steps of its neighbour on the grid, which is at most .2 % away.
    """
    test = sequential_test(noise, alpha=ALPHA, beta=BETA)
    low = math.log(noise.size * SMALLEST)
    grid_G = np.exp(np.arange(low, math.log(LARGEST) + GRID, GRID))
    return test, grid_G, test.steps(grid_G)


@dataclass
class _Test:
    """A test of a life: what each of its audits adds to the paths, and what follows after it."""

    test: stats.SequentialTest
    log_weight: float
    begins: int  # its first audit
    sums: FloatArray  # [A, P]
    suspicion: BoolArray = field(init=False)  # [A]
    excludes: BoolArray = field(init=False)  # [A], whether shares above that of honest are excluded

    def __post_init__(self) -> None:
        path_AP = self.test.prior + np.cumsum(self.sums, axis=0)
        honest_A = log_sum(path_AP[:, : self.test.honest_paths])
        excluded = path_AP[:, -self.test.excluding :].reshape(len(path_AP), -1, len(SHARES))
        over_AP = honest_A[:, None] - log_sum(np.moveaxis(excluded, 1, 2))
        above = np.array(SHARES) > HONEST
        self.excludes = np.all(self.log_weight + over_AP[:, above] >= -math.log(BETA), axis=1)
        self._log_e_A = self.test.log_e(path_AP) + self.log_weight
        self.suspicion = np.maximum.accumulate(self._log_e_A) >= -math.log(ALPHA)

    def accuses(self, end: int) -> bool:
        """Return whether the e-value after so many audits is at its bound."""
        return end > self.begins and bool(self._log_e_A[end - self.begins - 1] >= -math.log(ALPHA))

    def suspects(self, end: int) -> bool:
        """Return whether the e-value was at its bound within so many audits."""
        return end > self.begins and bool(self.suspicion[end - self.begins - 1])

    def stands(self, block_A: IntArray, aside_AP: FloatArray, end: int, settled: int) -> bool:
        """Return whether so many audits convict without any one block.

        ``aside_AP`` is what residuals at faulty places add, and pools before ``settled`` are over.
        """
        if not self.suspects(end):
            return False
        blocks, index_A = np.unique(block_A[self.begins : end], return_inverse=True)
        if len(blocks) < 2:
            return False
        sums_BP = np.zeros((len(blocks), self.sums.shape[1]))
        np.add.at(sums_BP, index_A, self.sums[: end - self.begins] - aside_AP[self.begins : end])
        path = self.test.prior + sums_BP.sum(axis=0)
        left_B = self.test.log_e(path - sums_BP)
        if settled > self.begins:  # of an earlier pool, only some blocks can be left out
            old = np.unique(index_A[: settled - self.begins])
            weight_B = self.test.log_e(self.test.prior + sums_BP)
            apart = old[np.argsort(-weight_B[old])[:APART]]
            left_B = np.delete(left_B, np.setdiff1d(old, apart))
        return bool(self.log_weight + left_B.min(initial=np.inf) >= -math.log(ALPHA))


def run_life(
    noise: Noise,
    residual_N: FloatArray,
    position_N: IntArray,
    block_N: IntArray,
    cheap_N: BoolArray,
    *,
    audit: int = 16,
    looks: int = LOOKS,
) -> LifeResult:
    """Judge a whole life, of which ``cheap_N`` says which nonces were computed cheaply.

    All nonces of an audit are of one block.
    """
    sizes_N = residual_N / noise.size
    audits = len(sizes_N) // audit
    at_N = np.arange(len(sizes_N)) // audit
    block_A = block_N[::audit]
    second = -(-EPOCH // audit)  # the first audit after an epoch
    test, grid_G, steps_GP = _test_and_steps(noise)
    index_N = np.searchsorted(grid_G[1:], residual_N)
    sums_AP = steps_GP[index_N].reshape(audits, audit, -1).sum(axis=1)
    tests = [
        _Test(test, math.log(error_share(number)), begins, sums_AP[begins:])
        for number, begins in ((1, 0), (2, second))
        if begins < audits
    ]
    aside_AP = np.zeros_like(sums_AP)
    uncredited_N = np.zeros(len(sizes_N), dtype=np.bool_)
    pools: list[FaultyPool | None] = []
    begins = 0
    fault = None
    convicted = math.inf
    for end in sorted({*range(looks, audits, looks), *range(second, audits, second), audits}):
        is_complete = end - begins >= second
        # Within a pool, its places matter only where the evidence convicts without them.
        if not (is_complete or end == audits):
            aside_AP[begins:end] = 0.0
            if not any(one.stands(block_A, aside_AP, end, begins) for one in tests):
                continue
        pool = slice(begins * audit, end * audit)
        if len(sizes_N[pool]) >= PLACES:
            found = stats.place_test(
                sizes_N[pool], position_N[pool], batch_size=BATCH, honest_size=1.0
            )
            aside = np.flatnonzero(found.set_aside) + pool.start
            aside_AP[begins:end] = 0.0
            np.add.at(aside_AP, at_N[aside], steps_GP[index_N[aside]])
            is_accused = any(one.accuses(end) for one in tests)
            is_fault = found.faulty or (is_accused and found.suspected)
            fault = found.bad_places if is_fault else None
            if any(one.stands(block_A, aside_AP, end, begins) for one in tests):
                convicted = end
        uncredited_N[pool] = False if fault is None else fault.contain(position_N[pool])
        if is_complete:
            blocks = frozenset(map(str, np.unique(block_N[pool])))
            pools.append(None if fault is None else FaultyPool(fault, blocks))
            convicted = end if count_strikes(pools) >= STRIKES else convicted
            begins = end
        if convicted < math.inf:
            break
    paid_N = ~uncredited_N & (convicted == math.inf)
    return LifeResult(
        convicted=convicted,
        suspected=min(one.begins + _first(one.suspicion) for one in tests),
        faulty=fault is not None,
        paid=int(paid_N.sum()),
        paid_cheap=int((paid_N & cheap_N).sum()),
        nonces=len(sizes_N),
        cheap=int(cheap_N.sum()),
        honest=_first(tests[0].excludes),
    )


def _first(is_so_A: BoolArray) -> float:
    """Return after how many audits something is so; infinite for never."""
    return int(np.argmax(is_so_A)) + 1 if is_so_A.any() else math.inf


def draw_sizes(law: stats.NoiseLaw, count: int, rng: Rng) -> FloatArray:
    """Return residuals of a law, without sign."""
    grid = np.geomspace(law.size * 1e-4, law.size * 1e6, 4001)
    return np.interp(rng.random(count), 1 - law.survival(grid), grid)


@dataclass(frozen=True)
class Strategy:
    """How a cheat chooses its cheap nonces, and how far off these are.

    Args:
        way: Name of the way, a key of `WAYS`, or one of a time with `AT_PLACES` after it.
        share: Share of cheap nonces that it aims at.
        multiple: Factor of honest noise in a cheap nonce.
        more: Numbers of the way: places, blocks, audits or copies.
    """

    way: str
    share: float
    multiple: float
    more: tuple[int, ...] = ()


def _chances(strategy: Strategy, at_N: IntArray, position_N: IntArray) -> FloatArray:
    """Return the chance of each nonce to be cheap, [N], by its audit and place."""
    way = strategy.way.removesuffix(AT_PLACES)
    if "places" in way:
        return _chances_of_places(strategy, at_N, position_N)
    is_time_N = np.ones(len(at_N), dtype=np.bool_)
    if way == "late":  # honest for so many audits first
        is_time_N = at_N >= strategy.more[0]
    elif way in ("early", "one block"):
        is_time_N = at_N < strategy.more[0]
    elif way in ("bursts", "restarts", "kinds"):  # so many audits of every `period`
        length, period = strategy.more[:2]
        is_time_N = at_N % period < length
    if way != strategy.way:
        run, modulus = strategy.more[-2:]
        is_time_N &= position_N % modulus < run
    return is_time_N * min(1.0, strategy.share / float(is_time_N.mean()))


def _chances_of_places(strategy: Strategy, at_N: IntArray, position_N: IntArray) -> FloatArray:
    """Return the chance of each nonce to be cheap where lies depend on the place, [N]."""
    share = strategy.share
    if strategy.way == "scattered places":  # no run of neighbours
        modulus, seed = strategy.more
        order = np.random.default_rng(seed).permutation(modulus)
        chosen = order[: max(1, round(share * modulus))]
        return np.isin(position_N % modulus, chosen).astype(np.float64)
    run, modulus = strategy.more[:2]
    start_N = np.zeros(len(at_N), dtype=np.int64)
    if strategy.way == "places that move":
        start_N = (at_N // strategy.more[2]) * run
    at_place_N = (position_N - start_N) % modulus < run
    chance = min(1.0, share * modulus / run)
    chance_N = np.full(len(at_N), chance)
    if strategy.way == "places for a time":  # a part of every pool, so that the median stays honest
        chance_N = (at_N % POOL < POOL * chance).astype(np.float64)
    if strategy.way == "behind places":
        # All of the places in the first audits of a pool make them suspect, so that fewer lies
        # there follow, after so many honest audits.
        pledge, first = strategy.more[2:]
        chance_N = np.where(at_N % POOL < pledge, 1.0, chance) * (at_N >= first)
    return np.where(at_place_N, chance_N, 0.0)


def live(
    strategy: Strategy,
    noise: Noise,
    rng: Rng,
    *,
    audits: int = 100,
    audit: int = 16,
    looks: int = LOOKS,
    truth: stats.NoiseLaw | None = None,
) -> LifeResult:
    """Return what one account gains by a strategy, within so many audits."""
    count = audits * audit
    at_N = np.arange(count) // audit
    start_N = 4096 * at_N
    block_N = at_N
    way = strategy.way.removesuffix(AT_PLACES)
    if way == "restarts":  # its sequence begins anew
        start_N = 4096 * (at_N % strategy.more[1])
    elif way == "blocks":  # each of so many audits
        block_N = at_N // strategy.more[0]
    elif way == "one block":
        block_N = np.where(at_N < strategy.more[0], 0, at_N)
    elif way == "behind places":  # the first audits of a pool are one block
        block_N = np.where(at_N % POOL < strategy.more[2], -1 - at_N // POOL, at_N)
    drawn = [np.sort(rng.choice(4096, audit, replace=False)) for _ in range(audits)]
    position_N = start_N + np.concatenate(drawn)
    cheap_N = rng.random(count) < _chances(strategy, at_N, position_N)
    if way == "blocks":
        cheap_N = (rng.random(block_N.max() + 1) < strategy.share)[block_N]
    elif way == "copies":
        # A nonce is drawn once, however many messages have it, so copies of honest ones draw none.
        handed_in = np.arange(HANDED_IN) < round(strategy.share * HANDED_IN)
        drawn = [rng.choice(handed_in, audit, replace=False) for _ in range(audits)]
        cheap_N = np.concatenate(drawn)
    honest_N = draw_sizes(truth or noise.law, count, rng) * math.exp(
        noise.spread.sd * rng.standard_t(noise.spread.dof)
    )
    multiple_N = np.full(count, strategy.multiple)
    if way == "few far off":  # a few invented, and the others hardly off
        multiple_N = np.where(rng.random(count) < 0.1, 1000.0, strategy.multiple)
    residual_N = np.minimum(np.where(cheap_N, multiple_N * honest_N, honest_N), 2.0)
    return run_life(noise, residual_N, position_N, block_N, cheap_N, audit=audit, looks=looks)


def paid_share(strategy: Strategy, results: Sequence[LifeResult]) -> FloatArray:
    """Return the share of the nonces of each life that were cheap and are paid, [R].

    Of a key that is given up at the first suspicion, what was paid before it: nothing, where the
    life was not honest by then, because undecided work is held back.
    """
    if strategy.way != "keys":
        return np.array([one.paid_cheap / one.nonces for one in results])
    return np.array([(one.honest < one.suspected) * one.cheap / one.nonces for one in results])
