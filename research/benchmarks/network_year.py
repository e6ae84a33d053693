"""A year of a network of honest nodes: false convictions that are expected and seen, at several α
of an account.

Each node is checked in 52 audits of 16 nonces, each of another block. Residuals have the law that
judges them, and a machine's scale is drawn once from its spread: no block effect, no fault.
*Suspected*: E reaches 1/α. *Convicted*: by `Life`. E is the likelihood ratio of the cheats to
honest noise, so the chance that an honest node is convicted is the mean of 1/E_τ over lives of the
cheats, τ the audit that convicts. Pass: no expected number exceeds α times the nodes; the number
seen is in the 95 % range of its Poisson law, and it in the interval of the number seen. *Fitted*:
networks whose law was fitted to 1024 honest residuals, which price its bets.

    python research/benchmarks/network_year.py -o research/results/network_year.json
"""

import math

import numpy as np
from _common import parser, publish, round_to
from accounts import CHECKED, LAWS, SPREAD, draw
from scipy.stats import chi2, poisson

from assay.poc import Noise, get_pipeline
from assay.poc.verdict import Life
from assay.poc.verdict.honest_noise import fit_noise
from assay.poc.verdict.laws import pack_scores
from assay.poc.verdict.life import error_share
from assay.poc.verdict.sample_plan import sequential_test
from assay.stats.noise_laws import Spread
from assay.stats.sequential import SHARES

WEEKS = 52
TOGETHER = 500
ALPHAS = {1e-5: 100_000, 1e-3: 100_000, 0.05: 10_000}  # with the nodes simulated at each
DRAWN = 300
JUDGED = 6
NETWORKS = 5  # lives of each cheat, those of them that `Life` judges, and fitted laws


class Grid:
    """Sizes of residuals [A], equally far apart in their logarithms, less than 1 %."""

    def __init__(self, law):
        log_A = np.linspace(math.log(law.size * 1e-3), math.log(2.0), 2048)
        self.sizes_A = np.exp(log_A)
        self.step = float(log_A[1] - log_A[0])
        self._honest_A = 1 - law.survival(np.exp(log_A[:-1] + self.step / 2))

    def draw(self, cheat, log_scale_N, nonces, rng):
        """Return places on the grid, [N, C], of nodes with a share of nonces that are a multiple
        larger.
        """
        shape, (share, multiple) = (log_scale_N.size, nonces), cheat
        shifts_N, more_N = (
            np.floor(one / self.step + rng.random(log_scale_N.size)).astype(
                int
            )  # at random, so that the mean is right
            for one in (log_scale_N, log_scale_N + math.log(multiple))
        )
        places_NC = np.searchsorted(self._honest_A, rng.random(shape))
        places_NC += np.where(rng.random(shape) < share, more_N[:, None], shifts_N[:, None])
        return np.clip(places_NC, 0, self.sizes_A.size - 1)


HONEST = (0.0, 1.0)


def simulate(noise, grid, kind, scales_N, rng, *, judged=None, alphas=ALPHAS):
    """Return by α 1/E of each life where it is first suspected, and where it is convicted, [2, N];
    0 for never.
    """
    test = sequential_test(noise)
    found = {alpha: np.zeros((2, len(scales_N))) for alpha in alphas}
    places_NC = grid.draw(kind, np.log(scales_N), WEEKS * CHECKED, rng)
    path_NP = np.tile(np.exp(test.prior), (len(scales_N), 1))
    factor_AP = np.exp(test.steps(grid.sizes_A))
    with np.errstate(all="ignore"):  # the evidence of a cheat that is long found may be infinite
        for places_N in places_NC.T:
            path_NP *= factor_AP[places_N]
            path_NP /= path_NP[:, : test.honest_paths].sum(axis=1, keepdims=True)
            e_N = path_NP[:, test.honest_paths : -test.excluding].sum(axis=1)
            for alpha, (first_N, _) in found.items():
                np.divide(
                    1, e_N, out=first_N, where=(first_N == 0) & (e_N * alpha * error_share(1) >= 1)
                )
    for alpha, (first_N, held_N) in found.items():  # a life that is not suspected is not convicted
        for node in np.flatnonzero(first_N[:judged]):
            life = Life(alpha=alpha, beta=1e-2)
            audits = grid.sizes_A[places_NC[node]].reshape(WEEKS, CHECKED)
            for week, sizes in enumerate(audits):
                at = range(week * CHECKED, (week + 1) * CHECKED)
                life.update(noise, sizes, block=str(week), positions=at, batch_size=32)
                if life.evidence.verdict == "fraud":
                    held_N[node] = math.exp(-life.tests[0].log_e)
                    break
    return found


def expect(noise, grid, rng):
    """Return by α the chances that an honest node is suspected and is convicted, each with its
    variance, [2, 2].
    """
    test, (scales, chances), total = (
        sequential_test(noise),
        noise.spread.atoms,
        dict.fromkeys(ALPHAS, 0.0),
    )
    weights = (
        np.exp(test.prior[test.honest_paths : -test.excluding]).reshape(len(scales), -1).sum(axis=0)
    )
    for weight, (share, multiple) in zip(
        weights, ((s, m) for s in SHARES for m in test._multiples_M), strict=True
    ):
        scales_N = rng.choice(scales, DRAWN, p=chances)
        kind = (share, multiple)
        for alpha, (first_N, held_N) in simulate(
            noise, grid, kind, scales_N, rng, judged=JUDGED
        ).items():
            of_cheat = [
                (weight * one.mean(), weight**2 * one.var() / len(one))
                for one in (first_N, held_N[:JUDGED])
            ]
            total[alpha] = total[alpha] + np.array(of_cheat)
    return total


def count(noise, grid, nodes, rng):
    """Return by α the numbers of honest nodes that are suspected and convicted, [2], among so many
    of each.
    """
    seen = {alpha: np.zeros(2, dtype=int) for alpha in nodes}
    for start in range(0, max(nodes.values()), TOGETHER):
        scales_N = rng.choice(SPREAD.fine[0], TOGETHER, p=SPREAD.fine[1])
        here = [a for a in nodes if start < nodes[a]]
        for alpha, found in simulate(noise, grid, HONEST, scales_N, rng, alphas=here).items():
            seen[alpha] += np.count_nonzero(found, axis=1)
    return seen


def row(alpha, nodes, chance, variance, seen):
    """Return an expected number with the 95 % range of its Poisson law, and a seen one with its
    interval.
    """
    mean = nodes * chance
    law = poisson.interval(0.95, nodes * chance)
    own = np.nan_to_num(chi2.ppf([0.025, 0.975], [2 * seen, 2 * seen + 2]) / 2)
    numbers = {"expected": [mean, nodes * variance**0.5, *law], "seen": [seen, *own]}
    holds = mean <= alpha * nodes and law[0] <= seen <= law[1] and own[0] <= mean <= own[1]
    return {name: [round_to(one) for one in several] for name, several in numbers.items()} | {
        "holds": bool(holds)
    }


def main():
    options = parser(__doc__).parse_args()
    rng = np.random.default_rng(0)
    rows = []
    fits = []
    for preset, law in ((name, LAWS[name]) for name in ("poc-2.0", "hardened")):
        grid = Grid(law)
        noise = Noise(law, "true", SPREAD)
        chances = expect(noise, grid, rng)
        seen = count(noise, grid, ALPHAS, rng)
        for alpha, nodes in ALPHAS.items():
            both = zip(("suspected", "convicted"), chances[alpha], seen[alpha], strict=True)
            found = {name: row(alpha, nodes, *one, int(number)) for name, one, number in both}
            rows.append(
                {"preset": preset, "law": str(law), "alpha": alpha, "nodes": nodes, **found}
            )
        for _ in range(NETWORKS):
            fit, error = fit_noise(get_pipeline(preset), honest := draw(law, 1024, rng))
            spread = Spread(math.hypot(error, SPREAD.sd))
            scores = pack_scores(honest, fit)
            fitted = Noise(fit, "fitted", spread, scores=scores)
            numbers = count(fitted, grid, {1e-3: 10_000}, rng)[1e-3].tolist()
            fits.append(
                {"preset": preset, "law": str(fit), "alpha": 1e-3, "nodes": 10_000, "seen": numbers}
            )
    publish(
        "network_year",
        {"weeks": WEEKS, "checked": CHECKED, "rows": rows, "fits": fits},
        options.output,
    )


if __name__ == "__main__":
    main()
