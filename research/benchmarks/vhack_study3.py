"""Run a part of the third experiment, within a time limit, and go on from what was kept. The plan says what is run.

    python research/benchmarks/vhack_study3.py stored --seeds 300:304 --organism ORGANISM -o OUT --seconds 540

All runs of the part and these seeds go side by side. Every so many steps ``OUT/PART-FIRST-LAST.pt`` is written whole or
not at all: δS, the optimizer's state and the logs of all runs, some 0.15 MB a run of the smallest size. Give the
command again where that file is, and it goes on from there, also on another machine. The logs are taken out of these
files by ``vhack_study3_results.py``.

``--arms main`` makes the runs of the arms that the hypotheses are about, and ``--arms others`` those of the others, in
files of their own (``PART-main-FIRST-LAST.pt``). Together they are the runs of the part.
"""

import argparse
import json
import math
import os
import time
from dataclasses import replace
from pathlib import Path

import torch
from _common import note
from _vhack_plan3 import DISTANCE, DRAWN, FIRST_SEED, PARTS
from assay_research.study.grading import Grader
from assay_research.study.loop import Study
from assay_research.study.rival import RIVALS, supervised_start
from assay_research.study.sampled import sampled_pairs

from assay.errors import UsageError
from assay.models import load_model
from assay.vhack import pair_gradients, weight_svd
from assay.vhack.delta.advantage import Shortcut
from assay.vhack.delta.controls import basis_of_kind
from assay.vhack.environment.grading import CHANNELS
from assay.vhack.environment.sandbox import available_backend
from assay.vhack.pairs import generate_pairs
from assay.vhack.pairs.pairs import authored_pairs
from assay.vhack.pairs.reference import environment_pairs

CHEATER_SEED, CHEATER_STEPS = 900, 40
SMALLEST_ORIGIN = 16  # pairs of every origin, the number of the written ones


class Prepared:
    """Axes, supervised starts and the direction of activations that the runs of a part ask for."""

    def __init__(self, runs, model, svd, part, grader, dtype):
        self.model, self.svd, self.settings, self.grader, self.dtype = model, svd, part.settings, grader, dtype
        easy = {"families": part.settings.families, "difficulty": (1, 3)}
        self.pairs = environment_pairs(part.pairs, whole=True, **easy)
        self.whole = pair_gradients(self.pairs, model, svd=svd)
        self.bases = {"whole": self.whole.basis(top_k=5)}
        self.bases |= {name: self.basis(name) for name in sorted({run.basis for run in runs} - {"whole"})}
        axes = self.bases["whole"].axes.values()
        norm = DISTANCE * math.sqrt(sum(int(rows.any(dim=1).sum()) for rows in axes))
        self.starts = {
            name: supervised_start(model, svd, self.pairs, name, norm=norm)
            for name in RIVALS
            if any(run.start == name for run in runs)
        }
        shortcut = any(run.how.advantage for run in runs)
        self.shortcut = Shortcut.fit(model, model.tokenizer, self.pairs) if shortcut else None

    def basis(self, name):
        """``whole:20`` is 20 axes by svd, ``whole:MODE`` leaves a mechanism out, other names are origins of pairs."""
        kind, _, seed = name.partition("@")
        if kind in DRAWN:
            return basis_of_kind(kind, self.whole, seed=int(seed))
        kind, _, option = name.partition(":")
        if kind == "whole" and option.isdigit():
            return self.whole.basis(top_k=int(option), method="svd")
        if kind == "whole" and option in CHANNELS:
            keep = [i for i, pair in enumerate(self.pairs) if mechanism(pair) != option]
            return self.whole.basis(keep=keep, top_k=5)
        made = {
            "written": lambda: authored_pairs()[:SMALLEST_ORIGIN],
            "generated": lambda: generate_pairs(SMALLEST_ORIGIN),
            "sampled": self.sampled,
        }
        if kind not in made:
            raise UsageError(f"axes {name!r}", wanted="whole or an origin of pairs", do="correct the plan")
        return pair_gradients(made[kind](), self.model, svd=self.svd).basis(top_k=5)

    def sampled(self):
        """Pairs found by a model that was trained to cheat on the same tasks."""
        steps = min(CHEATER_STEPS, self.settings.steps)
        short = replace(self.settings, steps=steps)
        return sampled_pairs(
            SMALLEST_ORIGIN,
            self.model,
            self.svd,
            self.bases["whole"],
            short,
            self.grader,
            seed=CHEATER_SEED,
            dtype=self.dtype,
        )


def mechanism(pair):
    """Return the loophole that the hack side of a pair exploits."""
    return next(tag for tag in pair.tags if tag.startswith("mechanism:"))[10:]


def seeds_of(text, part):
    """The seeds that ``FIRST:LAST`` names, LAST not among them; by default all of the part."""
    first, last = map(int, text.split(":")) if text else (FIRST_SEED, FIRST_SEED + part.seeds)
    if not FIRST_SEED <= first < last <= FIRST_SEED + part.seeds:
        raise UsageError(
            f"seeds {first}:{last}", wanted=f"within {FIRST_SEED}:{FIRST_SEED + part.seeds}", do="correct --seeds"
        )
    return range(first, last)


def train(study, part, grader, state, given, begun):
    """To the end or until time is up; what is done is kept all along."""
    looked = {line["step"] for log in study.logs.values() for line in log.evaluations}
    stops = part.evaluations
    targets = sorted({*stops, *range(0, part.settings.steps, given.keep_every), part.settings.steps})
    last = time.monotonic()
    for until in targets:
        left = given.seconds - (time.monotonic() - begun)
        if until < study.step:
            continue
        if until > study.step:
            if left <= 0:
                break
            study.run(grader, until=until, seconds=left)
        if until in stops and study.step == until and until not in looked:
            study.evaluate(grader, ("training",))
            if until == 0:
                note(f"before training: {next(iter(study.logs.values())).evaluations[-1]}")
        study.save(state)
        now = time.monotonic()
        said = {"step": study.step, "s": round(now - last, 1), "asked": grader.asked, "graded": grader.graded}
        note(json.dumps(said | {name: round(value, 1) for name, value in study.seconds.items()}))
        last = now
        if given.die_after is not None and study.step >= given.die_after:
            os.kill(os.getpid(), 9)
    return study.step >= part.settings.steps


def block(seeds, part, made, about, grader, given, begun):
    """Run the cells of some seeds side by side; return whether they are done."""
    runs = [run for seed in seeds for run in part.cell(seed, given.arms)]
    study = Study(
        runs,
        made.model,
        made.svd,
        made.bases,
        part.settings,
        about=about,
        dtype=made.dtype,
        shortcut=made.shortcut,
        starts=made.starts,
        most=part.most,
        fewest=given.fewest,
    )
    note(f"{len(runs)} runs in {[len(c.runs) for c in study.cohorts]}, ready after {time.monotonic() - begun:.1f} s")
    name = given.part if given.arms == "all" else f"{given.part}-{given.arms}"
    state = given.output / f"{name}-{seeds[0]}-{seeds[-1] + 1}.pt"
    if state.exists():
        study.load(state)
        if any(log.header["model"] != about["model"] for log in study.logs.values()):
            raise UsageError(
                f"runs of another organism in {state}", wanted=about["model"][:12], do="begin in another directory"
            )
        note(f"goes on from step {study.step}")
    done = train(study, part, grader, state, given, begun)
    note(f"seeds {seeds[0]} to {seeds[-1]}: step {study.step}, done {done}, {time.monotonic() - begun:.1f} s")
    return done


def arguments():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--seeds", help="FIRST:LAST, LAST not among them; by default all of the part")
    parser.add_argument(
        "--arms", choices=("all", "main", "others"), default="all", help="those of the hypotheses, or not"
    )
    parser.add_argument("--one-by-one", action="store_true", help="one seed after the other, each in its own file")
    parser.add_argument("--organism", default="reference:organism")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=1e9, help="stop after about so long")
    parser.add_argument("--keep-every", type=int, default=20, help="steps between two writes of the state")
    parser.add_argument("--fewest", type=int, default=2, help="groups of runs that take turns on the GPU")
    parser.add_argument("--workers", type=int)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16", help="of the runs")
    parser.add_argument("--commit", default="", help="commit of the code, for the logs")
    parser.add_argument("--die-after", type=int, help="be killed after so many steps, to try going on")
    return parser.parse_args()


def main():
    given, begun = arguments(), time.monotonic()
    part = PARTS[given.part]
    if given.device == "cuda":
        torch.set_num_threads(2)
    seeds = seeds_of(given.seeds, part)
    given.output.mkdir(parents=True, exist_ok=True)
    model = load_model(given.organism, dtype="float32", device=given.device)
    about = {
        "part": given.part,
        "size": part.size,
        "model": model.digest,
        "commit": given.commit,
        "torch": str(torch.__version__),  # plain text: a state is read without any class
        "device": torch.cuda.get_device_name() if given.device == "cuda" else "cpu",
        "dtype": given.dtype,
        "sandbox": available_backend() or "",
        "pairs": part.pairs,
    }
    with Grader(given.workers) as grader:
        runs = [run for seed in seeds for run in part.cell(seed, given.arms)]
        made = Prepared(runs, model, weight_svd(model), part, grader, getattr(torch, given.dtype))
        for some in [[seed] for seed in seeds] if given.one_by_one else [seeds]:
            if not block(some, part, made, about, grader, given, begun):
                break


if __name__ == "__main__":
    main()
