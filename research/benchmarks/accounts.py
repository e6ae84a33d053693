"""What the rule of an account convicts: no honest life, shares that are computed cheaply, no faulty
machine.

Null: residuals of a known law without a difference between blocks, judged by that law, or by fitted
    laws, also where
2 % of residuals are ten times larger; a fitted law is believed, or prices its bets by the residuals
themselves. Pass: at most alpha of lives convicted; 10 % of `tokens-1` at 5 times the noise caught
in 99 % within 160 nonces; no faulty pair of a network convicted in 100 audits of 16, and all called
faulty within 20.

A prover that alternates: a node of MiniMax-M2.7 answers some nonces with 4 bits, within 480 checked
ones of 30 blocks, and gains these until it is convicted, or faulty, which is not paid; of keys,
what an account gains that is given up at the first suspicion. Pass: no way gains more with its best
share than cheating at random with the best one, beyond two standard errors.

    python research/benchmarks/accounts.py --data cluster_nonces.jsonl.gz \
      -o research/results/accounts.json
    python research/benchmarks/accounts.py --data ... --alternating \
      -o research/results/alternating.json
"""

import itertools
import math

import numpy as np
from _common import parser, publish
from assay_research.clusters.builds import builds_of, sound_builds
from assay_research.clusters.clusters import _nearest_noise, fit
from assay_research.vector_sets import read_vector_sets
from controls import distances

from assay import stats
from assay.poc import Noise, get_pipeline
from assay.poc.verdict import Life, fit_machines
from assay.poc.verdict.honest_noise import fit_noise, pack_scores
from assay.poc.verdict.sample_plan import sequential_test
from assay.stats.noise_laws import Spread

CHECKED = 16
LIVES = 60
SPREAD = Spread(0.036)  # nonces of an audit, each of another block
LAWS = {"poc-2.0": stats.ScaleNoise(1.8e-4, 3.0)}
LAWS |= {
    name: stats.LogNoise(-3.2, sd) for name, sd in {"hardened": 0.43, "tokens-1": 0.28}.items()
}
CHEAT = {"share": 0.1, "multiple": 5.0}
SHARES = (0.1, 0.2, 0.4, 1.0)
NODES = 10
WEEKS = 30
FIRST = 1024  # of a prover that alternates


def draw(law, shape, rng, share=0.0, multiple=1.0):
    """Residuals of a law, without sign, some of them larger."""
    grid = np.geomspace(law.size * 1e-4, law.size * 1e6, 4001)
    sizes = np.interp(rng.random(shape), 1 - law.survival(grid), grid)
    return np.minimum(sizes * np.where(rng.random(shape) < share, multiple, 1.0), 2.0)


def live(noise, audits, positions, *, alpha=1e-3, batch_size=32):
    """Return the audit at which a life is convicted, and that which first shows it to be faulty;
    infinity for never.
    """
    life = Life(alpha=alpha, beta=1e-2)
    faulty = math.inf
    for number, (values, places) in enumerate(zip(audits, positions, strict=True), start=1):
        found = life.update(
            noise, values, block=str(number), positions=places, batch_size=batch_size
        ).evidence
        faulty = min(faulty, number if found.faulty_places else math.inf)
        if found.verdict == "fraud":
            return number, faulty
    return math.inf, faulty


def convicted(law, alpha, audits, **cheat):
    """Count the lives that are convicted, of machines with a scale each."""
    rng = np.random.default_rng(0)
    shape = (audits, CHECKED)
    places = [rng.permutation(1000)[: audits * CHECKED].reshape(shape) for _ in range(LIVES)]
    lives = [
        draw(law, shape, rng, **cheat) * math.exp(SPREAD.sd * rng.standard_t(SPREAD.dof))
        for _ in range(LIVES)
    ]
    noise = Noise(law, "true", SPREAD)
    return sum(
        live(noise, *life, alpha=alpha)[0] < math.inf for life in zip(lives, places, strict=True)
    )


def fitted(preset, law, nonces, share, rng):
    """Return the shares of honest audits of 64, and of cheats of 150, that six fitted laws accuse:
    believed, priced.
    """
    shares = {"believed": [], "priced": []}
    for _ in range(6):
        honest = draw(law, nonces, rng, share, 10.0)
        audits = draw(law, (300, 64), rng, share, 10.0)
        cheats = draw(law, (100, 150), rng, share, 10.0) * np.where(
            rng.random((100, 150)) < 0.1, 5.0, 1.0
        )
        fit, error = fit_noise(get_pipeline(preset), honest)
        for name, scores in {"believed": "", "priced": pack_scores(honest, fit)}.items():
            test = sequential_test(Noise(fit, name, Spread(math.hypot(error, 0.03)), None, scores))
            laws = [
                float(test.accusations(np.minimum(draws, 2.0))[:, -1].mean())
                for draws in (audits, cheats)
            ]
            shares[name].append(laws)
    return {
        name: {
            "accused": float(np.mean(ones, 0)[0]),
            "worst": max(ones)[0],
            "caught": float(np.mean(ones, 0)[1]),
        }
        for name, ones in shares.items()
    }


def gains(law_of, honest, cheap, way, share, rng):
    """Return the cheap nonces of one account that count: until it is convicted, or faulty, or given
    up.

    ``law_of`` has the laws of the node's two kinds of machines, and ``honest`` and ``cheap`` the
    distances of each.
    """
    life = Life(alpha=1e-3, beta=1e-2)
    gained = 0
    places = rng.permutation(4096)[: WEEKS * CHECKED].reshape(WEEKS, -1)
    if way == "epochs":  # honest for a whole epoch first
        first = rng.choice(honest[0], FIRST)
        life.update(
            law_of[0], first, block="first", positions=rng.permutation(4096)[:FIRST], batch_size=32
        )
    for week in range(WEEKS):
        kind = week % 2 if way == "kinds" else 0
        chance = {"blocks": float(rng.random() < share), "kinds": min(1.0, 2 * share) * kind}.get(
            way, share
        )
        chosen = places[week] % 16 < 16 * share if way == "places" else rng.random(CHECKED) < chance
        at = rng.integers(0, len(honest[kind]), CHECKED)
        values = np.where(chosen, cheap[kind][at], honest[kind][at])
        life.update(law_of[kind], values, block=str(week), positions=places[week], batch_size=32)
        found = life.evidence
        given_up = way == "keys" and found.log_e_max >= math.log(
            1000
        )  # another key goes on where one is suspected
        gained += 0 if found.faulty_places else int(chosen.sum())
        if found.verdict == "fraud" or given_up:
            break
    return gained


def alternating(groups, rng):
    """Return what each way of cheating gains with its best share, with its standard error."""
    build = next(
        build_of_month
        for build_of_month in sound_builds(groups)
        if build_of_month.name == "2026-05 minimax-m2.7"
    )
    cheap_set = next(
        build_of_month
        for build_of_month in groups
        if build_of_month.model == "minimax-m2.7-awq-4bit"
    ).sets[0]
    nonces = sorted(
        set.intersection(
            *(set(build_of_month.vectors) for build_of_month in (*build.sets, cheap_set))
        )
    )
    judge = build.kinds.index("h100")
    node = [build.kinds.index(kind) for kind in ("b200", "a100")]
    remaining = [row for row in range(len(build.sets)) if row not in node]
    pairs = itertools.combinations(range(len(remaining)), 2)
    apart = {
        (a, b): distances(build.sets[remaining[a]], build.sets[remaining[b]], nonces)
        for a, b in pairs
    }
    measured = fit_machines(apart, [build.kinds[row] for row in remaining], fit)
    laws = [measured.predict_law(build.kinds[row], remaining.index(judge)) for row in node]
    law_of = [
        Noise(law, "others", measured.spread, None, measured.scores, measured.widest)
        for law in laws
    ]
    honest = [distances(build.sets[row], build.sets[judge], nonces) for row in node]
    cheap = [distances(cheap_set, build.sets[judge], nonces)] * 2
    results = {}
    for pattern in ("fixed", "blocks", "places", "epochs", "kinds", "keys"):
        lives = {
            share: [gains(law_of, honest, cheap, pattern, share, rng) for _ in range(NODES)]
            for share in SHARES
        }
        best = max(lives, key=lambda share: np.mean(lives[share]))
        error = float(np.std(lives[best], ddof=1) / NODES**0.5)
        of_share = {f"{share:g}": float(np.mean(ones)) for share, ones in lives.items()}
        results[pattern] = {
            "share": best,
            "gained": float(np.mean(lives[best])),
            "error": error,
            "of_share": of_share,
        }
        print(pattern, results[pattern], flush=True)
    return results


def main():
    arguments = parser(__doc__)
    arguments.add_argument("--data", required=True)
    arguments.add_argument("--alternating", action="store_true", help="only provers that alternate")
    options = arguments.parse_args()
    rng = np.random.default_rng(0)
    pairs = []
    groups = builds_of(read_vector_sets(options.data))
    if options.alternating:
        results = {"lives": NODES, "checked": WEEKS * CHECKED, "ways": alternating(groups, rng)}
        publish("alternating", results, options.output)
        return
    lives = {
        name: [convicted(law, 0.05, 24), convicted(law, 1e-3, 10, **CHEAT)]
        for name, law in LAWS.items()
    }
    cells = itertools.product(LAWS.items(), (256, 1024), (0.0, 0.02))
    fits = [
        {"preset": cell[0], "nonces": nonces, "large": share, **fitted(*cell, nonces, share, rng)}
        for cell, nonces, share in cells
    ]
    for group in (group for group in groups if group.faults):
        noise = _nearest_noise(group, sound_builds(groups))
        for pair, fault in ((group.pairs[rows], fault) for rows, fault in group.faults.items()):
            chosen = [rng.permutation(len(pair.nonces))[:CHECKED] for _ in range(100)]
            values, places = (
                [columns[cell] for cell in chosen] for columns in (pair.distances, pair.positions)
            )
            results = [
                at if at < math.inf else None
                for at in live(noise, values, places, batch_size=pair.batch_size)
            ]
            pairs.append(
                {
                    "model": group.model,
                    "pattern": fault.pattern,
                    "fraud": results[0],
                    "faulty": results[1],
                }
            )
    publish(
        "accounts",
        {"lives": LIVES, "convicted": lives, "fits": fits, "pairs": pairs},
        options.output,
    )


if __name__ == "__main__":
    main()
