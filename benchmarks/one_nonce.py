r"""Would a bound on what one nonce may say keep heavy honest nonces from accusing, and what would it cost?

The ratio of every cheat to honest noise is cut at a bound for each nonce, or the largest residual is left out
(docs/decisions/shares-and-verdicts.md has the candidates and the criterion, which were fixed before). Residuals are
those that `benchmarks/shares.py --residuals` writes. A law is fitted to nonces of one block and judges audits of
others, as there.

    python benchmarks/shares.py --models reference:llama reference:qwen3 --presets hardened --dtypes bfloat16 \
        --seq-len 32 --laws 3 --audits 1 --workers 1 --residuals residuals.npz
    python benchmarks/one_nonce.py residuals.npz --presets hardened --dtypes bfloat16 --laws 3 --seed 1
"""

import itertools
import math
from pathlib import Path

import numpy as np
from _common import note, parser, publish
from scipy import special
from shares import ALPHA, AUDITED, CHEATS, DTYPES, LAW_SIZES, MODELS, PRESETS, WITHIN, noise_of

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
JUNKED, JUNK_SHARE, LIVES = 300, 0.02, 2000


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
        size_U = self.size_U = test.law.magnitudes(values_U)
        own_UJ = [test.law.log_density(size_U, float(scale)) for scale in test._scales_J]
        base_U = test.law.log_density(size_U, 1.0)
        log_UP = test._steps(size_U)
        self.honest = test._honest_H.size
        self.log_UP = log_UP
        repeats = len(SHARES) * test._multiples_M.size
        # What the honest path of the same scale gains: the ratio that is bounded is the one over it.
        self.own_UP = np.repeat(np.stack(own_UJ, axis=1) - base_U[:, None], repeats, axis=1)
        self.prior = np.exp(test._prior())

    def accused(self, bound, index_RC):
        """Return whether each node is accused whose values are these, [R]."""
        if bound == LEFT_OUT:
            accused_R = self.accused("none", index_RC)
            accused_R[accused_R] = [self._without_largest(index_C) for index_C in index_RC[accused_R]]
            return accused_R
        most, share = BOUNDS[bound]
        log_UP = self.log_UP.copy()
        if most < math.inf:
            limit_U = np.where(self.size_U < invented_below(self.test.law, share), math.log(most), math.inf)
            log_UP[:, self.honest :] = np.minimum(log_UP[:, self.honest :], self.own_UP + limit_U[:, None])
        factor_UP = np.exp(np.clip(log_UP, -80, 80)).astype(np.float32)
        accused_R = np.zeros(len(index_RC), dtype=bool)
        path_RP = np.tile(self.prior, (len(index_RC), 1))
        last_R = np.full(len(index_RC), self.prior.size)
        _multiply(path_RP, last_R, factor_UP, index_RC, self.honest, 1 / self.test.alpha, accused_R)
        return accused_R

    def _without_largest(self, index_C):
        """Return whether a node is accused also without its largest residual, where that does not look invented."""
        steps_CP, size_C = self.log_UP[index_C], self.size_U[index_C]
        path_CP = self.test._prior() + steps_CP.cumsum(axis=0)
        largest_C = np.maximum.accumulate(size_C)
        invented = invented_below(self.test.law, 0.1)
        for n in np.flatnonzero(self.test._log_e(path_CP) >= -math.log(ALPHA)):
            largest = int(np.argmax(size_C[: n + 1]))
            if largest_C[n] >= invented or self.test._log_e(path_CP[n] - steps_CP[largest]) >= math.log(ROOT):
                return True
        return False


def drawn(rng, pool, audits, length):
    """Return indices of audits without replacement, [R, C]."""
    return rng.permuted(np.tile(np.arange(pool), (audits, 1)), axis=1)[:, :length]


def judged(blocks, preset, size, options):
    """Return the figures of one preset, format and size of the law, by bound."""
    rng = np.random.default_rng(options.seed)
    laws, count = options.laws, len(blocks)
    accused = {bound: np.full((laws, count), np.nan) for bound in CANDIDATES}
    heavy, caught = (
        {bound: [] for bound in CANDIDATES},
        {bound: {cheat: [] for cheat in CHEATS} for bound in CANDIDATES},
    )
    for law in range(laws):
        test = sequential_test(noise_of(preset, blocks[law][:size]), alpha=ALPHA)
        others = [block for block in range(count) if block != law]
        for block in others:
            errors_N = blocks[block]
            factors = Factors(test, np.append(errors_N, HEAVY * np.median(np.abs(errors_N))))
            index_RC = drawn(rng, errors_N.size, options.audits, AUDITED)
            suspects_RC = index_RC[factors.accused("none", index_RC)]  # no candidate accuses any other
            with_heavy_RC = drawn(rng, errors_N.size, HEAVY_AUDITS, AUDITED)
            with_heavy_RC[np.arange(HEAVY_AUDITS), rng.integers(AUDITED, size=HEAVY_AUDITS)] = errors_N.size
            for bound in CANDIDATES:
                share = factors.accused(bound, suspects_RC).sum() / options.audits
                accused[bound][law, block] = share
                found = factors.accused(bound, with_heavy_RC).mean()
                heavy[bound].append(HEAVY_SHARE * found + (1 - HEAVY_SHARE) * share)
        for block in rng.permutation(others)[:CHEAT_BLOCKS]:
            errors_N = blocks[block]
            for share, multiple in CHEATS:
                factors = Factors(test, np.concatenate([errors_N, multiple * errors_N]))
                honest_RC, larger_RC = (drawn(rng, errors_N.size, CHEAT_AUDITS, WITHIN) for _ in range(2))
                cheats_RC = np.where(rng.random(honest_RC.shape) < share, larger_RC + errors_N.size, honest_RC)
                for bound in CANDIDATES:
                    caught[bound][share, multiple].append(factors.accused(bound, cheats_RC).mean())
    return {
        bound: {
            "accused": float(np.nanmean(accused[bound])),
            "accused_worst_pair": float(np.nanmax(accused[bound])),
            "with_heavy_worst_pair": float(np.max(heavy[bound])),
            "cheats": [[*cheat, float(np.mean(found))] for cheat, found in caught[bound].items()],
        }
        for bound in CANDIDATES
    }


def invented(rng):
    """Return the share of nodes caught that invent 2 % of 300 nonces, by law and bound."""
    laws = {f"distances, sigma {sigma:g}": (stats.ScaleNoise(sigma), 4.0) for sigma in (1e-5, 1e-4, 5e-4)}
    laws |= {"vectors, 0.07": (stats.LogNoise(math.log(0.07), 0.5), 2.0)}
    laws |= {"vectors, 0.005": (stats.LogNoise(math.log(0.005), 0.3, tail=1.5), 2.0)}
    rows = []
    for name, (law, effect) in laws.items():
        shape = (LIVES, JUNKED)
        if isinstance(law, stats.ScaleNoise):
            honest_RC = np.abs(rng.standard_t(law.dof, shape)) * law.sigma
            junk_RC = np.abs(rng.normal(0, law.junk_sigma, shape))
        else:
            grid = np.exp(np.linspace(law.mu - 9 * law.sd, math.log(2.0), 20_000))
            honest_RC = np.interp(-rng.uniform(size=shape), -law.survival(grid), grid)
            junk_RC = 2 * np.sqrt(rng.beta(*[(law.dimension - 1) / 2] * 2, shape))
        values_RC = np.where(rng.random(shape) < JUNK_SHARE, junk_RC, honest_RC)
        test = stats.SequentialTest(law, alpha=ALPHA, effect=effect)
        found = dict.fromkeys(CANDIDATES, 0)
        for part_RC in np.array_split(values_RC, 20):
            values_U, index = np.unique(part_RC, return_inverse=True)
            factors = Factors(test, values_U)
            for bound in CANDIDATES:
                found[bound] += int(factors.accused(bound, index.reshape(part_RC.shape)).sum())
        rows.append({"law": name, **{bound: number / LIVES for bound, number in found.items()}})
        note(str(rows[-1]))
    return rows


def main():
    arguments = parser(__doc__)
    arguments.add_argument("residuals", type=Path, help="file that benchmarks/shares.py wrote")
    arguments.add_argument("--models", nargs="+", default=MODELS[:2])
    arguments.add_argument("--presets", nargs="+", default=PRESETS)
    arguments.add_argument("--dtypes", nargs="+", default=DTYPES)
    arguments.add_argument("--blocks", type=int, default=40)
    arguments.add_argument("--seed", type=int, default=0, help="seed of everything that is drawn")
    arguments.add_argument("--laws", type=int, default=4, help="blocks that a law is fitted to")
    arguments.add_argument("--audits", type=int, default=1000, help="audits of every pair of blocks")
    options = arguments.parse_args()
    rows = []
    junk = invented(np.random.default_rng(options.seed))
    with np.load(options.residuals) as read:
        kept = {name: read[name].astype(np.float64) for name in read.files}
    for model, preset, dtype in itertools.product(options.models, options.presets, options.dtypes):
        blocks = [kept["|".join(map(str, (model, preset, dtype, block)))] for block in range(options.blocks)]
        heaviest = sorted((float(np.abs(x).max() / np.median(np.abs(x))) for x in blocks), reverse=True)
        for size in LAW_SIZES:
            row = {"model": model, "preset": preset, "dtype": dtype, "law_from": size, "heaviest": heaviest[:3]}
            rows.append(row | {"candidates": judged(blocks, preset, size, options)})
            note(f"{model} {preset} {dtype}, law from {size}, heaviest {heaviest[0]:.0f}")
            for bound, found in rows[-1]["candidates"].items():
                note(f"  {bound:5}{found}")
    settings = {"seed": options.seed, "blocks": options.blocks, "laws": options.laws, "audits": options.audits}
    publish("one_nonce", settings | {"invented": junk, "rows": rows}, options.output)


if __name__ == "__main__":
    main()
