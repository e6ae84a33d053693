r"""The fourth experiment: rollouts judged by a detector, with a stored exploit in every group; the
arms over seeds.

    OMP_NUM_THREADS=1 python research/benchmarks/vhack_filter.py --steps 40 --prompts 4 \
      --group 8 --seeds 300 301 \
        --arms none filter=cin-lda filter=cin-lda:random -o research/results/vhack_filter_seeds.json

The organism of 7 M parameters, or with ``--model`` one that vhack_organisms.py made; we trained
them all ourselves. A group has one stored exploit and rollouts of the policy, so every arm sees as
many. Pairs and partial monitor know ``--known`` of six mechanisms, tasks have all. A stored exploit
counts as written by a policy that is certain of it, so its importance weight is the policy's own
probability. ``--exploit partial`` stores another kind, of which pairs know nothing: it does all of
the work but the first step, and tells the grader "right". ``ARM/N`` renews axes and detector after
every N steps. After every 50 steps, and at the end, what is kept of δS completes held-out tasks:
arms are compared after equal numbers of steps.

Predicted before the first run with more than one seed: at 7 M and 30 M, filter by cin-lda ends at a
hack rate of at most 0.02 in the mean over seeds and solves at least as much as no-loophole less
0.05; filter by probe does not (it failed with one seed); random flags and the partial monitor end
above 0.5. At 120 M and on SmolLM2 the same for cin-lda. Partial exploit: every arm without renewal
ends above 0.5, and with renewal after 5 steps above 0.05. Later, before their runs: cin-lda renewed
after 20 steps hacks at most 0.03 in every seed at 7 M; penalty at most 0.02 on SmolLM2. On held-out
tasks of all four, after equal steps: penalty hacks at most 0.02 in the mean, and solves at most
0.05 less; the same after 200 steps at 30 M and 150 at 120 M, ten times what plain training takes to
saturate. An alarm without labels, 8 seeds of 40 steps at 7 M: leak and cin_s, each its mean over
steps 21 to 40 less that over steps 1 to 10, rank filter=monitor, whose detector fails, above
no-loophole with AUC at least 0.9. What was
predicted of labels with mistakes, ``ARM=labels@0.6``, is in research/notes/recall.md.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from pathlib import Path

import torch
from _common import note, parser, publish
from assay_research.study.summary import mean_of

from assay.files.jsonl import read_json
from assay.models import load_model
from assay.stats.rates import grouped_share_interval
from assay.vhack.directions.delta.delta_file import read_delta_lengths
from assay.vhack.directions.delta.delta_models import load_adapter
from assay.vhack.environment.grading import CHANNELS
from assay.vhack.pairs.generate import environment_pairs
from assay.vhack.training import TrainSettings, evaluate, train
from assay.vhack.training.grpo import last_checkpoint
from assay.vhack.training.log import read_steps
from assay.vhack.training.pool import PoolRollout, RolloutPool
from assay.vhack.training.sampling import sample_pool
from assay.vhack.training.settings import SampleSettings

TASKS = {
    "families": ("arithmetic", "branches", "digits", "counts"),
    "modes": tuple(CHANNELS),
    "share_none": 0.0,
}
MARK = 50  # steps, after each of which held-out tasks are completed
KEPT = (
    *(
        "step",
        "hack",
        "solve",
        "reward",
        "flagged",
        "caught",
        "lost",
        "missed",
        "caught_teacher",
        "quarantine",
    ),
    *("cin", "cin_s", "leak", "seconds"),
)


def store_exploits(settings, path, partial):
    """Write the exploit of every task of a run into a pool."""
    tokenizer = load_model(settings.model, device="cpu").tokenizer
    rollouts = []
    for episode in settings.episodes(settings.tasks):
        text = episode.completion(
            episode.exploit(episode.task.source(leave_out=0) if partial else None)
        )
        tokens = (*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id)
        if len(tokens) <= settings.max_new_tokens:
            rollouts.append(PoolRollout(episode.prompt, text, tokens, (0.0,) * len(tokens)))
    RolloutPool(rollouts).save(path)


def held_out(chosen, delta, known):
    """Rates of what is kept on held-out tasks, of all mechanisms, of those that pairs show, and of
    the others.
    """
    model = load_model(chosen.model, device=chosen.device, dtype="float32")
    load_adapter(model, delta, read_delta_lengths(delta)).merge()
    tasks = SampleSettings(seed=chosen.seeds[0], difficulty=(2, 4), **TASKS).episodes(
        chosen.held_out
    )
    prompts = [task.prompt for task in tasks]
    drawn = sample_pool(
        model, prompts, per_prompt=8, max_new_tokens=chosen.longest, seed=7, batch=32
    )
    by_prompt = {task.prompt: task for task in tasks}
    asked = [by_prompt[rollout.prompt] for rollout in drawn]
    outcome = evaluate(
        asked, [rollout.completion for rollout in drawn], allow_unsandboxed=chosen.allow_unsandboxed
    )
    rates = {}
    for part, modes in (
        ("all", CHANNELS),
        ("known", known),
        ("unseen", set(CHANNELS) - set(known)),
    ):
        rows = [row for row, mode in enumerate(outcome.mechanisms) if mode in modes]
        groups = [outcome.groups[row] for row in rows]
        for name, mark in (("hack", "exploited"), ("solve", "correct")):
            marks = [getattr(outcome.grades[row], mark) for row in rows]
            ends = grouped_share_interval(marks, groups)
            rates[f"{name} {part}"] = [
                round(x, 4) for x in (sum(marks) / max(1, len(marks)), *ends)
            ]
    return rates


def one(chosen, arm, folder):
    """Train one arm, and return its steps and the rates afterwards."""
    kind, _, renewed = arm.partition("/")
    name, _, detector = kind.partition("=")
    channels = list(CHANNELS)[: chosen.known]
    how = {
        "model": chosen.model,
        "device": chosen.device,
        "dtype": "float32",
        "seed": chosen.seeds[0],
        "tasks": 1024,
        "prompts": chosen.prompts,
        "group": chosen.group,
        "max_new_tokens": chosen.longest,
        **TASKS,
        "steps": chosen.steps,
        "micro_batch": chosen.micro_batch,
        "save_every": 10,
        "lr": chosen.lr,
        "arm": name,
        "detector": "labels=" + "+".join(channels) if detector == "monitor" else detector or None,
        "difficulty": (2, 4),
        "refresh": int(renewed or 0),
    }
    store_exploits(TrainSettings(**how), folder / "pool.jsonl", chosen.exploit == "partial")
    settings = TrainSettings(
        **how, teacher=str(folder / "pool.jsonl"), teacher_share=1 / chosen.group
    )
    pairs = environment_pairs(chosen.pairs, whole=True, families=TASKS["families"], modes=channels)
    began = time.perf_counter()

    def say(line):
        note(f"{arm}: {line}")
        saved, step = last_checkpoint(folder / "run")
        if saved is not None and step % MARK == 0:
            shutil.copy(saved / "delta.safetensors", folder / f"{step}.safetensors")
        if time.perf_counter() - began > chosen.limit:
            raise TimeoutError

    with suppress(TimeoutError):
        train(
            settings,
            folder / "run",
            console=say,
            pairs=pairs,
            allow_unsandboxed=chosen.allow_unsandboxed,
        )
    checkpoint, steps_done = last_checkpoint(folder / "run")
    _, steps = read_steps(folder / "run" / "log.jsonl")
    rows = [{name: round(step[name], 4) for name in KEPT if name in step} for step in steps]
    seconds = round(time.perf_counter() - began, 1)
    shutil.copy(checkpoint / "delta.safetensors", folder / f"{steps_done}.safetensors")
    marks = sorted(int(path.stem) for path in folder.glob("*.safetensors"))
    rates = {step: held_out(chosen, folder / f"{step}.safetensors", channels) for step in marks}
    note(f"{arm}: {rates}")
    return {
        "rates": rates[steps_done],
        "at": rates,
        "after": steps_done,
        "seconds": seconds,
        "steps": rows,
    }


def over_seeds(rates):
    """Mean over seeds of every rate, the ends of its 95 % t interval where there are two seeds, and
    the largest.
    """
    means = {}
    for name in rates[0]:
        values = [rates_of_seed[name][0] for rates_of_seed in rates]
        mean = mean_of(values)
        means[name] = [
            round(x, 4) for x in (mean.value, mean.low, mean.high, max(values)) if x is not None
        ]
    return means


def main():
    """Run every arm of every seed in a process of its own, some at once, and write what is there
    after each.
    """
    options = parser(__doc__)
    options.add_argument("--model", default="reference:organism")
    options.add_argument("--device", default="cpu", help="cuda takes the GPUs in turns")
    options.add_argument("--arms", nargs="+", default=["none", "no-loophole", "filter=cin-lda"])
    options.add_argument("--seeds", nargs="+", type=int, default=[300])
    for flag, default in (
        ("steps", 120),
        ("prompts", 16),
        ("group", 9),
        ("known", 3),
        ("pairs", 48),
        ("held-out", 48),
    ):
        options.add_argument(f"--{flag}", type=int, default=default)
    options.add_argument("--longest", type=int, default=96, help="tokens of a completion")
    options.add_argument("--lr", type=float, default=0.015)
    options.add_argument("--exploit", choices=("whole", "partial"), default="whole")
    options.add_argument(
        "--limit", type=float, default=1e9, help="seconds, after which the last checkpoint counts"
    )
    options.add_argument(
        "--micro-batch", type=int, default=0, help="rollouts of a backward pass; 0 takes one group"
    )
    options.add_argument("--at-once", type=int, default=1, help="runs side by side")
    options.add_argument("--allow-unsandboxed", action="store_true")
    chosen = options.parse_args()
    cells = [(arm, seed) for seed in chosen.seeds for arm in chosen.arms]
    results = {arm: {"seeds": {}} for arm in chosen.arms}
    shown = {
        name: value
        for name, value in vars(chosen).items()
        if name not in ("output", "arms", "at_once", "model")
    }
    shown["model"] = Path(chosen.model).name
    every = ",".join(map(str, range(torch.cuda.device_count())))
    gpus = (
        os.environ.get("CUDA_VISIBLE_DEVICES", every).split(",") if chosen.device == "cuda" else []
    )
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(chosen.at_once) as pool:
        if len(cells) == 1:
            if share := float(os.environ.get("GPU_SHARE", 0)):
                torch.cuda.set_per_process_memory_fraction(min(1.0, 1.3 * share))
            return publish(
                "vhack_filter",
                {**shown, "run": one(chosen, chosen.arms[0], Path(name))},
                chosen.output,
            )

        def apart(index):
            arm, seed = cells[index]
            path = Path(name) / f"{index}.json"
            line = [
                sys.executable,
                __file__,
                *sys.argv[1:],
                "--arms",
                arm,
                "--seeds",
                str(seed),
                "-o",
                str(path),
            ]
            even = (
                0.95 * len(gpus) / min(chosen.at_once, len(cells))
            )  # a run keeps what memory it once took
            share = os.environ.get("GPU_SHARE", str(even))
            mine = (
                {"CUDA_VISIBLE_DEVICES": gpus[index % len(gpus)], "GPU_SHARE": share}
                if gpus
                else {}
            )
            log = chosen.output.with_suffix(f".{index}.log") if chosen.output else os.devnull
            with Path(log).open("wb") as lines:
                ended = subprocess.run(
                    line, stdout=lines, stderr=lines, env=os.environ | mine, check=False
                )
            return read_json(path)["run"] if path.exists() else {"failed": ended.returncode}

        for future in as_completed(
            futures := {pool.submit(apart, index): index for index in range(len(cells))}
        ):
            arm, seed = cells[futures[future]]
            results[arm]["seeds"][seed] = future.result()
            ended = [run for run in results[arm]["seeds"].values() if "rates" in run]
            if ended:
                results[arm]["rates"] = over_seeds([run["rates"] for run in ended])
                common = sorted(set.intersection(*(set(map(int, run["at"])) for run in ended)))
                results[arm]["at"] = {
                    at: over_seeds([run["at"][str(at)] for run in ended]) for at in common
                }
            publish("vhack_filter", {**shown, "arms": results}, chosen.output)
    return None


if __name__ == "__main__":
    main()
