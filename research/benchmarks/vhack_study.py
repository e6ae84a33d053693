"""The full experiment: arms, seeds, optimisers and left-out mechanisms on the organism, many runs at once.

    python -m assay_research.organism -o ORGANISM --device cuda
    python benchmarks/vhack_study.py --organism ORGANISM --plan full --part 0/4 --state DIR --logs DIR

Every part is a process; two to a GPU keep it busy. A study that is stopped goes on from its state when the command is
given again. Logs are JSON Lines, one file per run.
"""

import argparse
import json
import os
import time
from pathlib import Path

import torch
from _common import note
from _vhack_plans import PLANS
from assay_research.study.grading import Grader
from assay_research.study.loop import Study
from assay_research.study.plan import StudySettings

from assay.models import load_model
from assay.vhack import pair_gradients, weight_svd
from assay.vhack.delta.advantage import Shortcut
from assay.vhack.delta.controls import basis_of_kind
from assay.vhack.environment.backends import available_backend
from assay.vhack.environment.channels import CHANNELS
from assay.vhack.pairs import generate_pairs
from assay.vhack.pairs.reference import environment_pairs

FAMILIES = ("arithmetic", "branches", "digits", "counts")
SMALL = {"families": FAMILIES, "difficulty": (1, 3)}
TRAINING = ("training",)


def mechanism(pair):
    """The loophole that the hack side of a pair exploits."""
    return next(tag for tag in pair.tags if tag.startswith("mechanism:"))[10:]


def both_sides(model, svd):
    """Minimal and whole pairs, and their gradients."""
    sides = {kind: environment_pairs(48, whole=kind == "whole", **SMALL) for kind in ("minimal", "whole")}
    return sides, {kind: pair_gradients(pairs, model, svd=svd) for kind, pairs in sides.items()}


def bases_for(runs, model, svd):
    """Every set of axes that the runs ask for, and the direction of advantage modification.

    ``minimal`` pairs have the right solution on both sides; the axes of them are ``true``. ``whole`` ones have the
    whole exploit on the hack side. ``:20`` takes the first 20 axes by svd, ``:MODE`` leaves out the pairs of one
    mechanism.
    """
    sides, gradients = both_sides(model, svd)
    made = {"true": basis_of_kind("true", gradients["minimal"])}
    for name in {run.basis for run in runs} - {"true"}:
        kind, _, seed = name.partition("@")
        kind, *options = kind.split(":")
        numbers = [int(option) for option in options if option.isdigit()]
        if kind in sides:
            left_out = [option for option in options if option in CHANNELS]
            keep = [i for i, pair in enumerate(sides[kind]) if mechanism(pair) not in left_out]
            choice = {"top_k": numbers[0], "method": "svd"} if numbers else {"top_k": 5}
            made[name] = gradients[kind].basis(keep=keep, **choice)
        elif kind == "svd":
            made[name] = basis_of_kind("true", gradients["minimal"], method="svd")
        elif kind == "generated":
            made[name] = basis_of_kind("true", pair_gradients(generate_pairs(48), model, svd=svd))
        else:
            made[name] = basis_of_kind(kind, gradients["minimal"], seed=int(seed))
    return made, Shortcut.fit(model, model.tokenizer, sides["minimal"])


def write(logs, folder):
    """The logs as they are, one file per run."""
    for log in logs:
        log.write(folder / (log.header["run"].replace("/", "_").replace(":", "-") + ".jsonl"))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--organism", required=True)
    parser.add_argument("--plan", choices=PLANS, default="full")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--fewer", type=int, default=5, help="seeds of controls and of single loopholes")
    parser.add_argument("--part", default="0/1", help="which part of how many")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--rollouts", type=int, default=8)
    parser.add_argument("--prompt-tokens", type=int, default=144)
    parser.add_argument("--adam-rate", type=float, default=0.03)
    parser.add_argument("--sgd-rate", type=float, default=0.3)
    parser.add_argument("--difficulty", default="1,3", help="of the tasks; that of the pairs is 1,3")
    parser.add_argument("--pool", type=int, default=4096)
    parser.add_argument("--held-out", type=int, default=8, help="tasks per loophole to evaluate on")
    parser.add_argument("--most", type=int, default=40, help="runs that go side by side")
    parser.add_argument("--fewest", type=int, default=2, help="groups of them, to take turns on the GPU")
    parser.add_argument("--workers", type=int)
    parser.add_argument("--seconds", type=float, help="stop after about so long, and save the state")
    parser.add_argument("--start", action="store_true", help="evaluate before the first step, too")
    parser.add_argument("--late", type=int, default=1, help="evaluations at the end, before the last one in between")
    parser.add_argument("--apart", type=int, default=20, help="steps between them")
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
    runs = PLANS[given.plan](range(given.first, given.first + given.seeds), given.fewer)
    runs = runs[round(part * len(runs) / parts) : round((part + 1) * len(runs) / parts)]
    model = load_model(given.organism, dtype="float32", device=given.device)
    svd = weight_svd(model)
    bases, shortcut = bases_for(runs, model, svd)
    settings = StudySettings(
        steps=given.steps,
        prompts=given.prompts,
        rollouts=given.rollouts,
        adam_rate=given.adam_rate,
        sgd_rate=given.sgd_rate,
        pool=given.pool,
        evaluation=given.held_out,
        prompt_tokens=given.prompt_tokens,
        families=FAMILIES,
        difficulty=tuple(map(int, given.difficulty.split(","))),
    )
    about = {
        "model": model.digest,
        "commit": given.commit,
        "torch": str(torch.__version__),  # plain text: a state is read without any class
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
        elif given.start:
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
                write(study.logs.values(), given.logs)

        for before in reversed(range(given.late)):
            left = None if given.seconds is None else given.seconds - (time.monotonic() - begun)
            until = given.steps - before * given.apart
            if study.step < until and (left is None or left > 0):
                study.run(grader, until=until, seconds=left, progress=progress)
                if study.step == until and before:
                    study.evaluate(grader, TRAINING)
        done = study.step >= given.steps
        if done or given.evaluate_anyway:
            study.evaluate(grader)
    note(json.dumps({name: round(seconds, 1) for name, seconds in study.seconds.items()}))
    study.save(state)
    write(study.logs.values(), given.logs)
    note(f"step {study.step}, done {done}, {time.monotonic() - begun:.1f} s, {os.getpid()}")


if __name__ == "__main__":
    main()
