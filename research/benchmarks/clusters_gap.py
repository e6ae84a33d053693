"""What a rule loses to the oracle on cheats at 1.4 times the honest median: the many alternatives, or the law?

On published sets of nonce vectors, with one machine left out, as in `assay research clusters`. Between our rule and the
oracle stand rules that know more than ours: the cheat (its law is the only alternative), the honest law of this very
pair of machines (no spread), or both. Variants that spread their weight otherwise are judged beside them.

    python benchmarks/clusters_gap.py DATA -o benchmarks/results/clusters_gap.json
"""

import math
from collections import defaultdict
from pathlib import Path

import numpy as np
from _clusters import left_out
from _common import note, parser, publish
from one_nonce import CANDIDATES, Factors

from assay.poc.verdict import Noise, sequential_test
from assay.research.clusters import Oracle
from assay.research.clusters import _cheats as cheats
from assay.research.clusters._folds import CHEAT_AUDITS, CHECKED, LEAST_AUDITS
from assay.research.clusters._rules import ALPHA, BETA, fit
from assay.stats import Spread
from assay.stats._sums import log_sum

SOON = (60, 300)
LONGEST = 12  # nonces at which real cheats are looked at, one by one
OURS, NO_SPREAD = "ours", "ours, without spread"
CHEAT_KNOWN, PAIR_KNOWN, BOTH_KNOWN, ORACLE = "cheat known", "pair known", "both laws known", "oracle"
EFFECT_FIRST, FINER = "half of the weight on the effect", "multiples a factor of 1.41 apart"


class Known:
    """The ratio of one cheat's law to the average of an honest one over the scale of a machine."""

    def __init__(self, law, spread, cheat):
        self.law, self.cheat = law, cheat
        self.scales, weights = spread.fine if spread else (np.ones(1), np.ones(1))
        self.log_weights = np.log(weights)

    def accused(self, values_RC):
        """Return whether each audit accuses after each nonce, [R, C]."""
        size_RC = self.law.magnitudes(values_RC).reshape(values_RC.shape)
        cheat_RC = self.cheat.log_density(size_RC, 1.0).cumsum(axis=1)
        honest = [self.law.log_density(size_RC, float(scale)).cumsum(axis=1) for scale in self.scales]
        path_RC = cheat_RC - log_sum(np.stack(honest, axis=-1) + self.log_weights)
        return np.maximum.accumulate(path_RC, axis=1) >= -math.log(ALPHA)


class Ours:
    """Our test, with a bound on what one nonce says, or with other weights."""

    def __init__(self, law, spread, effect, bound="none", variant=""):
        self.test, self.bound = sequential_test(Noise(law, "", spread, effect), alpha=ALPHA, beta=BETA), bound
        if variant == FINER:
            near = self.test._multiples_M
            self._weighted(np.unique(np.concatenate([near, np.sqrt(near[:-1] * near[1:])])))
        elif variant == EFFECT_FIRST:
            weights_PM = np.exp(self.test._log_cheat_K).reshape(-1, self.test._multiples_M.size)
            whole = weights_PM[-1].sum()
            weights_PM[-1] = whole / 2 / (weights_PM.shape[1] - 1)
            weights_PM[-1][0] = whole / 2
            self.test._log_cheat_K = np.log(weights_PM.ravel())

    def _weighted(self, multiples):
        test, before = self.test, self.test._multiples_M.size
        weights_P = np.exp(test._log_cheat_K).reshape(-1, before).sum(axis=1)
        test._multiples_M = multiples
        test._log_cheat_K = np.log(np.repeat(weights_P / multiples.size, multiples.size))
        test._columns = np.cumsum([test._honest_H.size, test._scales_J.size * test._log_cheat_K.size])

    def accused_within(self, values_RC, counts):
        """Return the share of the audits accused within each number of nonces."""
        values_U, index = np.unique(values_RC, return_inverse=True)
        factors, index_RC = Factors(self.test, values_U), index.reshape(values_RC.shape)
        return [factors.accused(self.bound, index_RC[:, :count]).mean() for count in counts]


def within(rule, values_RC, counts):
    """Return the share of the audits accused within each number of nonces."""
    if isinstance(rule, Ours):
        return rule.accused_within(values_RC, counts)
    accused_RC = rule.simulated(values_RC)[0] if isinstance(rule, Oracle) else rule.accused(values_RC)
    return [accused_RC[:, min(count, accused_RC.shape[1]) - 1].mean() for count in counts]


def variants(law, spread, effect):
    """Return the rules that could be adopted: they know neither the cheat nor the pair."""
    bounded = {f"candidate {bound}": Ours(law, spread, effect, bound) for bound in CANDIDATES if bound != "none"}
    changed = {variant: Ours(law, spread, effect, variant=variant) for variant in (EFFECT_FIRST, FINER)}
    return {OURS: Ours(law, spread, effect), **changed, **bounded}


def measured(without, tallies):
    """Add what each rule says under the law of the machines that are not left out."""
    fold, spread, effect, rng = without.fold, without.noise.spread, without.effect, without.rng
    build, machine = fold.build, fold.machine
    mine = {rows: errors_N for rows, errors_N in build.distances.items() if machine in rows and errors_N.any()}
    audits = max(fold.audits, -(-LEAST_AUDITS // (2 * len(build.pairs))))
    for rows, honest_N in mine.items():
        judge = rows[0] if rows[1] == machine else rows[1]
        law, pair = without.law(build.kinds[machine], judge), fit(honest_N).estimate
        rules = variants(law, spread, effect)
        rules |= {NO_SPREAD: Ours(law, Spread(), effect), PAIR_KNOWN: Ours(pair, Spread(), effect)}
        values_RC = cheats.drawn(rng, honest_N, audits, min(CHECKED, honest_N.size))
        for name, rule in rules.items():
            tallies[build.name, "honest", name].append(within(rule, values_RC, SOON))
        for cheat in cheats.simulated(honest_N, fold._usual(judge), fold.others | fold._named(judge), rng):
            known = fit(cheat.pool).estimate
            truth = {CHEAT_KNOWN: Known(law, spread, known), BOTH_KNOWN: Known(pair, None, known)}
            truth[ORACLE] = Oracle(honest_N, cheat.pool)
            values_RC = cheat.audits(rng, CHEAT_AUDITS, min(CHECKED, honest_N.size))
            for name, rule in (rules | truth).items():
                tallies[build.name, cheat.name, name].append(within(rule, values_RC, SOON))
    for judge, model, kind, _, values_RC in without.real_cheats(CHEAT_AUDITS, LONGEST):
        for name, rule in variants(without.law(kind, judge), spread, effect).items():
            found = within(rule, values_RC, range(1, LONGEST + 1))
            tallies[build.name, f"real: {model}", name].append(found)


def main():
    arguments = parser(__doc__)
    arguments.add_argument("data", type=Path, help="file of sets of nonce vectors")
    arguments.add_argument("--audits", type=int, default=200, help="least number of honest audits of every pair")
    arguments.add_argument("--seed", type=int, default=0)
    options = arguments.parse_args()
    tallies = defaultdict(list)
    for without in left_out(options.data, options.audits, options.seed):
        measured(without, tallies)
    rows = []
    for (build, cheat, rule), shares in tallies.items():
        row = {"build": build, "cheat": cheat, "rule": rule, "pairs": len(shares)}
        row["accused"] = np.mean(shares, axis=0).tolist()
        if cheat == "honest":
            row["worst_pair"] = float(np.max(shares, axis=0)[-1])
        rows.append(row)
        note(str(row))
    publish(
        "clusters_gap", {"seed": options.seed, "within": SOON, "real_within": LONGEST, "rows": rows}, options.output
    )


if __name__ == "__main__":
    main()
