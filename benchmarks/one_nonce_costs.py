r"""What two versions of the residual test say on the nonces of real clusters and in whole lives, on the same numbers.

On clusters, one machine is left out at a time, as in `assay research clusters`. Lives are a year of audits of 16 nonces
under the predictive laws of the red team, of honest nodes and of every kind of cheater.

    python benchmarks/one_nonce_costs.py clusters DATA -o benchmarks/results/one_nonce_clusters.json
    python benchmarks/one_nonce_costs.py lives -o benchmarks/results/one_nonce_lives.json
"""

import itertools
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from _common import note, parser, publish

from assay import stats
from assay.poc.verdict import Noise, _machines, read_vector_sets
from assay.poc.verdict._noise import TESTS
from assay.research.clusters import _rules, summarise
from assay.research.clusters._builds import builds_of, sound_builds
from assay.research.clusters._folds import GRID, folds_of
from assay.research.clusters._rules import NAMED, OURS
from assay.research.simulation import Kind, SimulationPlan, convicted_in
from assay.research.simulation._network import KINDS

ALPHA, ROUNDS, NONCES = 1e-3, 365, 16


def left_out(data, options, task):
    """Return the figures of our rules by build, for a version of the test and a seed."""
    version, seed = task
    for module in (_rules, _machines):
        module.Noise = partial(Noise, test=version)
    groups = builds_of(read_vector_sets(data))
    folds = folds_of(sound_builds(groups), groups, options.audits, seed)
    found = summarise([fold.measure() for fold in folds])
    rows = []
    for build in found["builds"]:
        for row in build["rows"]:
            curve = row.pop("curve")
            if row["rule"] in (OURS, NAMED):
                told = {"test": version, "seed": seed, "build": build["build"], "effects": build["effects"]}
                rows.append({**told, **row, "by_10": curve[GRID.index(10)]})
    note(f"clusters, test {version}, seed {seed}")
    return rows


def lived(options, task):
    """Return in how many lives each kind of node is convicted, and when, for a version of the test and a cell."""
    version, (preset, dtype) = task
    plan = SimulationPlan()
    noise = replace(plan.noise(preset, dtype, "predictive"), test=version)
    machines, rows = plan.machines(preset, "predictive"), []
    for number, kind in enumerate((Kind("honest"), *plan.kinds(preset, dtype, "predictive"))):
        nodes = options.honest if kind.honest else options.cheats
        shape = {"nodes": nodes, "rounds": ROUNDS, "nonces": NONCES, "alpha": ALPHA, "seed": (options.seed, number)}
        caught_N = convicted_in(kind, noise, machines, **shape)
        convicted = int(np.isfinite(caught_N).sum())
        median = float(np.sort(caught_N)[nodes // 2])
        row = {"test": version, "preset": preset, "dtype": dtype, "kind": kind.name, "nodes": nodes}
        row |= {"convicted": convicted, "interval": list(stats.proportion_interval(convicted, nodes))}
        rows.append(row | {"rounds_median": median if np.isfinite(median) else None})
    note(f"lives, test {version}, {preset} {dtype}: {rows[0]['convicted']} honest of {options.honest}")
    return rows


def main():
    arguments = parser(__doc__)
    parts = arguments.add_subparsers(dest="part", required=True)
    clusters = parts.add_parser("clusters")
    clusters.add_argument("data", type=Path, help="file of sets of nonces")
    clusters.add_argument("--audits", type=int, default=200, help="honest audits of every pair of machines")
    clusters.add_argument("--seeds", type=int, nargs="+", default=[2, 3, 4])
    lives = parts.add_parser("lives")
    lives.add_argument("--honest", type=int, default=10_000)
    lives.add_argument("--cheats", type=int, default=1000, help="lives of every kind of cheater")
    lives.add_argument("--seed", type=int, default=2)
    for part in (clusters, lives):
        part.add_argument("--tests", type=int, nargs="+", default=TESTS, choices=TESTS, help="versions of the test")
        part.add_argument("--workers", type=int, default=2)
        part.add_argument("-o", "--output", type=Path)
    options = arguments.parse_args()
    if options.part == "clusters":
        work, second = partial(left_out, options.data, options), options.seeds
    else:
        work, second = partial(lived, options), [(preset, dtype) for dtype in KINDS for preset in KINDS[dtype]]
    with ProcessPoolExecutor(options.workers, mp_context=get_context("forkserver")) as pool:
        rows = list(itertools.chain(*pool.map(work, itertools.product(options.tests, second))))
    settings = {name: value for name, value in vars(options).items() if name in ("audits", "honest", "cheats", "seed")}
    publish(f"one_nonce_{options.part}", settings | {"rows": rows}, options.output)


if __name__ == "__main__":
    main()
