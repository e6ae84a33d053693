"""What a control does on published vectors of real machines: each machine is left out once, and
judged by the others.

The validator has machine j, and machine k as its control, or k and l; scores are those of `verify`.
Law, power and spread come from the machines that are left, on the same nonces. Audits draw nonces
without replacement. A cheat is 1.4 times the honest distance, of the pair or of what is usual where
that is larger; or another build. The geometric mean of a node's distances was chosen on the sets of
2026-04, and then measured on those of 2026-05. The intervals are over machines.

    python research/benchmarks/controls.py --data cluster_nonces.jsonl.gz \
      -o research/results/controls.json
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
from assay.poc.verdict.control import Control
from assay.poc.verdict.sample_plan import sequential_test

AUDITS = 200
CHECKED = 300
WITHIN = 60
EFFECT = 1.25
CHEATS = 60, 150  # audits of a cheat by one machine, and their nonces


def distances(one, other, nonces):
    """Return the L2 distances of two sets at some nonces, [N]."""
    pairs = [np.stack([side.vectors[nonce] for side in (one, other)]) for nonce in nonces]
    return np.linalg.norm(np.diff(np.array(pairs, dtype=np.float64), axis=1)[:, 0], axis=1)


def caught_at(test, values_RC):
    """Return after how many nonces each audit accuses, [R]; infinity for never."""
    accused_RC = test.accusations(values_RC)
    return np.where(accused_RC[:, -1], accused_RC.argmax(axis=1) + 1.0, np.inf)


def leave_one_out(build, cheats, controls, rng):
    """Return what is seen of every machine that is left out, with so many controls, by sort of
    audit.
    """
    nonces = sorted(set.intersection(*(set(vector_set.vectors) for vector_set in build.sets)))
    apart = {
        (i, j): distances(build.sets[i], build.sets[j], nonces)
        for i, j in itertools.permutations(range(len(build.sets)), 2)
    }
    results = []
    for machine in range(len(build.sets)):
        remaining = [row for row in range(len(build.sets)) if row != machine]
        usual = {
            row: float(
                np.median(
                    [
                        np.median(apart[row_beside, row])
                        for row_beside in remaining
                        if row_beside != row
                    ]
                )
            )
            for row in remaining
        }  # known before a node is judged

        def beside(judge, *others, remaining=remaining):
            """Return a judge and the machines that compute beside it, of other kinds where there
            are enough.
            """
            alike = {build.kinds[row] for row in (judge, *others)}
            known = [row for row in remaining if row not in (judge, *others)]
            foreign = [row for row in known if build.kinds[row] not in alike]
            return [
                judge,
                *rng.permutation(foreign if len(foreign) >= controls else known)[
                    :controls
                ].tolist(),
            ]

        def between(rows):
            return np.stack([apart[pair] for pair in itertools.combinations(rows, 2)])

        def control_of(rows, powers, usual=usual):
            """Return the control of these computations, with what is typical of each."""
            sizes = tuple(np.median(between(rows), axis=1).tolist())
            dtypes = tuple(f"machine {row}" for row in rows[1:])
            return Control(
                of="", dtypes=dtypes, usual=tuple(map(usual.get, rows)), sizes=sizes, powers=powers
            )

        pairs = list(itertools.combinations(range(len(remaining)), 2))
        if controls:  # machines of a kind are alike, and say little of each other's nonces
            pairs = [
                (a, b) for a, b in pairs if build.kinds[remaining[a]] != build.kinds[remaining[b]]
            ] or pairs
        scores = {(a, b): apart[remaining[a], remaining[b]] for a, b in pairs}
        powers = ()
        if controls:
            of_both = {}
            for a, b in pairs:
                node, judge = (
                    (remaining[a], remaining[b]) if (a + b) % 2 else (remaining[b], remaining[a])
                )  # each is a node
                rows = beside(judge, node)
                of_both[a, b] = rows, np.stack([apart[node, row] for row in rows])
            over = [
                (
                    node_EN / [[usual[row]] for row in rows],
                    between(rows) / np.median(between(rows), axis=1, keepdims=True),
                )
                for rows, node_EN in of_both.values()
            ]
            powers = Control.measured(over, of="", dtypes=[""] * controls).powers
            scores = {
                pair: control_of(rows, powers).scores(node_EN, between(rows))
                for pair, (rows, node_EN) in of_both.items()
            }
        noise = fit_machines(scores, [build.kinds[row] for row in remaining], fit)
        seen = {"sd": noise.law.sd, "spread": noise.spread.sd, "power": sum(powers)}
        found_by_sort = {"honest": [], "x1.4": []} | {name: [] for name in cheats}
        for judge in remaining:
            law = noise.predict_law(build.kinds[machine], remaining.index(judge))
            test = sequential_test(Noise(law, "", noise.spread, EFFECT, noise.scores, noise.widest))
            rows = beside(judge)

            def larger(row, machine=machine, usual=usual):
                factor = RATIO * max(1.0, usual[row] / np.median(apart[machine, row]))
                return np.minimum(factor * apart[machine, row], 2.0)

            of_sort = {"honest": lambda row, machine=machine: apart[machine, row], "x1.4": larger}
            for name, sets in cheats.items():
                complete = [
                    vector_set for vector_set in sets if set(nonces) <= set(vector_set.vectors)
                ]
                of_sort |= {
                    f"{name}/{i}": lambda row, vector_set=vector_set: distances(
                        vector_set, build.sets[row], nonces
                    )
                    for i, vector_set in enumerate(complete)
                }
            for name, distances_of in of_sort.items():
                node_EN = np.stack([distances_of(row) for row in rows])
                values = (
                    control_of(rows, powers).scores(node_EN, between(rows))
                    if controls
                    else node_EN[0]
                )
                audits, checked = (AUDITS, CHECKED) if name == "honest" else CHEATS
                found_by_sort[name.split("/")[0]] += caught_at(
                    test, drawn(rng, values, audits, checked)
                ).tolist()
        results.append(seen | found_by_sort)
    return results


def summary(found, name):
    """Return the share accused with its interval over machines, and after how many nonces cheats
    are caught.
    """
    every = np.concatenate([result[name] for result in found])
    if name == "honest":
        shares = [float(np.mean(np.isfinite(result[name]))) for result in found]
        low, high = stats.grouped_share_interval(shares, range(len(shares)))
        return {
            "audits": every.size,
            "accused": int(np.isfinite(every).sum()),
            "low": low,
            "high": high,
        }
    median, last = (
        x if np.isfinite(x) else None
        for x in np.quantile(every, (0.5, 0.99), method="higher").tolist()
    )
    return {
        "audits": every.size,
        "within_60": float((every <= WITHIN).mean()),
        "median": median,
        "by_99": last,
    }


def main():
    arguments = parser(__doc__)
    arguments.add_argument("--data", required=True)
    options = arguments.parse_args()
    rng = np.random.default_rng(0)
    builds = []
    groups = builds_of(read_vector_sets(options.data))
    for build in (
        build_of_month for build_of_month in sound_builds(groups) if len(build_of_month.sets) >= 4
    ):
        of_round = [
            build_of_month
            for build_of_month in groups
            if (build_of_month.family, build_of_month.round) == (build.family, build.round)
        ]
        cheats = {group.model: group.sets for group in of_round if group.model != build.model}
        for controls in (0, 1, 2) if len(build.sets) > 4 else (0, 1):
            results = leave_one_out(build, cheats, controls, rng)
            names = [
                name
                for name in ("honest", "x1.4", *cheats)
                if any(build_of_month[name] for build_of_month in results)
            ]
            row = {"build": build.name, "machines": len(build.sets), "controls": controls}
            row |= {
                key: float(np.mean([build_of_month[key] for build_of_month in results]))
                for key in ("sd", "spread", "power")
            }
            builds.append(row | {name: summary(results, name) for name in names})
            print(builds[-1], flush=True)
    publish(
        "controls",
        {"audits": AUDITS, "checked": CHECKED, "effect": EFFECT, "builds": builds},
        options.output,
    )


if __name__ == "__main__":
    main()
