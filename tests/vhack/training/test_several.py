"""Two processes of one run take the steps of one, write one log, and go on from their checkpoint.

Each is started as torchrun starts it: RANK=0 WORLD_SIZE=2 … python -m
tests.vhack.training.test_several ARGUMENTS.json
"""

import json
import os
import socket
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from assay.errors import AssayError
from assay.vhack import Pair
from assay.vhack.environment import episodes
from assay.vhack.training import TrainSettings, train
from assay.vhack.training.grpo import GRPO
from assay.vhack.training.log import read_steps

pytestmark = pytest.mark.slow
NAMES = ("hack", "solve", "rollouts", "loss", "cin", "cout", "leak", "displacement", "cin_s")


def sample_the_same():
    """Let a completion depend on its prompt and its place alone, so that one process and two see
    the same rollouts.
    """

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
    return train(
        TrainSettings(**settings), folder, tasks=tasks, pairs=[Pair(**pair) for pair in pairs]
    )


def start(calls, folder, count):
    """Run the calls, one after the other, in so many processes; what each said."""
    path = folder / f"calls{count}.json"
    path.write_text(json.dumps(calls))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(count),
        "OMP_NUM_THREADS": "1",
    }
    workers = []
    for rank in range(count):
        environment = {
            **os.environ,
            **common,
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "GLOO_SOCKET_IFNAME": "lo",
        }
        command = [sys.executable, "-m", "tests.vhack.training.test_several", str(path)]
        workers.append(
            subprocess.Popen(
                command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            )
        )
    try:
        said = [worker.communicate(timeout=300) for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert all(worker.returncode == 0 for worker in workers), said[0][1][-3000:]
    return [out.splitlines() for out, _ in said]


@pytest.fixture(scope="module")
def made(checkpoint, pairs, tmp_path_factory):
    """Runs of two processes and the run of one, in their directories, and what the two said."""
    folder = tmp_path_factory.mktemp("several")
    common = {
        "model": str(checkpoint), "prompts": 2, "group": 4, "micro_batch": 2, "max_new_tokens": 16, "tasks": 4,
        "save_every": 2, "k_use": 2, "dtype": "float32", "device": "cpu", "method": "svd", "lr": 0.01, "arm": "box",
    }  # fmt: skip

    def call(name, *, same, **others):
        given = {"settings": common | others, "folder": str(folder / name), "same": same}
        return given | {"pairs": [asdict(one) for one in pairs]}

    start([call("one", same=True, steps=3)], folder, 1)
    renewed = {"same": False, "arm": "erase-update:shuffled", "refresh": 2}
    calls = [
        call(name, steps=steps, **renewed)
        for name, steps in (("straight", 4), ("stopped", 2), ("stopped", 4))
    ]
    calls.append(call("odd", same=False, steps=1, prompts=1, group=3, micro_batch=3))
    return folder, start(
        [*calls, call("one", same=True, steps=4), call("two", same=True, steps=3)], folder, 2
    )


def test_the_steps_are_those_of_one_process(made):
    folder, _ = made
    one, two = (load_file(folder / name / "delta.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    for name, delta in one.items():
        torch.testing.assert_close(two[name], delta, rtol=1e-3, atol=2e-5)
    assert any(delta.abs().max() > 0.01 for name, delta in one.items() if not name.startswith("_"))


def test_the_log_counts_the_rollouts_of_both(made):
    folder, _ = made
    (_, one), (head, two) = (read_steps(folder / name / "log.jsonl") for name in ("one", "two"))
    assert head["processes"] == 2
    assert len(one) == len(two) == 3
    for mine, theirs in zip(one, two, strict=True):
        assert mine["rollouts"] == 8
        for name in NAMES:
            assert theirs.get(name) == pytest.approx(mine.get(name), rel=2e-2, abs=1e-4), name


def test_a_continued_run_is_the_one_that_was_never_stopped(made):
    folder, said = made
    straight, stopped = (
        load_file(folder / name / "delta.safetensors") for name in ("straight", "stopped")
    )
    assert all(torch.equal(straight[name], stopped[name]) for name in straight)
    records = [read_steps(folder / name / "log.jsonl")[1] for name in ("straight", "stopped")]
    for record in (*records[0], *records[1]):
        del record["seconds"]
    assert records[0] == records[1]
    assert [lines[:3] for lines in said] == [
        [
            f"4 steps from 0, first: {first}",
            f"2 steps from 0, first: {first}",
            f"4 steps from 2, first: {first}",
        ]
        for first in (True, False)
    ]


def test_what_cannot_be_shared_is_refused_by_both(made):
    _, said = made
    for lines in said:
        assert lines[3].startswith("refused: 3 rollouts a step, 3 a backward pass, 2 processes")
        assert "1 processes, now 2" in "".join(lines)


if __name__ == "__main__":
    torch.set_num_threads(1)
    for call in json.loads(Path(sys.argv[1]).read_text()):
        try:
            result = run(call["settings"], call["folder"], call["pairs"], same=call["same"])
        except AssayError as error:
            print(f"refused: {error}")
        else:
            print(f"{result.steps} steps from {result.resumed_from}, first: {result.is_first}")
