"""One of several processes of a run, started as torchrun starts them; a program of its own.

RANK=0 WORLD_SIZE=2 … python -m tests.vhack.training.several ARGUMENTS.json
"""

import json
import sys
from pathlib import Path

import torch

from assay.errors import AssayError
from assay.vhack import Pair
from assay.vhack.environment import episodes
from assay.vhack.training import TrainSettings, train
from assay.vhack.training.grpo import GRPO


def sample_the_same():
    """Let a completion depend on its prompt and its place alone, so that one process and two see the same rollouts."""

    def sampled(self, prompt_ids, *_, **__):
        rows = []
        first = self.processes.index * len(prompt_ids) + 1000 * self.state.global_step
        for place, ids in enumerate(prompt_ids, start=first):
            generator = torch.Generator().manual_seed(sum(ids) + 7 * place)
            rows.append(torch.randint(97, 122, (5 + place % 7,), generator=generator).tolist())
        return rows, None

    GRPO._generate_single_turn = sampled
    # Paid by the text, for what such a model writes solves nothing.
    GRPO._calculate_rewards = by_text


def by_text(self, inputs, prompts, completions, completion_ids_list):
    from accelerate.utils import gather

    self.reward(prompts, completions, [one["episode"] for one in inputs])
    paid = [[float(sum(ids) % 3)] for ids in completion_ids_list]
    return gather(torch.tensor(paid, device=self.accelerator.device))


def run(settings, folder, pairs, *, same):
    if same:
        sample_the_same()
    tasks = episodes(4, modes=["exit_code"], difficulty=1)
    return train(TrainSettings(**settings), folder, tasks=tasks, pairs=[Pair(**pair) for pair in pairs])


if __name__ == "__main__":
    torch.set_num_threads(1)
    for call in json.loads(Path(sys.argv[1]).read_text()):
        try:
            result = run(call["settings"], call["folder"], call["pairs"], same=call["same"])
        except AssayError as error:
            print(f"refused: {error}")
        else:
            print(f"{result.steps} steps from {result.resumed_from}, first: {result.is_first}")
