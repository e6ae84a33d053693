"""The full experiment: arms, seeds, optimisers and left-out mechanisms on the organism, many runs at once.

    python -m assay.vhack.organism -o ORGANISM --device cuda
    python benchmarks/vhack_study.py --organism ORGANISM --plan full --part 0/4 --state DIR --logs DIR

Every part is a process; two to a GPU keep it busy. A study that is stopped goes on from its state when the command is
given again. Logs are JSON Lines, one file per run.
"""

import argparse
import json
import os
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

from assay.models import load_model
from assay.vhack import pair_gradients, weight_svd
from assay.vhack.environment import CHANNELS, available_backend
from assay.vhack.pairs import generate_pairs
from assay.vhack.study import Grader, Run, Settings, Study, environment_pairs
from assay.vhack.training import basis_of_kind
from assay.vhack.training._advantage import Shortcut

FAMILIES = ("arithmetic", "branches", "digits", "counts")
SMALL = {"families": FAMILIES, "difficulty": (1, 3)}


def note(text):
    print(text, file=sys.stderr, flush=True)


MAIN = (
    Run("none", 0),
    Run("no-loophole", 0),
    Run("erase-gradient", 0),
    Run("erase-update", 0),
    Run("erase-gradient", 0, basis="random"),
    Run("box", 0),
    Run("advantage-modification", 0),
    Run("erase-gradient-two-sided", 0),
    Run("erase-update-two-sided", 0),
    *(Run(arm, 0, "sgd") for arm in ("none", "no-loophole", "erase-gradient", "erase-update")),
)
CONTROLS = (
    Run("constant-push", 0),
    Run("ground-truth-penalty", 0),
    *(Run("erase-gradient", 0, basis=kind) for kind in ("svd", "shuffled", "clean-clean", "generated")),
    *(Run(arm, 0, teachers=1) for arm in ("none", "erase-gradient")),
)
SINGLE = tuple(
    Run(arm, 0, basis=basis, modes=(mode,))
    for mode in CHANNELS
    for arm, basis in (("none", "true"), ("erase-gradient", "true"), ("erase-gradient", f"without:{mode}"))
)


DRAWN = ("random", "shuffled", "clean-clean")
"""Axes that are drawn anew for every seed."""


def full(seeds, fewer):
    """The arms, controls, a second optimiser, stored rollouts, and one loophole at a time; a seed's runs in a row."""
    return [
        replace(run, seed=s, basis=f"{run.basis}@{s}" if run.basis in DRAWN else run.basis)
        for s in range(seeds)
        for run in (*MAIN, *((*CONTROLS, *SINGLE) if s < fewer else ()))
    ]


def probe(seeds, _):
    """A few runs, to choose rates and to see when plain training has saturated."""
    runs = []
    for s in range(seeds):
        runs += [Run(arm, s) for arm in ("none", "no-loophole", "erase-gradient")]
        runs += [Run("none", s, "sgd"), Run("none", s, modes=(tuple(CHANNELS)[s % 6],))]
        runs += [Run("none", s, teachers=1), Run("advantage-modification", s)]
    return runs


def whole(seeds, fewer):
    """Arms along axes of pairs whose hack sides are whole exploits; with all six loopholes, and with one at a time."""
    runs = [Run(arm, 0, basis="whole") for arm in ("erase-gradient", "erase-update", "box", "erase-update-two-sided")]
    runs += [Run("none", 0), Run("no-loophole", 0)]
    single = [Run("erase-gradient", 0, basis="whole", modes=(mode,)) for mode in CHANNELS]
    return [replace(run, seed=s) for s in range(seeds) for run in (*runs, *(single if s < fewer else ()))]


PLANS = {"full": full, "probe": probe, "whole": whole}


def bases_for(runs, model, svd):
    """Every set of axes that the runs ask for, and the direction of advantage modification."""
    pairs = environment_pairs(48, **SMALL)
    gradients = pair_gradients(model, None, pairs, svd=svd)
    mechanism = [next(tag for tag in pair.tags if tag.startswith("mechanism:"))[10:] for pair in pairs]
    made = {"true": basis_of_kind("true", gradients)}
    for name in {run.basis for run in runs} - {"true"}:
        kind, _, seed = name.partition("@")
        kind, _, which = kind.partition(":")
        if kind == "svd":
            made[name] = basis_of_kind("true", gradients, method="svd")
        elif kind == "without":
            keep = [i for i, one in enumerate(mechanism) if one != which]
            made[name] = gradients.basis(top_k=5, keep=keep)
        elif kind == "whole":
            other = pair_gradients(model, None, environment_pairs(48, whole=True, **SMALL), svd=svd)
            made[name] = basis_of_kind("true", other)
        elif kind == "generated":
            other = pair_gradients(model, None, generate_pairs(48), svd=svd)
            made[name] = basis_of_kind("true", other)
        else:
            made[name] = basis_of_kind(kind, gradients, seed=int(seed))
    return made, Shortcut.fit(model, model.tokenizer, pairs)


def write(study, folder):
    """The logs as they are, one file per run."""
    for log in study.logs.values():
        log.write(folder / (log.header["run"].replace("/", "_").replace(":", "-") + ".jsonl"))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--organism", required=True)
    parser.add_argument("--plan", choices=PLANS, default="full")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--fewer", type=int, default=5, help="seeds of controls and of single loopholes")
    parser.add_argument("--part", default="0/1", help="which part of how many")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--rollouts", type=int, default=8)
    parser.add_argument("--adam-rate", type=float, default=0.03)
    parser.add_argument("--sgd-rate", type=float, default=0.3)
    parser.add_argument("--pool", type=int, default=4096)
    parser.add_argument("--most", type=int, default=40, help="runs that go side by side")
    parser.add_argument("--fewest", type=int, default=2, help="groups of them, to take turns on the GPU")
    parser.add_argument("--workers", type=int)
    parser.add_argument("--seconds", type=float, help="stop after about so long, and save the state")
    parser.add_argument("--evaluate-anyway", action="store_true", help="also when time is up before the last step")
    parser.add_argument("--state", type=Path, required=True)
    parser.add_argument("--logs", type=Path, required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--commit", default="")
    given = parser.parse_args()
    begun = time.monotonic()
    if given.device == "cuda":
        torch.set_num_threads(2)
    part, parts = map(int, given.part.split("/"))
    runs = PLANS[given.plan](given.seeds, given.fewer)
    runs = runs[round(part * len(runs) / parts) : round((part + 1) * len(runs) / parts)]
    model = load_model(given.organism, dtype="float32", device=given.device)
    svd = weight_svd(model)
    bases, shortcut = bases_for(runs, model, svd)
    settings = Settings(
        steps=given.steps,
        prompts=given.prompts,
        rollouts=given.rollouts,
        adam_rate=given.adam_rate,
        sgd_rate=given.sgd_rate,
        pool=given.pool,
        **SMALL,
    )
    about = {
        "model": model.digest,
        "commit": given.commit,
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if given.device == "cuda" else "cpu",
        "sandbox": available_backend() or "",
        "pairs": 48,
    }
    dtype = torch.bfloat16 if given.device == "cuda" else torch.float32
    study = Study(
        runs,
        model,
        svd,
        bases,
        settings,
        about=about,
        dtype=dtype,
        shortcut=shortcut,
        most=given.most,
        fewest=given.fewest,
    )
    note(f"{len(runs)} runs in {[len(c.runs) for c in study.cohorts]}, set up in {time.monotonic() - begun:.1f} s")
    given.state.mkdir(parents=True, exist_ok=True)
    given.logs.mkdir(parents=True, exist_ok=True)
    state = given.state / f"part{part}.pt"
    with Grader(given.workers) as grader:
        if state.exists():
            study.load(state)
        elif part == 0:  # all runs begin as the same model, so one part is enough
            study.evaluate(grader)
            note(f"evaluated at {time.monotonic() - begun:.1f} s: {next(iter(study.logs.values())).evaluations}")
        last = [time.monotonic(), 0, 0]

        def progress(step, means):
            if step % 5 == 0 or step < 4:
                now = time.monotonic()
                seconds, asked, graded = now - last[0], grader.asked - last[1], grader.graded - last[2]
                last[:] = [now, grader.asked, grader.graded]
                kept = {name: round(means[name], 3) for name in ("hack", "solve", "vacuous", "tokens", "cin")}
                note(json.dumps({"step": step, "s": round(seconds, 2), "asked": asked, "graded": graded, **kept}))
            if step % 60 == 0:
                write(study, given.logs)

        left = None if given.seconds is None else given.seconds - (time.monotonic() - begun)
        done = study.run(grader, seconds=left, progress=progress)
        if done or given.evaluate_anyway:
            study.evaluate(grader)
    note(json.dumps({name: round(seconds, 1) for name, seconds in study.seconds.items()}))
    study.save(state)
    write(study, given.logs)
    note(f"step {study.step}, done {done}, {time.monotonic() - begun:.1f} s, {os.getpid()}")


if __name__ == "__main__":
    main()
