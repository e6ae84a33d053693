"""What a control does on published vectors of real machines: each machine is left out once, and judged by the others.

The validator has machine j, and machine k as its control (or k and l, whose distances from j, over what is usual for
that pair, count by their geometric mean). Where these are joint, a node's residual is the geometric mean of its
distances to j and k (and l), each over what is usual there, and the control that of all distances between them. Joint
controls were chosen on the sets of 2026-04, and then measured on those of 2026-05. Law, power and spread come from the
machines that are left, on the same nonces. Audits draw nonces without replacement. A cheat is 1.4 times the honest
distance, of the pair or of what is usual where that is larger; or another build. The intervals are over machines.

    python research/benchmarks/controls.py --data cluster_nonces.jsonl.gz -o research/results/controls.json
"""

import itertools

import numpy as np
from _common import parser, publish
from assay_research.clusters.builds import builds_of, sound_builds
from assay_research.clusters.clusters import RATIO, drawn, fit
from assay_research.vector_sets import read_vector_sets

from assay import stats
from assay.poc import Noise
from assay.poc.verdict import fit_machines
from assay.poc.verdict.noise import Control, sequential_test

AUDITS, CHECKED, WITHIN, EFFECT = 200, 300, 60, 1.25
CHEATS = 60, 150  # audits of a cheat by one machine, and their nonces


def distances(one, other, nonces):
    """Return the L2 distances of two sets at some nonces, [N]."""
    pairs = [np.stack([side.vectors[nonce] for side in (one, other)]) for nonce in nonces]
    return np.linalg.norm(np.diff(np.array(pairs, dtype=np.float64), axis=1)[:, 0], axis=1)


def over_usual(sizes):
    """Return the geometric mean of distances [N] that several pairs have, each over its median, [N]."""
    logs = [np.log(np.maximum(one, 1e-4)) for one in sizes]
    return np.exp(np.mean([one - np.median(one) for one in logs], axis=0))


def caught_at(test, values_RC):
    """Return after how many nonces each audit accuses, [R]; infinity for never."""
    accused_RC = test.accusations(values_RC)
    return np.where(accused_RC[:, -1], accused_RC.argmax(axis=1) + 1.0, np.inf)


def leave_one_out(build, cheats, controls, joint, rng):
    """Return what is seen of every machine that is left out, with so many controls, by sort of audit.

    Where they are ``joint``, the residual of a node is the geometric mean of its distances to all of the validator's
    computations, and the control that of all distances between these.
    """
    nonces = sorted(set.intersection(*(set(one.vectors) for one in build.sets)))
    apart = {
        (i, j): distances(build.sets[i], build.sets[j], nonces)
        for i, j in itertools.permutations(range(len(build.sets)), 2)
    }
    found = []
    for machine in range(len(build.sets)):
        rest = [row for row in range(len(build.sets)) if row != machine]

        def beside(judge, *others, rest=rest):
            """Return the machines that compute beside a judge, of other kinds where there are enough."""
            alike = {build.kinds[row] for row in (judge, *others)}
            known = [row for row in rest if row not in (judge, *others)]
            foreign = [row for row in known if build.kinds[row] not in alike]
            return rng.permutation(foreign if len(foreign) >= controls else known)[:controls].tolist()

        def control_of(judge, rows):
            pairs = itertools.combinations((judge, *rows), 2) if joint else ((judge, row) for row in rows)
            return over_usual([apart[pair] for pair in pairs])

        usual = {
            row: np.median([np.median(apart[other, row]) for other in rest if other != row]) for row in rest
        }  # known before a node is judged

        def residual_of(judge, rows, distances_of, usual=usual):
            """Return the distances to the judge, or to all that compute, in units of what is usual at the judge."""
            if not joint:
                return distances_of(judge)
            logs = [np.log(np.maximum(distances_of(row), 1e-4) / usual[row]) for row in (judge, *rows)]
            return np.minimum(np.exp(np.mean(logs, axis=0)) * usual[judge], 2.0)

        pairs = list(itertools.combinations(range(len(rest)), 2))
        if controls:  # machines of a kind are alike, and say little of each other's nonces
            pairs = [(a, b) for a, b in pairs if build.kinds[rest[a]] != build.kinds[rest[b]]] or pairs
        plain = {(a, b): apart[rest[a], rest[b]] for a, b in pairs}
        control, scores = None, plain
        if controls:
            both = {}
            for a, b in pairs:
                node, judge = (rest[a], rest[b]) if not joint or (a + b) % 2 else (rest[b], rest[a])  # each is a node
                rows = beside(judge, node)
                residual = residual_of(judge, rows, lambda row, node=node: apart[node, row])
                both[a, b] = residual, control_of(judge, rows)
            control = Control.measured([*both.values()], of="one", dtype="another")
            scores = {pair: control.scores(*one) for pair, one in both.items()}
        noise = fit_machines(scores, [build.kinds[row] for row in rest], fit)
        seen = {"sd": noise.law.sd, "spread": noise.spread.sd, "power": control and control.power}
        rows = {"honest": [], "x1.4": []} | {name: [] for name in cheats}
        for judge in rest:
            law = noise.predict_law(build.kinds[machine], rest.index(judge))
            test = sequential_test(Noise(law, "", noise.spread, EFFECT, noise.scores, noise.widest))
            rows_beside = beside(judge) if controls else []
            size = control_of(judge, rows_beside) if controls else None

            def larger(row, machine=machine, usual=usual):
                factor = RATIO * max(1.0, usual[row] / np.median(apart[machine, row]))
                return np.minimum(factor * apart[machine, row], 2.0)

            of_sort = {"honest": lambda row, machine=machine: apart[machine, row], "x1.4": larger}
            for name, sets in cheats.items():
                complete = [one for one in sets if set(nonces) <= set(one.vectors)]
                of_sort |= {
                    f"{name}/{i}": lambda row, one=one: distances(one, build.sets[row], nonces)
                    for i, one in enumerate(complete)
                }
            pools = {name: residual_of(judge, rows_beside, one) for name, one in of_sort.items()}
            for name, pool in pools.items():
                values = pool if control is None else control.scores(pool, size)
                audits, checked = (AUDITS, CHECKED) if name == "honest" else CHEATS
                rows[name.split("/")[0]] += caught_at(test, drawn(rng, values, audits, checked)).tolist()
        found.append(seen | rows)
    return found


def summary(found, name):
    """Return the share accused with its interval over machines, and after how many nonces cheats are caught."""
    every = np.concatenate([one[name] for one in found])
    if name == "honest":
        shares = [float(np.mean(np.isfinite(one[name]))) for one in found]
        low, high = stats.grouped_share_interval(shares, range(len(shares)))
        return {"audits": every.size, "accused": int(np.isfinite(every).sum()), "low": low, "high": high}
    median, last = (x if np.isfinite(x) else None for x in np.quantile(every, (0.5, 0.99), method="higher").tolist())
    return {"audits": every.size, "within_60": float((every <= WITHIN).mean()), "median": median, "by_99": last}


def main():
    arguments = parser(__doc__)
    arguments.add_argument("--data", required=True)
    options, rng, builds = arguments.parse_args(), np.random.default_rng(0), []
    groups = builds_of(read_vector_sets(options.data))
    for build in (one for one in sound_builds(groups) if len(one.sets) >= 4):
        same = [one for one in groups if (one.family, one.round) == (build.family, build.round)]
        cheats = {group.model: group.sets for group in same if group.model != build.model}
        ways = [(0, False), (1, False), (1, True)] + [(2, False), (2, True)] * (len(build.sets) > 4)
        for controls, joint in ways:
            found = leave_one_out(build, cheats, controls, joint, rng)
            names = [name for name in ("honest", "x1.4", *cheats) if any(one[name] for one in found)]
            row = {"build": build.name, "machines": len(build.sets), "controls": controls, "joint": joint}
            row |= {key: float(np.mean([one[key] or 0 for one in found])) for key in ("sd", "spread", "power")}
            builds.append(row | {name: summary(found, name) for name in names})
            print(builds[-1], flush=True)
    publish("controls", {"audits": AUDITS, "checked": CHECKED, "effect": EFFECT, "builds": builds}, options.output)


if __name__ == "__main__":
    main()
