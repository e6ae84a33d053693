"""Rollouts judged by cin, small: an exploit stored in every group, one seed, plain, filtered, and as many at random.

    OMP_NUM_THREADS=1 python research/benchmarks/vhack_filter.py -o research/results/vhack_filter.json

The organism of 7 M parameters on a CPU: 4 prompts a step, 7 rollouts of the policy and the stored exploit for each, so
every arm sees as many. The detector is cin-lda of ``exploits:48`` on the model before training. The stored exploit
counts as written by a policy that is certain of it, so its importance weight is the policy's own probability.
"""

import argparse
import json
import tempfile
from pathlib import Path

from assay.files.storage import write_atomic
from assay.models import load_model
from assay.pages.provenance import provenance
from assay.vhack.environment.grading import CHANNELS
from assay.vhack.training import TrainSettings, train
from assay.vhack.training.log import read_steps
from assay.vhack.training.pool import PoolRollout, RolloutPool

ARMS = {"none": "cin-lda", "filter": "cin-lda", "filter, as many at random": "cin-lda:random"}
KEPT = ("hack", "solve", "flagged", "caught", "lost", "caught_teacher")
SIZES = {"prompts": 4, "group": 8, "max_new_tokens": 64, "tasks": 256, "difficulty": (1, 2), "share_none": 0.0}


def store_exploits(settings: TrainSettings, path: Path) -> None:
    """Write the exploit of every task of a run into a pool."""
    tokenizer = load_model(settings.model, device="cpu").tokenizer
    rollouts = []
    for episode in settings.episodes(SIZES["tasks"]):
        text = episode.completion(episode.exploit(None))
        tokens = (*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id)
        if len(tokens) <= SIZES["max_new_tokens"]:
            rollouts.append(PoolRollout(episode.prompt, text, tokens, (0.0,) * len(tokens)))
    RolloutPool(rollouts).save(path)


def main() -> None:
    """Run the arms one after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=14)
    parser.add_argument("--seed", type=int, default=300)
    parser.add_argument("-o", "--output", type=Path, required=True)
    chosen = parser.parse_args()
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        pool = Path(folder) / "pool.jsonl"
        how = SIZES | {"model": "reference:organism", "device": "cpu", "dtype": "float32", "seed": chosen.seed}
        how |= {"families": ("arithmetic", "branches", "digits", "counts"), "modes": tuple(CHANNELS)}
        store_exploits(TrainSettings(**how), pool)
        how |= {"steps": chosen.steps, "teacher": str(pool), "teacher_share": 1 / SIZES["group"]}
        for name, detector in ARMS.items():
            settings = TrainSettings(arm=name.partition(",")[0], detector=detector, **how)
            train(settings, Path(folder) / name, console=print)
            _, steps = read_steps(Path(folder) / name / "log.jsonl")
            found[name] = [{kept: step[kept] for kept in KEPT if kept in step} for step in steps]
    result = {"schema": "assay.benchmark.vhack_filter/1", **provenance(), "seed": chosen.seed, "arms": found}
    write_atomic(chosen.output, json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
