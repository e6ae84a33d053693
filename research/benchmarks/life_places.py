"""Honest lives convicted in a year of audits, each of which tests the place in the batch first.

The place test sets residuals aside where they seem to depend on the place, and a ledger does not count them. In an
honest node's audits it does so by chance, and picks large residuals. Is a life still convicted with chance alpha at
most? Places of honest residuals are exchangeable, so what the test sets aside of an audit depends on the order of its
residuals by size and hardly on their values. It is drawn, for every audit of every life, from a library of tests that
were really made: which ranks each of them set aside.

    python benchmarks/life_places.py -o benchmarks/results/life_places.json
"""

import math
import os
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from _common import note, parser, publish

from assay import stats
from assay.research.simulation import Network, SimulationPlan
from assay.research.simulation._lives import TOGETHER, Grid, Kind, ManyLives, SizeEvidence, draw_round

ALPHA = 1e-3
PROVED, BATCH = 4096, 32  # nonces of a proof, of which an audit is a sample, and the batch size that it states
HONEST = Kind("honest")


def library(grid, law, nonces, tests, rng):
    """Return the ranks that the place test set aside of honest audits, [F, C] for those F in which it did so."""
    found, faulty = [], 0
    sizes_TC = grid.sizes_A[draw_round(grid, HONEST, np.zeros(tests), nonces, rng)]
    sizes_TC *= np.exp(grid.step * (rng.random(sizes_TC.shape) - 0.5))  # no two are equal, as in a real audit
    for sizes_C in sizes_TC:
        positions_C = np.sort(rng.choice(PROVED, nonces, replace=False))
        test = stats.place_test(sizes_C, positions_C, batch_size=BATCH, honest_size=law.size)
        faulty += test.faulty
        if test.set_aside.any():
            found.append(test.set_aside[np.argsort(sizes_C)])
    return np.array(found).reshape(-1, nonces), faulty


def lives(plan, preset, dtype, options):
    """Return how many of the honest nodes are convicted, and how much of their residuals was set aside."""
    noise, machines = plan.noise(preset, dtype, "predictive"), plan.machines(preset, "predictive")
    grid = Grid(noise.law)
    evidence = SizeEvidence(noise, grid.sizes_A)
    neutral = len(evidence.factor_AP)
    evidence.factor_AP = np.vstack([evidence.factor_AP, np.ones_like(evidence.factor_AP[:1])])
    asides_FC, faulty = library(grid, noise.law, options.nonces, options.tests, np.random.default_rng(1))
    chance = len(asides_FC) / options.tests

    def live(start):
        rng = np.random.default_rng((2, start))
        chosen = np.random.default_rng((3, start))
        count = min(TOGETHER, options.nodes - start)
        running = ManyLives(evidence, nodes=count, alpha=ALPHA)
        log_scale_N = machines.spread.sd * rng.standard_t(machines.spread.dof, count)
        for _ in range(options.rounds):
            here_N = log_scale_N + machines.block * rng.standard_normal(count)
            places_NC = draw_round(grid, HONEST, here_N, options.nonces, rng)
            suspect = np.flatnonzero(chosen.random(count) < chance)
            if suspect.size:
                aside = asides_FC[chosen.integers(len(asides_FC), size=suspect.size)]
                order = np.argsort(places_NC[suspect], axis=1, kind="stable")
                row, rank = np.nonzero(aside)
                places_NC[suspect[row], order[row, rank]] = neutral
            running.update(places_NC)
        return int(running.convicted_N.sum())

    with ThreadPoolExecutor(options.workers) as pool:
        convicted = sum(pool.map(live, range(0, options.nodes, TOGETHER)))
    return {
        "preset": preset,
        "dtype": dtype,
        "nodes": options.nodes,
        "convicted": convicted,
        "interval": list(stats.proportion_interval(convicted, options.nodes)),
        "tests": options.tests,
        "set_aside": len(asides_FC),
        "faulty": faulty,
        "share_set_aside": float(asides_FC.mean()) if len(asides_FC) else 0.0,
    }


def main():
    arguments = parser(__doc__)
    arguments.add_argument("--nodes", type=int, default=100_000)
    arguments.add_argument("--rounds", type=int, default=365)
    arguments.add_argument("--nonces", type=int, default=16, help="nonces of an audit, one audit a round")
    arguments.add_argument("--tests", type=int, default=20_000, help="place tests in the library")
    arguments.add_argument("--cells", nargs="+", default=["hardened/float16", "artifact/float16", "poc-2.0/bfloat16"])
    arguments.add_argument("--workers", type=int, default=os.cpu_count())
    options = arguments.parse_args()
    plan = SimulationPlan(network=Network(nodes=options.nodes))
    rows = []
    for cell in options.cells:
        preset, dtype = cell.split("/")
        started = time.perf_counter()
        rows.append(lives(plan, preset, dtype, options))
        spent = math.ceil(time.perf_counter() - started)
        note(f"{cell}: {rows[-1]['convicted']} of {options.nodes} convicted, {spent} s")
    settings = {"alpha": ALPHA, "rounds": options.rounds, "nonces": options.nonces, "proved": PROVED, "batch": BATCH}
    publish("life_places", {**settings, "rows": rows}, options.output)


if __name__ == "__main__":
    main()
