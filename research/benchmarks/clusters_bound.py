"""Which cheats can any rule catch within 60 nonces? The most powerful tests of a fixed number of nonces.

The oracle of docs/networks.md is a sequential likelihood ratio. That needs the fewest nonces on average, but not the
fewest for 99 % of the cheats, so what it misses another rule could catch. No rule that accuses within n nonces catches
more than the most powerful test of n nonces at the same level (Neyman and Pearson): accusing within n nonces is such a
test. Its level here is .001, as for every rule. Four such tests are taken, for every pair of machines and every cheat:

- *pair known*: the law of the pair and that of the cheat are known, as by the oracle;
- *machine unknown*: each law is known but for the scale of the machine, which is drawn once for an audit from the
  spread that our rule grants a machine that was not measured. Both hypotheses are averages over it, so that the level
  holds on average over honest machines, and the power is an average over cheating ones;
- *cheat known*: only the honest machine has an unknown scale. A cheat then lies at exactly 1.4 times the expected
  scale. No rule is told that, so this bound is generous;
- *extreme machines*: the level has to hold for a machine two spreads noisier than expected, and the cheat is made of
  one that is two spreads quieter: the worst case among 95 % of the machines.

The expected scale is the one that the cheat is a multiple of: the median of the pair, or that validator's usual one if
it is larger. Laws are histograms of 16 bins, as the oracle's; for cheats in all nonces the fitted laws of our rule too,
in 64 bins, because few bins lose a little and many would find differences that are chance. Power and level come from
draws of the cheat: what honest audits do beyond a threshold t of the logarithm of the ratio is the mean of exp(-ratio)
over the draws beyond t.

Rule, written before any of these figures was known. They are means over the pairs of a build. Of a cheat within so many
nonces, the page may say that 99 %

- is *out of reach* of every rule that grants a new machine that spread, where "cheat known" stays below .99 under both
  kinds of laws, or under histograms where the cheat has no fitted law;
- is *possible* where "machine unknown" has .99 or more under both;
- is *open* otherwise, and then the page gives the figures.

"The oracle misses that too" is struck where "pair known" has .99 or more. If 99 % within 60 nonces is possible for a
cheat in all nonces of which our rule misses more than 1 %, a rule that bets on the first 60 nonces is looked for next,
under a criterion of its own that is written before it is measured. If it is not possible for any of them, it is not.

"Ours" and "oracle" are measured in the same run, on audits drawn from the nonces without replacement.

    python benchmarks/clusters_bound.py DATA -o benchmarks/results/clusters_bound.json
"""

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from _clusters import left_out
from _common import note, parser, publish
from clusters_gap import ORACLE, OURS, Ours, within

from assay.research.clusters import Oracle
from assay.research.clusters import _cheats as cheats
from assay.research.clusters._folds import CHECKED
from assay.research.clusters._rules import ALPHA, fit
from assay.stats._sums import log_sum

COUNTS = (10, 60, 70, 80, 90, 100, 120, 150, 200, 300)
FEW = COUNTS[:2]  # for cheats of which nothing more is asked
PAIR_KNOWN, UNKNOWN, CHEAT_KNOWN, EXTREME = "pair known", "machine unknown", "cheat known", "extreme machines"
HISTOGRAM, FITTED = "histogram", "fitted"
BINS, FINE_BINS = 16, 64
EXTREMES = 2.0  # spreads
FARTHEST = 2.0  # of two unit vectors


@dataclass(frozen=True)
class Hypothesis:
    """An average of laws of one nonce, of which one is drawn for a whole audit.

    Args:
        shares: Probability of every bin under each law, [H, B].
        weights: Probability of each law, [H].
    """

    shares: np.ndarray
    weights: np.ndarray

    def drawn(self, rng, nonces, draws):
        """Return how many of the nonces of each audit fall into every bin, [draws, B]."""
        each_H = rng.multinomial(draws, self.weights)
        found = [rng.multinomial(nonces, shares_B, n) for shares_B, n in zip(self.shares, each_H, strict=True)]
        return np.concatenate(found)

    def log_likelihood(self, counts_DB):
        """Return the logarithm of the probability of the counts, without the factor that all hypotheses share."""
        return log_sum(counts_DB @ np.log(self.shares).T + np.log(self.weights))


def power(honest, cheat, nonces, draws, rng, level=ALPHA):
    """Return the power of the most powerful test of so many nonces at a level."""
    counts_DB = cheat.drawn(rng, nonces, draws).astype(float)
    ratio_D = np.sort(cheat.log_likelihood(counts_DB) - honest.log_likelihood(counts_DB))[::-1]
    accused_D = np.exp(-ratio_D).cumsum() / draws  # honest audits at and beyond each of the ratios
    return float(np.searchsorted(accused_D, level, side="right") / draws)


class Histograms:
    """Laws of a pair and of a cheat by the shares of their distances in common bins, as the oracle has them.

    Args:
        honest: Honest distances [N] of the pair.
        cheat: Distances [N] of the cheat.
    """

    def __init__(self, honest, cheat):
        self.pools = honest, cheat
        self.edges = np.quantile(np.concatenate([honest, cheat]), np.linspace(0, 1, BINS + 1)[1:-1])

    def shares(self, which, scale):
        """Return the share of every bin [B] in the honest distances (0) or the cheat's (1), so many times larger."""
        values_N = np.minimum(scale * self.pools[which], FARTHEST)
        counts_B = np.bincount(np.searchsorted(self.edges, values_N), minlength=BINS) + 0.5
        return counts_B / counts_B.sum()


class FittedLaws:
    """The laws that our rule fits to the distances of a pair and of a cheat, as shares of many bins."""

    def __init__(self, honest, cheat):
        self.laws = fit(honest).estimate, fit(cheat).estimate
        self.edges = np.quantile(np.concatenate([honest, cheat]), np.linspace(0, 1, FINE_BINS + 1)[1:-1])

    def shares(self, which, scale):
        """Return the share of every bin [B] under the honest law (0) or the cheat's (1), so many times larger."""
        beyond = np.concatenate([[1.0], self.laws[which].scaled(scale).survival(self.edges), [0.0]])
        shares_B = np.maximum(-np.diff(beyond), 1e-12)
        return shares_B / shares_B.sum()


def one_law(laws, which, scale):
    """Return the hypothesis that the scale of the machine is known."""
    return Hypothesis(laws.shares(which, scale)[None], np.ones(1))


def over_machines(laws, which, scale, spread):
    """Return the hypothesis that the scale of the machine lies around one that is expected."""
    factors_H, weights_H = spread.fine
    return Hypothesis(np.stack([laws.shares(which, scale * factor) for factor in factors_H]), weights_H)


def powers(laws, expected, spread, counts, draws, rng):
    """Return the power of each test after each number of nonces.

    Args:
        laws: Laws of the pair and of the cheat.
        expected: Scale that an honest machine is expected at, over that of the pair.
        spread: Law of the scale of a machine over the expected one.
        counts: Numbers of nonces.
        draws: Audits of the cheat that are drawn for each test and number.
        rng: Source of random numbers.
    """
    far = np.exp(EXTREMES * spread.sd)
    pair, cheat = one_law(laws, 0, 1.0), one_law(laws, 1, 1.0)
    machines, cheating = over_machines(laws, 0, expected, spread), over_machines(laws, 1, 1.0, spread)
    tests = {PAIR_KNOWN: (pair, cheat), UNKNOWN: (machines, cheating), CHEAT_KNOWN: (machines, cheat)}
    tests[EXTREME] = one_law(laws, 0, expected * far), one_law(laws, 1, 1 / far)
    return {name: [power(*test, count, draws, rng) for count in counts] for name, test in tests.items()}


def measured(without, options, tallies):
    """Add the power of every test, and what our rule and the oracle catch, without one machine of a build."""
    fold, spread, effect, rng = without.fold, without.noise.spread, without.effect, without.rng
    build, machine = fold.build, fold.machine
    mine = {rows: errors_N for rows, errors_N in build.distances.items() if machine in rows and errors_N.any()}

    def add(cheat, law, honest_N, pool_N, expected, granted, values_RC):
        in_all = cheat.endswith(f"× {cheats.RATIO:g}")
        counts = COUNTS if in_all else FEW
        for name, rule in ((OURS, Ours(law, spread, effect)), (ORACLE, Oracle(honest_N, pool_N))):
            tallies[build.name, cheat, "", name].append(within(rule, values_RC, counts))
        kinds = {HISTOGRAM: Histograms(honest_N, pool_N)} | ({FITTED: FittedLaws(honest_N, pool_N)} if in_all else {})
        for kind, laws in kinds.items():
            for name, found in powers(laws, expected, granted, counts, options.draws, rng).items():
                tallies[build.name, cheat, kind, name].append(found)

    for rows, honest_N in mine.items():
        judge = rows[0] if rows[1] == machine else rows[1]
        law, usual = without.law(build.kinds[machine], judge), fold._usual(judge)
        expected = max(usual / float(np.median(honest_N)), 1.0)
        for cheat in cheats.simulated(honest_N, usual, fold.others | fold._named(judge), rng):
            values_RC = cheat.audits(rng, options.audits, min(CHECKED, honest_N.size))
            add(cheat.name, law, honest_N, cheat.pool, expected, spread, values_RC)
    for judge, model, kind, values_N, values_RC in without.real_cheats(options.audits, max(FEW)):
        known_N = np.concatenate([errors_N for rows, errors_N in build.distances.items() if judge in rows])
        add(f"real: {model}", without.law(kind, judge), known_N, values_N, 1.0, spread, values_RC)


def main():
    arguments = parser(__doc__)
    arguments.add_argument("data", type=Path, help="file of sets of nonce vectors")
    arguments.add_argument("--audits", type=int, default=100, help="audits of every pair and cheat")
    arguments.add_argument("--draws", type=int, default=20_000, help="audits that the power of a test is drawn from")
    arguments.add_argument("--seed", type=int, default=11)
    options = arguments.parse_args()
    tallies = defaultdict(list)
    for without in left_out(options.data, options.audits, options.seed):
        measured(without, options, tallies)
    rows = []
    for (build, cheat, laws, rule), shares in tallies.items():
        counts = COUNTS[: len(shares[0])]
        row = {"build": build, "cheat": cheat, "laws": laws, "rule": rule, "pairs": len(shares), "nonces": counts}
        row |= {"caught": np.mean(shares, axis=0).tolist(), "least": np.min(shares, axis=0).tolist()}
        rows.append(row)
        note(str(row))
    settings = {"seed": options.seed, "audits": options.audits, "draws": options.draws, "level": ALPHA}
    publish("clusters_bound", settings | {"rows": rows}, options.output)


if __name__ == "__main__":
    main()
