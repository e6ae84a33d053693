"""What the rule of an account convicts: no honest life, shares that are computed cheaply, no faulty machine.

Null: residuals of a known law without a difference between blocks, judged by that law, or by fitted laws, also where
2 % of residuals are ten times larger; a fitted law is believed, or prices its bets by the residuals themselves.
Pass: at most alpha of lives convicted; 10 % of `tokens-1` at 5 times the noise caught in 99 % within 160 nonces; no
faulty pair of a network convicted in 100 audits of 16, and all called faulty within 20.

    python research/benchmarks/accounts.py --data cluster_nonces.jsonl.gz -o research/results/accounts.json
"""

import itertools
import math

import numpy as np
from _common import parser, publish
from assay_research.clusters.builds import builds_of, sound_builds
from assay_research.clusters.clusters import _nearest_noise
from assay_research.vector_sets import read_vector_sets

from assay import stats
from assay.poc import Noise, get_pipeline
from assay.poc.verdict import Life
from assay.poc.verdict.noise import fit_noise, pack_scores, sequential_test
from assay.stats.noise import Spread

CHECKED, LIVES, SPREAD = 16, 60, Spread(0.036)  # nonces of an audit, each of another block
LAWS = {"poc-2.0": stats.ScaleNoise(1.8e-4, 3.0)}
LAWS |= {name: stats.LogNoise(-3.2, sd) for name, sd in {"hardened": 0.43, "tokens-1": 0.28}.items()}
CHEAT = {"share": 0.1, "multiple": 5.0}


def draw(law, shape, rng, share=0.0, multiple=1.0):
    """Residuals of a law, without sign, some of them larger."""
    grid = np.geomspace(law.size * 1e-4, law.size * 1e6, 4001)
    sizes = np.interp(rng.random(shape), 1 - law.survival(grid), grid)
    return np.minimum(sizes * np.where(rng.random(shape) < share, multiple, 1.0), 2.0)


def live(noise, audits, positions, *, alpha=1e-3, batch_size=32):
    """Return the audit at which a life is convicted, and that which first shows it to be faulty; infinity for never."""
    life, faulty = Life(alpha=alpha, beta=1e-2), math.inf
    for number, (values, places) in enumerate(zip(audits, positions, strict=True), start=1):
        found = life.update(noise, values, block=str(number), positions=places, batch_size=batch_size).evidence
        faulty = min(faulty, number if found.faulty_places else math.inf)
        if found.verdict == "fraud":
            return number, faulty
    return math.inf, faulty


def convicted(law, alpha, audits, **cheat):
    """Count the lives that are convicted, of machines with a scale each."""
    rng, shape = np.random.default_rng(0), (audits, CHECKED)
    places = [rng.permutation(1000)[: audits * CHECKED].reshape(shape) for _ in range(LIVES)]
    lives = [draw(law, shape, rng, **cheat) * math.exp(SPREAD.sd * rng.standard_t(SPREAD.dof)) for _ in range(LIVES)]
    noise = Noise(law, "true", SPREAD)
    return sum(live(noise, *one, alpha=alpha)[0] < math.inf for one in zip(lives, places, strict=True))


def fitted(preset, law, nonces, share, rng):
    """Return the shares of honest audits of 64, and of cheats of 150, that six fitted laws accuse: believed, priced."""
    shares = {"believed": [], "priced": []}
    for _ in range(6):
        honest, audits = draw(law, nonces, rng, share, 10.0), draw(law, (300, 64), rng, share, 10.0)
        cheats = draw(law, (100, 150), rng, share, 10.0) * np.where(rng.random((100, 150)) < 0.1, 5.0, 1.0)
        fit = fit_noise(get_pipeline(preset), honest)
        for name, scores in {"believed": "", "priced": pack_scores(honest, fit.law)}.items():
            test = sequential_test(Noise(fit.law, name, Spread(math.hypot(fit.error, 0.03)), None, scores))
            found = [float(test.accusations(np.minimum(one, 2.0))[:, -1].mean()) for one in (audits, cheats)]
            shares[name].append(found)
    return {
        name: {"accused": float(np.mean(ones, 0)[0]), "worst": max(ones)[0], "caught": float(np.mean(ones, 0)[1])}
        for name, ones in shares.items()
    }


def main():
    arguments = parser(__doc__)
    arguments.add_argument("--data", required=True)
    options, rng, pairs = arguments.parse_args(), np.random.default_rng(0), []
    lives = {name: [convicted(law, 0.05, 24), convicted(law, 1e-3, 10, **CHEAT)] for name, law in LAWS.items()}
    cells = itertools.product(LAWS.items(), (256, 1024), (0.0, 0.02))
    fits = [
        {"preset": one[0], "nonces": nonces, "large": share, **fitted(*one, nonces, share, rng)}
        for one, nonces, share in cells
    ]
    groups = builds_of(read_vector_sets(options.data))
    for group in (group for group in groups if group.faults):
        noise = _nearest_noise(group, sound_builds(groups))
        for pair, fault in ((group.pairs[rows], fault) for rows, fault in group.faults.items()):
            chosen = [rng.permutation(len(pair.nonces))[:CHECKED] for _ in range(100)]
            values, places = ([whole[one] for one in chosen] for whole in (pair.distances, pair.positions))
            found = [at if at < math.inf else None for at in live(noise, values, places, batch_size=pair.batch_size)]
            pairs.append({"model": group.model, "pattern": fault.pattern, "fraud": found[0], "faulty": found[1]})
    publish("accounts", {"lives": LIVES, "convicted": lives, "fits": fits, "pairs": pairs}, options.output)


if __name__ == "__main__":
    main()
