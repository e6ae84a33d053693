r"""Steps of TRL's GRPOTrainer that generates with vLLM: plain, with detectors that watch every
second one, with filter.

    python research/benchmarks/vhack_step.py --model shape:qwen3-0.6b \
      -o research/results/vhack_step.json

All weights are trained, with TRL's defaults. One trainer takes its steps in turns, so every way
sees the same machine, model and lengths; each step ends with a wait for the device. Weights are
random and rewards made up. Completions are of printable characters, one token each, none ends
early.
"""

import itertools
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from _common import note, parser, publish
from assay_research.study.summary import mean_of
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from assay.models import load_model
from assay.vhack.detectors import fit_judge
from assay.vhack.directions.gradients.svd import weight_svd
from assay.vhack.environment.grading import episodes
from assay.vhack.pairs.generate import environment_pairs
from assay.vhack.training import Guard


def tokenizer_of(size):
    """Return one token per byte, printable ASCII first, and others that no text has."""
    letters = [chr(byte) for byte in range(33, 127)]
    letters += sorted(set(pre_tokenizers.ByteLevel.alphabet()) - set(letters))
    names = [*letters, *(f"{letters[-1]}{number}" for number in range(size - len(letters)))]
    tokenizer = Tokenizer(
        models.BPE(vocab={name: index for index, name in enumerate(names)}, merges=[])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=names[-1], pad_token=names[-1]
    )


class Turns(TrainerCallback):
    """Let the ways take turns, and keep the seconds of each step."""

    def __init__(self, trainer, ways):
        self.trainer = trainer
        self.turn = itertools.cycle(ways)
        self.ways = ways
        self.seconds = {name: [] for name in ways}

    def on_step_begin(self, *_, **__):
        """Take the next way."""
        self.name = next(self.turn)
        for guard in self.ways.values():
            if guard is not None:
                guard.detach()
        guard = self.ways[self.name]
        if guard is not None:
            guard.attach(self.trainer)
        torch.cuda.synchronize()
        self.begun = time.perf_counter()

    def on_step_end(self, *_, **__):
        """Keep the seconds."""
        torch.cuda.synchronize()
        self.seconds[self.name].append(round(time.perf_counter() - self.begun, 3))
        note(f"{self.name}: {self.seconds[self.name][-1]:.2f} s")


def main():
    """Measure."""
    options = parser(__doc__)
    options.add_argument("--model", default="shape:qwen3-0.6b")
    for flag, default in (
        ("prompts", 8),
        ("group", 8),
        ("new-tokens", 256),
        ("rounds", 8),
        ("micro-batch", 16),
    ):
        options.add_argument(f"--{flag}", type=int, default=default)
    options.add_argument("--detectors", nargs="+", default=["cin-lda", "probe"])
    chosen = options.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        module = load_model(chosen.model, dtype="bfloat16").module
        module.save_pretrained(folder / "model")
        tokenizer_of(module.config.vocab_size).save_pretrained(folder / "model")
        model = load_model(folder / "model", dtype="bfloat16")
        config = GRPOConfig(
            str(folder / "run"),
            max_steps=(1 + 2 * len(chosen.detectors)) * (chosen.rounds + 1),
            num_generations=chosen.group,
            per_device_train_batch_size=chosen.micro_batch,
            gradient_accumulation_steps=chosen.prompts * chosen.group // chosen.micro_batch,
            max_completion_length=chosen.new_tokens,
            save_strategy="no",
            report_to="none",
            use_vllm=True,
            vllm_max_model_length=4096,
            generation_kwargs={"allowed_token_ids": list(range(94)), "ignore_eos": True},
        )

        def reward(completions, **_):
            return [float(index % 3 == 0) for index in range(len(completions))]

        tasks = Dataset.from_list(
            [{"prompt": episode.prompt} for episode in episodes(256, difficulty=(1, 1))]
        )
        trainer = GRPOTrainer(
            model.module, [reward], config, tasks, processing_class=model.tokenizer
        )
        pairs = environment_pairs(48, whole=True)
        svd = None
        turns = {"plain": None}
        for detector in chosen.detectors:
            note(f"fits {detector}")
            svd = svd or (weight_svd(model) if detector.startswith("cin") else None)
            judge = fit_judge(pairs, model, detector=detector, svd=svd)
            turns[f"watch by {detector}"] = Guard(judge, "watch", every=2)
            turns[f"filter by {detector}"] = Guard(judge, "filter")
        trainer.add_callback(clock := Turns(trainer, turns))
        trainer.train()
    rows = {}
    for name, seconds in clock.seconds.items():
        mean = mean_of(
            np.array(seconds[1:]) / np.array(clock.seconds["plain"][1:])
        )  # the first of each warms up
        rows[name] = {"seconds": seconds, "over_plain": [mean.value, mean.low, mean.high]}
    publish("vhack_step", {**vars(chosen), "output": None, "steps": rows}, chosen.output)


if __name__ == "__main__":
    main()
