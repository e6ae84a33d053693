"""What a fault at fixed places is worth, whom it convicts, and what one block of lies costs.

Laws are those of research/benchmarks/rational.py under `tokens-1`. Rules, fixed before:

- liars: who lies at fixed places gains at most 2 % more than an honest machine of its true work,
  over 200 audits of 16: nonces that are credited over those that were computed honestly, less one,
  as the upper end of the 95 % interval of the mean of every setting;
- other_liars: the same of lies at fixed places that depend on something else too: on time, block,
  earlier lies, a sequence that begins anew, a second machine, or a few that are far off. In a first
  run of three lives, four intervals of means below zero ended above 2 %, for some lives of a
  setting are convicted and others are not; since then it is the largest gain of a life;
- pairs: no real faulty pair of the clusters is convicted in 100 audits of 16 (`Life`, `--data`), in
  none of its lives, whose audits are drawn anew from its nonces with the fault in place;
- strikes: of sequences of complete pools of each pair, none is fraud before its fourth (`--data`);
- honest: none of 20 000 honest lives of 100 audits under each law is convicted. Lives whose e-value
  reaches the bound of a test are run as a `Life`; for the strikes, complete pools of sound machines
  are tested for places;
- free block: how many cheap nonces of a second block convict, ten or ninety audits after a first
  block of lies, and how many without it; and what a block of lies in every so many is paid.

    python research/benchmarks/faults.py --data cluster_nonces.jsonl.gz \
      -o research/results/faults.json
"""

import itertools
import math
from collections import Counter

import numpy as np
from _common import parser, publish
from assay_research.clusters.builds import builds_of, sound_builds
from assay_research.clusters.clusters import _nearest_noise
from assay_research.rational import AT_PLACES, Strategy, draw_sizes, live, run_life
from assay_research.vector_sets import read_vector_sets
from rational import laws

from assay import stats
from assay.poc.verdict import Life
from assay.poc.verdict.life import error_share
from assay.poc.verdict.pool_faults import STRIKES, FaultyPool, count_strikes
from assay.poc.verdict.sample_plan import sequential_test

AUDITS = 200
PER = 16
POOL = 1024
FIXED = ((1, 16), (4, 16), (8, 16), (2, 16), (1, 32), (3, 32), (16, 32), (4, 64))
TIMES = {  # ways of rational.py, here with lies at fixed places alone
    "late": (64,),
    "early": (10,),
    "one block": (4,),
    "bursts": (8, 64),
    "restarts": (1, 4),
    "kinds": (1, 2),
    "few far off": (),
}
CHANCE = 0.4  # of a pool in which places for a time lie: below half, so the median stays honest
LIARS = {  # way, share and numbers of the strategies of a part
    "liars": (
        *(("places", run / modulus, (run, modulus)) for run, modulus in FIXED),
        *(("places for a time", CHANCE * run / 16, (run, 16)) for run in (4, 8)),
        ("places that move", 4 / 16, (4, 16, 64)),
        ("places that move", 8 / 16, (8, 16, 64)),
        ("places that move", 4 / 16, (4, 16, 16)),
    ),
    "other_liars": (
        ("scattered places", 0.25, (16, 0)),
        ("scattered places", 0.5, (32, 0)),
        ("scattered places", 0.1, (64, 0)),
        ("behind places", 0.05, (1, 16, 4, 0)),
        ("behind places", 0.1, (8, 16, 4, 0)),
        ("behind places", 0.1, (4, 16, 2, 64)),
        *(
            (way + AT_PLACES, 1.0, (*numbers, *places))
            for way, numbers in TIMES.items()
            for places in FIXED[:3]
        ),
    ),
}
MULTIPLES = (5.0, 30.0)
LAW_OF_LIARS = "smollm2, tokens-1"  # whose tail is the widest
MOST_POOLS = 16
PARTS = ["liars", "other_liars", "pairs", "strikes", "free_block", "lying_blocks", "honest"]


def liars(noise, truth, rng, lives, patterns):
    """Return the gain of each setting of lies at fixed places, with its interval."""
    rows = []
    for (way, share, more), multiple in itertools.product(patterns, MULTIPLES):
        strategy = Strategy(way, share, multiple, more)
        results = [
            live(strategy, noise, rng, truth=truth, audits=AUDITS, looks=4) for _ in range(lives)
        ]
        gains = np.array([one.paid / (one.nonces - one.cheap) - 1 for one in results])
        error = float(gains.std(ddof=1) / lives**0.5)
        rows.append(
            {
                "way": way,
                "places": more,
                "multiple": multiple,
                "cheap": float(np.mean([one.cheap / one.nonces for one in results])),
                "gain": float(gains.mean()),
                "upper": float(gains.mean() + 1.96 * error),
                "largest": float(gains.max()),
                "convicted": sum(one.convicted < math.inf for one in results),
                "open": sum(one.faulty for one in results),
            }
        )
        print(rows[-1], flush=True)
    return rows


def of_audits(pair, noise, rng, audits):
    """Return when a pair is faulty and fraud, None for never, and its credited share."""
    life = Life(alpha=1e-3, beta=1e-2)
    faulty = fraud = None
    for number in range(1, audits + 1):
        chosen = rng.permutation(len(pair.nonces))[:PER]
        evidence = life.update(
            noise,
            pair.distances[chosen],
            block=str(number),
            positions=pair.positions[chosen].tolist(),
            batch_size=pair.batch_size,
        ).evidence
        faulty = faulty or (number if evidence.faulty_places else None)
        fraud = fraud or (number if evidence.verdict == "fraud" else None)
    evidence = life.evidence
    return faulty, fraud, (evidence.credited or evidence.n) / evidence.n


def pools_to_fraud(pair, noise, rng):
    """Return after how many complete pools the strikes of a pair are fraud."""
    pools = []
    while count_strikes(pools) < STRIKES and len(pools) < MOST_POOLS:
        chosen = rng.choice(len(pair.nonces), POOL)
        place_test = stats.place_test(
            pair.distances[chosen] / noise.size,
            pair.positions[chosen],
            batch_size=pair.batch_size,
            honest_size=1.0,
        )
        places = place_test.bad_places if place_test.faulty else None
        pools.append(places and FaultyPool(places, frozenset("ab")))
    return len(pools)


def faulty_pairs(path):
    """Yield the real faulty pairs of the clusters, with the nearest noise and what names them."""
    groups = builds_of(read_vector_sets(path))
    for group in (group for group in groups if group.faults):
        noise = _nearest_noise(group, sound_builds(groups))
        for members, fault in group.faults.items():
            names = {"model": group.model, "pattern": fault.pattern}
            yield group.pairs[members], noise, names


def strikes(path, rng, repeats):
    """Return how many sequences of pools of each real faulty pair are fraud after so many pools."""
    rows = []
    for pair, noise, names in faulty_pairs(path):
        ends = Counter(pools_to_fraud(pair, noise, rng) for _ in range(repeats))
        rows.append({**names, "pools_to_fraud": dict(ends)})
        print(rows[-1], flush=True)
    return {"rows": rows, "least": min(min(row["pools_to_fraud"]) for row in rows)}


def pairs(path, rng, audits, repeats):
    """Return when each real faulty pair is called faulty, and how many are ever fraud."""
    rows = []
    for pair, noise, names in faulty_pairs(path):
        lives = [of_audits(pair, noise, rng, audits) for _ in range(repeats)]
        row = {
            **names,
            "nonces": len(pair.nonces),
            "lives": repeats,
            "convicted": sum(fraud is not None for _, fraud, _ in lives),
            "faulty": [faulty for faulty, _, _ in lives],
            "credited": [share for _, _, share in lives],
        }
        rows.append(row)
        print(row, flush=True)
    convicted = sum(row["convicted"] > 0 for row in rows)
    # A pair counts once: its lives share its nonces.
    interval = stats.proportion_interval(convicted, len(rows))
    return {"rows": rows, "convicted": convicted, "of": len(rows), "interval": interval}


def honest(name, truth, noise, rng, lives, pools):
    """Return how many honest lives are suspected and convicted, and how many pools are faulty."""
    suspected = convicted = 0
    weights = [error_share(1), error_share(2)]
    for start in range(0, lives, 2000):
        count = min(2000, lives - start)
        scale = np.exp(noise.spread.sd * rng.standard_t(noise.spread.dof, (count, 1)))
        sizes = draw_sizes(truth, count * 100 * PER, rng).reshape(count, -1) * scale
        # On a grid of .2 %, because equal values share what they cost.
        sizes = np.exp(np.round(np.log(np.minimum(sizes, 2.0)) / 0.002) * 0.002)
        accused = np.zeros(count, dtype=np.bool_)
        for weight, begins in zip(weights, (0, POOL), strict=True):
            test = sequential_test(noise, alpha=1e-3 * weight, beta=1e-2 * weight)
            accused |= test.accusations(sizes[:, begins:])[:, -1]
        suspected += int(accused.sum())
        for row in np.flatnonzero(accused):
            life = Life(alpha=1e-3, beta=1e-2)
            for number, part in enumerate(sizes[row].reshape(-1, PER)):
                positions = rng.choice(4096, PER, replace=False)
                life.update(
                    noise, part, block=str(number), positions=positions.tolist(), batch_size=32
                )
            convicted += life.evidence.verdict == "fraud"
    faulty = sum(
        stats.place_test(
            draw_sizes(truth, POOL, rng) / noise.size,
            rng.choice(1 << 16, POOL, replace=False),
            batch_size=32,
            honest_size=1.0,
        ).faulty
        for _ in range(pools)
    )
    found = {"lives": lives, "suspected": suspected, "convicted": convicted}
    row = {"law": name, **found, "pools": pools, "faulty_pools": faulty}
    print(row, flush=True)
    return row


def free_block(noise, truth, rng, lives):
    """Return the share of lives that so many cheap nonces of a second block convict, by its audit.

    The first block of the life is all cheap. None is a second block after an honest first one.
    """
    rows = []
    for second, first_is_cheap, count in itertools.product(
        (10, 90), (True, False), (1, 2, 3, 4, 6, 8, 16)
    ):
        convicted = 0
        for _ in range(lives):
            at_N = np.arange((second + 10) * PER) // PER
            cheap_N = (at_N == second) & (np.arange(len(at_N)) % PER < count)
            if first_is_cheap:
                cheap_N |= at_N == 0
            sizes_N = draw_sizes(truth, len(at_N), rng)
            residuals_N = np.minimum(np.where(cheap_N, 5.0 * sizes_N, sizes_N), 2.0)
            positions_N = np.concatenate(
                [rng.choice(4096, PER, replace=False) for _ in range(second + 10)]
            )
            result = run_life(noise, residuals_N, positions_N, at_N, cheap_N, looks=1)
            convicted += result.convicted < math.inf
        row = {"second": second, "first_is_cheap": first_is_cheap, "cheap": count}
        rows.append(row | {"lives": lives, "convicted": convicted})
        print(rows[-1], flush=True)
    return rows


def lying_blocks(noise, truth, rng, lives):
    """Return what a block of lies in every so many is paid, over 200 audits of a block each."""
    rows = []
    for period in (32, 64, 80, 100):
        # Whole blocks: all nonces of an audit in every period.
        strategy = Strategy("bursts", 1.0 / period, 5.0, (1, period))
        results = [
            live(strategy, noise, rng, truth=truth, audits=AUDITS, looks=8) for _ in range(lives)
        ]
        row = {"every": period, "lives": lives}
        row["convicted"] = sum(one.convicted < math.inf for one in results)
        row["paid_cheap"] = float(np.mean([one.paid_cheap / one.nonces for one in results]))
        rows.append(row)
        print(row, flush=True)
    return rows


def main():
    arguments = parser(__doc__)
    arguments.add_argument("--data", help="vector sets of clusters, for the part `pairs`")
    arguments.add_argument("--parts", nargs="*", default=PARTS)
    arguments.add_argument(
        "--laws", nargs="*", help="laws of `honest` and `free_block`; all of them"
    )
    arguments.add_argument("--lives", type=int, default=20_000, help="honest lives of a law")
    arguments.add_argument("--liars", type=int, default=8, help="liars of a setting")
    arguments.add_argument("--audits", type=int, default=100, help="audits of a real pair")
    arguments.add_argument("--pools", type=int, default=3000, help="sound pools of a law")
    arguments.add_argument("--repeats", type=int, default=8, help="lives of a real pair")
    options = arguments.parse_args()
    by_name = {name: pair for name, pair in laws().items() if "tokens-1" in name}
    chosen = options.laws or [*by_name]
    found = {}
    holds = {}
    truth, noise = by_name[LAW_OF_LIARS]
    for part in LIARS.keys() & set(options.parts):
        found[part] = liars(noise, truth, np.random.default_rng(1), options.liars, LIARS[part])
        end = "upper" if part == "liars" else "largest"
        holds[part] = max(row[end] for row in found[part]) <= 0.02
    if "pairs" in options.parts:
        rng = np.random.default_rng(2)
        found["pairs"] = pairs(options.data, rng, options.audits, options.repeats)
        holds["pairs"] = found["pairs"]["convicted"] == 0
    if "strikes" in options.parts:
        found["strikes"] = strikes(options.data, np.random.default_rng(5), options.repeats)
        holds["strikes"] = found["strikes"]["least"] > 3
    if "free_block" in options.parts:
        found["free_block"] = {
            name: free_block(by_name[name][1], by_name[name][0], np.random.default_rng(3), 40)
            for name in chosen
        }
    if "lying_blocks" in options.parts:
        found["lying_blocks"] = {
            name: lying_blocks(by_name[name][1], by_name[name][0], np.random.default_rng(6), 20)
            for name in chosen
        }
    if "honest" in options.parts:
        found["honest"] = [
            honest(name, *by_name[name], np.random.default_rng(4), options.lives, options.pools)
            for name in chosen
        ]
        holds["honest"] = all(row["convicted"] == 0 for row in found["honest"])
    publish("faults", {**found, "holds": holds}, options.output)


if __name__ == "__main__":
    main()
