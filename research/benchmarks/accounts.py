"""What the rule of an account convicts: nothing of honest lives, shares that are computed cheaply, no faulty machine.

A conviction needs an e-value of 1/alpha, and what is left of it without any one block and without suspected places.
Simulated under the null before it was fixed: residuals of a known law, with no difference between blocks, and the law
itself as the judge. Rule: the share of lives convicted is at most alpha; 10 % of vectors at 5 times the noise are
caught in 99 % within 160 nonces of ten blocks; no faulty pair of a real network is convicted in 100 audits of 16
nonces, and each is called faulty within 20.

    cd research
    python benchmarks/accounts.py --data ../../shared/data/cluster_nonces.jsonl.gz -o results/accounts.json
"""

import math
from pathlib import Path

import numpy as np
from _common import parser, publish

from assay import stats
from assay.poc import Noise
from assay.poc.verdict import Life
from assay.stats.noise import Spread

CHECKED = 16  # nonces of an audit, each of another block
LAWS = {
    "vectors": stats.LogNoise(math.log(0.06), 0.45, tail=1.25),
    "distances": stats.ScaleNoise(1.8e-4, 3.0),
}


def draw(law, shape, rng):
    """Residuals of a law, without sign."""
    grid = np.geomspace(law.size * 1e-4, law.size * 1e6, 4001)
    return np.minimum(np.interp(rng.random(shape), 1 - law.survival(grid), grid), 2.0)


def live(noise, audits, positions, *, alpha=1e-3, batch_size=32):
    """Return the audits after which a life is convicted, and first shown to be faulty; infinity for never."""
    life, convicted, faulty = Life(alpha=alpha, beta=1e-2), math.inf, math.inf
    for number, (values, places) in enumerate(zip(audits, positions, strict=True), start=1):
        found = life.update(noise, values, block=str(number), positions=places, batch_size=batch_size).evidence
        faulty = min(faulty, number if found.faulty_places else math.inf)
        if found.verdict == "fraud":
            return number, faulty
    return convicted, faulty


def simulated(law, options, *, alpha, audits, share=0.0, multiple=1.0):
    """Return the share of lives that are convicted, with machines of one scale each."""
    rng, spread = np.random.default_rng(0), Spread(0.05)
    shape = options.lives, audits, CHECKED
    scale = np.exp(spread.sd * rng.standard_t(spread.dof, (options.lives, 1, 1)))
    values = draw(law, shape, rng) * scale * np.where(rng.random(shape) < share, multiple, 1.0)
    places = rng.permuted(np.broadcast_to(np.arange(1000), (options.lives * audits, 1000)), axis=1)[:, :CHECKED]
    of_lives = zip(values, places.reshape(shape), strict=True)
    noise = Noise(law, "true", spread)
    convicted = sum(live(noise, one, where, alpha=alpha)[0] < math.inf for one, where in of_lives)
    return {"lives": options.lives, "audits": audits, "alpha": alpha, "convicted": convicted}


def faulty_pairs(path, audits):
    """Yield what a life says of every pair of machines of a real network with a fault of the place."""
    from assay_research.clusters.builds import builds_of, sound_builds
    from assay_research.clusters.clusters import _nearest_noise
    from assay_research.vector_sets import read_vector_sets

    groups, rng = builds_of(read_vector_sets(path)), np.random.default_rng(0)
    for group in groups:
        noise = _nearest_noise(group, sound_builds(groups)) if group.faults else None
        for rows in group.faults if noise else ():
            pair = group.pairs[rows]
            chosen = [rng.permutation(len(pair.nonces))[:CHECKED] for _ in range(audits)]
            values, places = ([whole[one] for one in chosen] for whole in (pair.distances, pair.positions))
            convicted, faulty = live(noise, values, places, batch_size=pair.batch_size)
            yield {"model": group.model, "pattern": group.faults[rows].pattern, "fraud": convicted, "faulty": faulty}


def main():
    arguments = parser(__doc__)
    arguments.add_argument("--data", type=Path, required=True)
    arguments.add_argument("--lives", type=int, default=300)
    options = arguments.parse_args()
    rows = []
    for name, law in LAWS.items():
        for alpha, audits, cheat in ((0.05, 24, {}), (1e-3, 10, {"share": 0.1, "multiple": 5.0})):
            rows.append({"law": name, **cheat, **simulated(law, options, alpha=alpha, audits=audits, **cheat)})
            print(rows[-1], flush=True)
    pairs = list(faulty_pairs(options.data, 100))
    known = [one | {key: one[key] if one[key] < math.inf else None for key in ("fraud", "faulty")} for one in pairs]
    publish("accounts", {"checked": CHECKED, "rows": rows, "pairs": known}, options.output)


if __name__ == "__main__":
    main()
