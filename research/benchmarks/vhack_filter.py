r"""Rollouts judged by a detector, with an exploit stored in every group: what each arm does to hack and solve rate.

    OMP_NUM_THREADS=1 python research/benchmarks/vhack_filter.py --device cpu --steps 40 --prompts 4 --group 8 \
        --arms none filter=cin-lda filter=cin-lda:random -o research/results/vhack_filter.json

The organism of 7 M parameters, which we trained ourselves. A group has one stored exploit and rollouts of the policy,
so every arm sees as many. Pairs and partial monitor know ``--known`` of six mechanisms, tasks have all. A stored
exploit counts as written by a policy that is certain of it, so its importance weight is the policy's own probability.
Afterwards what is kept of δS completes held-out tasks. Predicted: filter by cin and by probe end at a hack rate of at
most 0.02 and solve at least as much as no-loophole less 0.05; random flags and the partial monitor fail. On a GPU:

    python research/benchmarks/vhack_filter.py --device cuda --steps 120 --limit 420 --at-once 8 --micro-batch 72 \
        --arms none no-loophole filter=cin-lda filter=probe filter=cin-lda:random filter=monitor penalty=cin-lda \
        quarantine=cin-lda -o "$OUT/vhack_filter.json"
"""

import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from _common import note, parser, publish

from assay.files.jsonl import read_json
from assay.models import load_model
from assay.stats.rates import grouped_share_interval
from assay.vhack.delta.delta import load_adapter
from assay.vhack.delta.file import read_delta_lengths
from assay.vhack.environment.grading import CHANNELS
from assay.vhack.pairs.generate import environment_pairs
from assay.vhack.training import TrainSettings, evaluate, train
from assay.vhack.training.grpo import last_checkpoint
from assay.vhack.training.log import read_steps
from assay.vhack.training.pool import PoolRollout, RolloutPool, sample_pool
from assay.vhack.training.settings import SampleSettings

MODEL = "reference:organism"
TASKS = {"families": ("arithmetic", "branches", "digits", "counts"), "modes": tuple(CHANNELS), "share_none": 0.0}
KEPT = ("step", "hack", "solve", "flagged", "caught", "lost", "caught_teacher", "quarantine", "seconds")
LONGEST = 96


def store_exploits(settings, path):
    """Write the exploit of every task of a run into a pool."""
    tokenizer = load_model(MODEL, device="cpu").tokenizer
    rollouts = []
    for episode in settings.episodes(settings.tasks):
        text = episode.completion(episode.exploit(None))
        tokens = (*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id)
        if len(tokens) <= LONGEST:
            rollouts.append(PoolRollout(episode.prompt, text, tokens, (0.0,) * len(tokens)))
    RolloutPool(rollouts).save(path)


def held_out(chosen, delta, known):
    """Rates of what is kept on held-out tasks, of all mechanisms, of those that pairs show, and of the others."""
    model = load_model(MODEL, device=chosen.device, dtype="float32")
    load_adapter(model, delta, read_delta_lengths(delta)).merge()
    tasks = SampleSettings(seed=chosen.seed, difficulty=(2, 4), **TASKS).episodes(chosen.held_out)
    drawn = sample_pool(model, [t.prompt for t in tasks], per_prompt=8, max_new_tokens=LONGEST, seed=7, batch=128)
    by_prompt = {task.prompt: task for task in tasks}
    asked = [by_prompt[rollout.prompt] for rollout in drawn]
    found = evaluate(asked, [rollout.completion for rollout in drawn], allow_unsandboxed=chosen.allow_unsandboxed)
    rates = {}
    for part, modes in (("all", CHANNELS), ("known", known), ("unseen", set(CHANNELS) - set(known))):
        rows = [row for row, mode in enumerate(found.mechanisms) if mode in modes]
        groups = [found.groups[row] for row in rows]
        for name, mark in (("hack", "exploited"), ("solve", "correct")):
            marks = [getattr(found.grades[row], mark) for row in rows]
            ends = grouped_share_interval(marks, groups)
            rates[f"{name} {part}"] = [round(x, 4) for x in (sum(marks) / max(1, len(marks)), *ends)]
    return rates


def one(chosen, arm, folder):
    """Train one arm, and return its steps and the rates afterwards."""
    name, _, detector = arm.partition("=")
    known = list(CHANNELS)[: chosen.known]
    how = {"model": MODEL, "device": chosen.device, "dtype": "float32", "seed": chosen.seed, "difficulty": (2, 4)}
    how |= {"tasks": 1024, "prompts": chosen.prompts, "group": chosen.group, "max_new_tokens": LONGEST, **TASKS}
    how |= {"steps": chosen.steps, "micro_batch": chosen.micro_batch, "save_every": 10}
    how |= {"arm": name, "detector": "labels=" + "+".join(known) if detector == "monitor" else detector or None}
    store_exploits(TrainSettings(**how), folder / "pool.jsonl")
    settings = TrainSettings(**how, teacher=str(folder / "pool.jsonl"), teacher_share=1 / chosen.group)
    pairs = environment_pairs(chosen.pairs, whole=True, families=TASKS["families"], modes=known)
    began = time.perf_counter()

    def say(line):
        note(f"{arm}: {line}")
        if time.perf_counter() - began > chosen.limit:
            raise TimeoutError

    with suppress(TimeoutError):
        train(settings, folder / "run", console=say, pairs=pairs, allow_unsandboxed=chosen.allow_unsandboxed)
    checkpoint, done = last_checkpoint(folder / "run")
    _, steps = read_steps(folder / "run" / "log.jsonl")
    kept = [{name: round(step[name], 4) for name in KEPT if name in step} for step in steps]
    rates = held_out(chosen, checkpoint / "delta.safetensors", known)
    note(f"{arm}: {rates}")
    return {"rates": rates, "after": done, "seconds": round(time.perf_counter() - began, 1), "steps": kept}


def main():
    """Run every arm in a process of its own, some at once, and write what is there after each, in their order."""
    options = parser(__doc__)
    options.add_argument("--device", default="cpu")
    options.add_argument("--arms", nargs="+", default=["none", "no-loophole", "filter=cin-lda"])
    options.add_argument("--seed", type=int, default=300)
    for flag, default in (("steps", 120), ("prompts", 16), ("group", 9), ("known", 3), ("pairs", 48), ("held-out", 48)):
        options.add_argument(f"--{flag}", type=int, default=default)
    options.add_argument("--limit", type=float, default=1e9, help="seconds, after which the last checkpoint counts")
    options.add_argument("--micro-batch", type=int, default=0, help="rollouts of a backward pass; 0 takes one group")
    options.add_argument("--at-once", type=int, default=1, help="arms that run side by side")
    options.add_argument("--allow-unsandboxed", action="store_true")
    chosen = options.parse_args()
    shown = {name: value for name, value in vars(chosen).items() if name not in ("output", "arms", "at_once")}
    rest = [part for part in sys.argv[1:] if part not in chosen.arms and part != "--arms"]
    found = {}
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(chosen.at_once) as pool:
        if len(chosen.arms) == 1:
            found = {chosen.arms[0]: one(chosen, chosen.arms[0], Path(name))}
            return publish("vhack_filter", {**shown, "arms": found}, chosen.output)

        def apart(arm):
            path = Path(name) / f"{chosen.arms.index(arm)}.json"
            line = [sys.executable, __file__, *rest, "--arms", arm, "-o", str(path)]
            ended = subprocess.run(line, stdout=subprocess.DEVNULL, check=False)
            return read_json(path)["arms"] if path.exists() else {arm: {"failed": ended.returncode}}

        for part in pool.map(apart, chosen.arms):
            found |= part
            publish("vhack_filter", {**shown, "arms": found}, chosen.output)
    return None


if __name__ == "__main__":
    main()
