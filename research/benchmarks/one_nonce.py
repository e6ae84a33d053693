r"""Would a bound on what one nonce may say keep heavy honest nonces from accusing, and what would it cost?

The ratio of every cheat to honest noise is cut at a bound for each nonce, or the largest residual is left out
(docs/decisions/shares-and-verdicts.md has the candidates and the criteria, which were fixed before). Residuals are
those that `benchmarks/shares.py --residuals` writes. A law is fitted to nonces of one block and judges audits of
others, as there. Besides, lives are measured: an audit of 16 nonces in each of the other blocks, one after the other.

    python benchmarks/shares.py --device cuda --laws 6 --residuals residuals.npz
    python benchmarks/one_nonce.py residuals.npz --candidates none F --seed 2
"""

import itertools
import math
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numba
import numpy as np
from _common import note, parser, publish
from scipy import special
from shares import ALPHA, AUDITED, CHEATS, DTYPES, LAW_SIZES, MODELS, PRESETS, WITHIN, name_of, noise_of, read_residuals

from assay import stats
from assay.poc.verdict import sequential_test
from assay.research.simulation._lives import _multiply
from assay.stats._sequential import SHARES

ROOT = math.sqrt(1 / ALPHA)
BOUNDS = {"none": (math.inf, 0.0), "A": (ROOT, 0.1), "B": (ROOT, 1.0), "C": (1 / ALPHA, 1.0), "D": (ROOT, 0.05)}
"""Bound on the ratio of one nonce, and the share of invented values among the residuals for which it holds."""

LEFT_OUT, CANDIDATES = "F", (*BOUNDS, "F")
"""The candidate that leaves the largest residual out, and all of them."""

HEAVY, HEAVY_SHARE = 45.0, 1 / 8  # a heavy nonce over the median, and the share of the audits that it is in
CHEAT_BLOCKS, CHEAT_AUDITS, HEAVY_AUDITS = 4, 200, 100
SEEN_HEAVY = 20.0  # times the median: a block with such a nonce needs none that is put in
SUSPECT, AGAIN = 0.005, 10_000  # a pair accused in so many audits is measured again, with so many others
LIVES, LIFE_AUDIT = 400, 16  # lives under a law, and nonces of each of their audits
JUNKED, JUNK_SHARE, JUNK_LIVES = 300, 0.02, 2000


def invented_below(law, share):
    """Return the residual that this share of invented values does not reach."""
    if share == 1.0:
        return math.inf
    if isinstance(law, stats.ScaleNoise):
        return law.junk_sigma * math.sqrt(2) * special.erfinv(share)
    grid = np.linspace(0, 2, 4001)
    return float(np.interp(share, stats.chord_cdf(grid, law.dimension), grid))


class Factors:
    """What each of some values [U] multiplies the paths of a test's e-value by, with and without a bound."""

    def __init__(self, test, values_U):
        self.test = test
        size_U = test.law.magnitudes(values_U)
        order = np.argsort(size_U)
        self.place_U = np.argsort(order)
        size_U = self.size_U = size_U[order]
        own_UJ = [test.law.log_density(size_U, float(scale)) for scale in test._scales_J]
        base_U = test.law.log_density(size_U, 1.0)
        log_UP = test._steps(size_U)
        self.honest = test._honest_H.size
        self.log_UP = log_UP
        repeats = len(SHARES) * test._multiples_M.size
        # What the honest path of the same scale gains: the ratio that is bounded is the one over it.
        self.own_UP = np.repeat(np.stack(own_UJ, axis=1) - base_U[:, None], repeats, axis=1)
        self.prior = np.exp(test._prior())
        self.invented = int(np.searchsorted(size_U, invented_below(test.law, 0.1)))

    def accused(self, bound, index_RC):
        """Return whether each node is accused whose values are these, [R]."""
        most, share = BOUNDS["none" if bound == LEFT_OUT else bound]
        log_UP = self.log_UP.copy()
        if most < math.inf:
            limit_U = np.where(self.size_U < invented_below(self.test.law, share), math.log(most), math.inf)
            log_UP[:, self.honest :] = np.minimum(log_UP[:, self.honest :], self.own_UP + limit_U[:, None])
        factor_UP = np.exp(np.clip(log_UP, -80, 80)).astype(np.float32)
        accused_R = np.zeros(len(index_RC), dtype=bool)
        path_RP = np.tile(self.prior, (len(index_RC), 1))
        last_R, place_RC, level = np.full(len(index_RC), self.prior.size), self.place_U[index_RC], 1 / self.test.alpha
        if bound == LEFT_OUT:
            without_largest(path_RP, factor_UP, place_RC, self.honest, self.invented, level, accused_R)
        else:
            _multiply(path_RP, last_R, factor_UP, place_RC, self.honest, level, accused_R)
        return accused_R


@numba.njit(fastmath={"reassoc", "contract", "nsz"})
def ratio_without(path, factors, honest):
    """Return the e-value of the paths of a node without the residual that has these factors."""
    for_honest, for_cheats = 0.0, 0.0
    for p in range(honest):
        for_honest += path[p] / factors[p]
    for p in range(honest, path.size):
        for_cheats += path[p] / factors[p]
    return for_cheats / for_honest


@numba.njit(fastmath={"reassoc", "contract", "nsz"})
def without_largest(path_RP, factor_UP, place_RC, honest, invented, level, accused_R):
    """Accuse every node whose e-value reaches the level, and its root without the largest residual.

    Places are in the order of sizes; from ``invented`` on the largest is not left out.
    """
    none = np.ones_like(factor_UP[0])
    for r in range(len(path_RP)):
        path, largest = path_RP[r], 0
        for place in place_RC[r]:
            largest = max(largest, place)
            path *= factor_UP[place]
            if ratio_without(path, none, honest) >= level and (
                largest >= invented or ratio_without(path, factor_UP[largest], honest) >= math.sqrt(level)
            ):
                accused_R[r] = True
                break


def drawn(rng, pool, audits, length):
    """Return indices of audits without replacement, [R, C]."""
    return rng.permuted(np.tile(np.arange(pool), (audits, 1)), axis=1)[:, :length]


def plain(preset, errors_N):
    """Return the test under the law of these nonces."""
    return sequential_test(noise_of(preset, errors_N), alpha=ALPHA)


def honest(test, errors_N, rng, options, factors_of=Factors):
    """Return the shares of a block's honest audits that are accused, by candidate: as they are, with a heavy nonce."""
    median = np.median(np.abs(errors_N))
    factors = factors_of(test, np.append(errors_N, HEAVY * median))
    audits, candidates = options.audits, options.candidates
    index_RC = drawn(rng, errors_N.size, audits, AUDITED)
    suspects_RC = index_RC[factors.accused("none", index_RC)]  # no candidate accuses any other
    share = {bound: factors.accused(bound, suspects_RC).sum() / audits for bound in candidates}
    if max(share.values()) >= SUSPECT:
        index_RC = drawn(rng, errors_N.size, AGAIN, AUDITED)
        suspects_RC = index_RC[factors.accused("none", index_RC)]
        again = {bound: factors.accused(bound, suspects_RC).sum() / AGAIN for bound in candidates}
        share = {bound: again[bound] if share[bound] >= SUSPECT else share[bound] for bound in candidates}
    if np.abs(errors_N).max() >= SEEN_HEAVY * median:
        return share, None
    heavy_RC = drawn(rng, errors_N.size, HEAVY_AUDITS, AUDITED)
    heavy_RC[np.arange(HEAVY_AUDITS), rng.integers(AUDITED, size=HEAVY_AUDITS)] = errors_N.size
    found = {bound: factors.accused(bound, heavy_RC).mean() for bound in candidates}
    return share, {bound: HEAVY_SHARE * found[bound] + (1 - HEAVY_SHARE) * share[bound] for bound in candidates}


def lived(test, blocks, others, rng, candidates, factors_of=Factors):
    """Return the shares of honest lives convicted that are audited in every other block once, by candidate."""
    least = min(blocks[block].size for block in others)
    factors = factors_of(test, np.concatenate([blocks[block][:least] for block in others]))
    order_RB = rng.permuted(np.tile(np.arange(len(others)), (LIVES, 1)), axis=1)
    audits = [drawn(rng, least, LIVES, LIFE_AUDIT) + least * order_RB[:, [n]] for n in range(len(others))]
    index_RC = np.concatenate(audits, axis=1)
    return {bound: factors.accused(bound, index_RC).mean() for bound in candidates}


def judged(blocks, preset, size, options, tested=plain, factors_of=Factors):
    """Return the figures of one preset, format and size of the law, by candidate.

    Args:
        blocks: Residuals of every block, [N] each.
        preset: Preset that they are of.
        size: Nonces that a law is fitted to.
        options: Settings of the command line.
        tested: Function of preset and residuals that returns the test under their law.
        factors_of: Class that says which nodes each candidate accuses.
    """
    rng = np.random.default_rng(options.seed)
    candidates, count = options.candidates, len(blocks)
    accused, heavy, lives = ({bound: [] for bound in candidates} for _ in range(3))
    caught = {bound: {cheat: [] for cheat in CHEATS} for bound in candidates}
    for law in range(options.laws):
        test = tested(preset, blocks[law][:size])
        others = [block for block in range(count) if block != law]
        for block in others:
            share, with_heavy = honest(test, blocks[block], rng, options, factors_of)
            for bound in candidates:
                accused[bound].append(share[bound])
                heavy[bound] += [with_heavy[bound]] if with_heavy else []
        for bound, found in lived(test, blocks, others, rng, candidates, factors_of).items():
            lives[bound].append(found)
        for block in rng.permutation(others)[:CHEAT_BLOCKS]:
            errors_N = blocks[block]
            for share, multiple in CHEATS:
                factors = factors_of(test, np.concatenate([errors_N, multiple * errors_N]))
                honest_RC, larger_RC = (drawn(rng, errors_N.size, CHEAT_AUDITS, WITHIN) for _ in range(2))
                cheats_RC = np.where(rng.random(honest_RC.shape) < share, larger_RC + errors_N.size, honest_RC)
                for bound in candidates:
                    caught[bound][share, multiple].append(factors.accused(bound, cheats_RC).mean())
    return {
        bound: {
            "accused": float(np.mean(accused[bound])),
            "accused_worst_pair": float(np.max(accused[bound])),
            "with_heavy_worst_pair": float(np.max(heavy[bound])) if heavy[bound] else None,
            "lives_convicted": float(np.mean(lives[bound])),
            "cheats": [[*cheat, float(np.mean(found))] for cheat, found in caught[bound].items()],
        }
        for bound in candidates
    }


def invented(rng, candidates):
    """Return the share of nodes caught that invent 2 % of 300 nonces, by law and bound."""
    laws = {f"distances, sigma {sigma:g}": (stats.ScaleNoise(sigma), 4.0) for sigma in (1e-5, 1e-4, 5e-4)}
    laws |= {"vectors, 0.07": (stats.LogNoise(math.log(0.07), 0.5), 2.0)}
    laws |= {"vectors, 0.005": (stats.LogNoise(math.log(0.005), 0.3, tail=1.5), 2.0)}
    rows = []
    for name, (law, effect) in laws.items():
        shape = (JUNK_LIVES, JUNKED)
        if isinstance(law, stats.ScaleNoise):
            honest_RC = np.abs(rng.standard_t(law.dof, shape)) * law.sigma
            junk_RC = np.abs(rng.normal(0, law.junk_sigma, shape))
        else:
            grid = np.exp(np.linspace(law.mu - 9 * law.sd, math.log(2.0), 20_000))
            honest_RC = np.interp(-rng.uniform(size=shape), -law.survival(grid), grid)
            junk_RC = 2 * np.sqrt(rng.beta(*[(law.dimension - 1) / 2] * 2, shape))
        values_RC = np.where(rng.random(shape) < JUNK_SHARE, junk_RC, honest_RC)
        test = stats.SequentialTest(law, alpha=ALPHA, effect=effect)
        found = dict.fromkeys(candidates, 0)
        for part_RC in np.array_split(values_RC, 20):
            values_U, index = np.unique(part_RC, return_inverse=True)
            factors = Factors(test, values_U)
            for bound in candidates:
                found[bound] += int(factors.accused(bound, index.reshape(part_RC.shape)).sum())
        rows.append({"law": name, **{bound: number / JUNK_LIVES for bound, number in found.items()}})
        note(str(rows[-1]))
    return rows


def row_of(kept, options, task, **judge):
    """Return the figures of one model, preset, format and size of the law."""
    model, preset, dtype, size = task
    blocks = [kept[name_of(model, preset, dtype, block)] for block in range(options.blocks)]
    heaviest = sorted((float(np.abs(x).max() / np.median(np.abs(x))) for x in blocks), reverse=True)
    row = {"model": model, "preset": preset, "dtype": dtype, "law_from": size, "heaviest": heaviest[:3]}
    return row | {"candidates": judged(blocks, preset, size, options, **judge)}


def main():
    arguments = parser(__doc__)
    arguments.add_argument("residuals", type=Path, help="file that benchmarks/shares.py wrote")
    arguments.add_argument("--models", nargs="+", default=MODELS)
    arguments.add_argument("--presets", nargs="+", default=PRESETS)
    arguments.add_argument("--dtypes", nargs="+", default=DTYPES)
    arguments.add_argument("--candidates", nargs="+", default=CANDIDATES, choices=CANDIDATES)
    arguments.add_argument("--blocks", type=int, default=40)
    arguments.add_argument("--seed", type=int, default=0, help="seed of everything that is drawn")
    arguments.add_argument("--laws", type=int, default=6, help="blocks that a law is fitted to")
    arguments.add_argument("--audits", type=int, default=1000, help="audits of every pair of blocks")
    arguments.add_argument("--workers", type=int, default=2)
    options = arguments.parse_args()
    junk = invented(np.random.default_rng(options.seed), options.candidates)
    kept = read_residuals(options.residuals)
    tasks = list(itertools.product(options.models, options.presets, options.dtypes, LAW_SIZES))
    rows = []
    with ProcessPoolExecutor(options.workers, mp_context=get_context("forkserver")) as pool:
        for row in pool.map(partial(row_of, kept, options), tasks):
            rows.append(row)
            model = f"{row['model']} {row['preset']} {row['dtype']}"
            note(f"{model}, law from {row['law_from']}, heaviest {row['heaviest'][0]:.0f}")
            for bound, found in row["candidates"].items():
                note(f"  {bound:5}{found}")
    settings = {"seed": options.seed, "blocks": options.blocks, "laws": options.laws, "audits": options.audits}
    publish("one_nonce", settings | {"invented": junk, "rows": rows}, options.output)


if __name__ == "__main__":
    main()
