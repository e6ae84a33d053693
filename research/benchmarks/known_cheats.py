"""What any test of so many distances can find of a cheat that it knows: invented distances, and cheaply computed ones.

An oracle that knows both laws and looks after every residual was the standard for these cheats. It needs the fewest
residuals on average, and not the fewest for all but a few cheats, so what it misses is no bound. The most powerful test
of a fixed number of residuals at the same level is one (Neyman and Pearson). Its power is computed here beside the
oracle's, under honest distances that follow Student's t exactly:

- 2 % of 300 distances are invented, where honest noise has six degrees of freedom;
- 10 % of 150 distances are 5 times as noisy, for several degrees of freedom.

Rule, written before the figures of this script: a page says that no test can find a cheat in 99 % only where the power
of the test of that number is below .99. An earlier look at the same cases with other bins gave .990 to .999 for junk of
up to 1.5e-4, .92 for 5e-4, and .47 to .81 for the shares with tails of 2.5 to 4 degrees of freedom.

    python benchmarks/known_cheats.py -o benchmarks/results/known_cheats.json
"""

import math

import numpy as np
from _common import note, parser, publish
from clusters_bound import ALPHA, Hypothesis, power
from scipy import special
from scipy import stats as laws

from assay.stats import JUNK_SIGMA

BINS, FARTHEST = 1000, 2.0
JUNK, JUNK_CHECKED, JUNK_DOF, SIGMAS = 0.02, 300, 6.0, (1e-5, 5e-5, 1e-4, 1.5e-4, 3e-4, 5e-4)
SHARE, MULTIPLE, SHARE_CHECKED, DOFS, SHARE_SIGMA = 0.1, 5.0, 150, (2.5, 3.0, 3.5, 4.0, 6.0), 1e-5


def shares(beyond):
    """Return the probabilities of the bins between residuals, from those of what lies beyond each."""
    shares_B = np.maximum(-np.diff(np.concatenate([[1.0], beyond, [0.0]])), 1e-300)
    return shares_B / shares_B.sum()


def measured(sigma, dof, share, other, checked, options):
    """Return the power of the most powerful test, and what the sequential oracle catches.

    Args:
        sigma: Scale of honest residuals.
        dof: Degrees of freedom of honest residuals.
        share: Share of the nonces that follow another law.
        other: Function of residuals that returns the probability beyond each under that law.
        checked: Number of nonces.
        options: Settings of the command line.
    """
    rng = np.random.default_rng(options.seed)
    edges = np.geomspace(sigma / 50, FARTHEST, BINS - 1)
    honest_B = shares(2 * laws.t.sf(edges / sigma, dof))
    cheat_B = (1 - share) * honest_B + share * shares(other(edges))
    honest, cheat = (Hypothesis(one_B[None], np.ones(1)) for one_B in (honest_B, cheat_B))
    drawn_RC = rng.choice(BINS, p=cheat_B, size=(options.draws, checked))
    path_RC = np.log(cheat_B / honest_B)[drawn_RC].cumsum(axis=1)
    found = {
        "most_powerful": power(honest, cheat, checked, options.draws, rng),
        "oracle": float((path_RC.max(axis=1) >= -math.log(ALPHA)).mean()),
    }
    row = {"sigma": sigma, "degrees_of_freedom": dof, "share": share, "checked": checked} | found
    note(str(row))
    return row


def main():
    arguments = parser(__doc__)
    arguments.add_argument("--draws", type=int, default=20_000, help="nodes of each case")
    arguments.add_argument("--seed", type=int, default=21)
    options = arguments.parse_args()

    def invented(edges):
        return special.erfc(edges / JUNK_SIGMA / math.sqrt(2))

    junk = [measured(sigma, JUNK_DOF, JUNK, invented, JUNK_CHECKED, options) for sigma in SIGMAS]
    cheap = []
    for dof in DOFS:

        def larger(edges, dof=dof):
            return 2 * laws.t.sf(edges / SHARE_SIGMA / MULTIPLE, dof)

        cheap.append(measured(SHARE_SIGMA, dof, SHARE, larger, SHARE_CHECKED, options))
    settings = {"level": ALPHA, "seed": options.seed, "draws": options.draws}
    publish("known_cheats", settings | {"invented": junk, "cheap": cheap}, options.output)


if __name__ == "__main__":
    main()
