"""The full experiment: arms, seeds, optimisers and left-out mechanisms on the organism, many runs at once.

    python -m assay.vhack.organism -o ORGANISM --device cuda
    python benchmarks/vhack_study.py --organism ORGANISM --plan full --part 0/4 --state DIR --logs DIR

Every part is a process with a GPU of its own; all runs of a seed are in one part. A study that is stopped goes on from
its state when the command is given again. Logs are JSON Lines, one file per run.
"""

import argparse
import json
import os
import sys
import time
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


def full(seeds, left_out_seeds):
    """Arms of the main experiment, controls, a second optimiser, stored rollouts, single mechanisms."""
    runs = []
    for s in range(seeds):
        own = f"random:{s}"
        runs += [Run(arm, s) for arm in ("none", "no-loophole", "erase-gradient", "erase-update", "box")]
        runs += [Run("advantage-modification", s), Run("erase-gradient", s, basis=own)]
        runs += [Run(arm, s, "sgd") for arm in ("none", "no-loophole", "erase-gradient", "erase-update")]
        runs += [Run(arm, s) for arm in ("erase-gradient-two-sided", "erase-update-two-sided", "constant-push")]
        runs += [Run("erase-gradient", s, basis=kind) for kind in ("svd", "shuffled", "clean-clean", "authored-form")]
        runs += [Run("ground-truth-penalty", s)]
        runs += [Run(arm, s, teachers=1) for arm in ("none", "erase-gradient")]
    for s in range(left_out_seeds):
        for mode in CHANNELS:
            runs += [Run("none", s, modes=(mode,)), Run("erase-gradient", s, modes=(mode,))]
            runs += [Run("erase-gradient", s, basis=f"without:{mode}", modes=(mode,))]
    return runs


def probe(seeds, _):
    """A few runs, to choose rates and to see when plain training has saturated."""
    runs = []
    for s in range(seeds):
        runs += [Run(arm, s) for arm in ("none", "no-loophole", "erase-gradient")]
        runs += [Run("none", s, "sgd"), Run("none", s, modes=(tuple(CHANNELS)[s % 6],))]
        runs += [Run("none", s, teachers=1), Run("advantage-modification", s)]
    return runs


PLANS = {"full": full, "probe": probe}


def bases_for(runs, model, svd):
    """Every set of axes that the runs ask for, and the direction of advantage modification."""
    pairs = environment_pairs(48, **SMALL)
    gradients = pair_gradients(model, None, pairs, svd=svd)
    mechanism = [next(tag for tag in pair.tags if tag.startswith("mechanism:"))[10:] for pair in pairs]
    made = {"true": basis_of_kind("true", gradients)}
    for name in {run.basis for run in runs} - {"true"}:
        kind, _, which = name.partition(":")
        if kind == "random":
            made[name] = basis_of_kind("random", gradients, seed=int(which))
        elif kind == "svd":
            made[name] = basis_of_kind("true", gradients, method="svd")
        elif kind == "without":
            keep = [i for i, one in enumerate(mechanism) if one != which]
            made[name] = gradients.basis(top_k=5, keep=keep)
        elif kind == "authored-form":
            other = pair_gradients(model, None, generate_pairs(48), svd=svd)
            made[name] = basis_of_kind("true", other)
        else:
            made[name] = basis_of_kind(kind, gradients)
    return made, Shortcut.fit(model, model.tokenizer, pairs)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--organism", required=True)
    parser.add_argument("--plan", choices=PLANS, default="full")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--left-out-seeds", type=int, default=3)
    parser.add_argument("--part", default="0/1", help="which part of how many")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--rollouts", type=int, default=8)
    parser.add_argument("--adam-rate", type=float, default=0.03)
    parser.add_argument("--sgd-rate", type=float, default=0.3)
    parser.add_argument("--pool", type=int, default=4096)
    parser.add_argument("--most", type=int, default=40)
    parser.add_argument("--workers", type=int)
    parser.add_argument("--seconds", type=float, help="stop after about so long, and save the state")
    parser.add_argument("--state", type=Path, required=True)
    parser.add_argument("--logs", type=Path, required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--commit", default="")
    given = parser.parse_args()
    begun = time.monotonic()
    if given.device == "cuda":
        torch.set_num_threads(4)
    part, parts = map(int, given.part.split("/"))
    runs = [run for run in PLANS[given.plan](given.seeds, given.left_out_seeds) if run.seed % parts == part]
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
    study = Study(runs, model, svd, bases, settings, about=about, dtype=dtype, shortcut=shortcut, most=given.most)
    note(f"{len(runs)} runs in {[len(c.runs) for c in study.cohorts]}, set up in {time.monotonic() - begun:.1f} s")
    given.state.mkdir(parents=True, exist_ok=True)
    given.logs.mkdir(parents=True, exist_ok=True)
    state = given.state / f"part{part}.pt"
    with Grader(given.workers) as grader:
        if state.exists():
            study.load(state)
        else:
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

        left = None if given.seconds is None else given.seconds - (time.monotonic() - begun)
        done = study.run(grader, seconds=left, progress=progress)
        if done:
            study.evaluate(grader)
    note(json.dumps({name: round(seconds, 1) for name, seconds in study.seconds.items()}))
    study.save(state)
    for log in study.logs.values():
        log.write(given.logs / (log.header["run"].replace("/", "_").replace(":", "-") + ".jsonl"))
    note(f"step {study.step}, done {done}, {time.monotonic() - begun:.1f} s, {os.getpid()}")


if __name__ == "__main__":
    main()
