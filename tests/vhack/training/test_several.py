"""Two processes of one run take the steps of one, write one log, and go on from their checkpoint."""

import json
import os
import socket
import subprocess
import sys
from dataclasses import asdict

import pytest
import torch
from safetensors.torch import load_file

from assay.vhack.training.log import read_steps

NAMES = ("hack", "solve", "rollouts", "loss", "cin", "cout", "leak", "displacement", "cin_s")


def start(calls, folder, count):
    """Run the calls, one after the other, in so many processes; what each said."""
    path = folder / f"calls{count}.json"
    path.write_text(json.dumps(calls))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count), "OMP_NUM_THREADS": "1"}
    workers = []
    for rank in range(count):
        environment = {**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank), "GLOO_SOCKET_IFNAME": "lo"}
        command = [sys.executable, "-m", "tests.vhack.training.several", str(path)]
        workers.append(
            subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
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
        "save_every": 2, "k_use": 2, "dtype": "float32", "device": "cpu", "method": "svd", "lr": 0.01,
    }  # fmt: skip

    def call(name, *, same, **others):
        settings = {**common, **others}
        return {
            "settings": settings,
            "folder": str(folder / name),
            "pairs": [asdict(one) for one in pairs],
            "same": same,
        }

    start([call("one", same=True, steps=3)], folder, 1)
    said = start(
        [
            call("straight", same=False, steps=4, arm="erase-update:shuffled", refresh=2),
            call("stopped", same=False, steps=2, arm="erase-update:shuffled", refresh=2),
            call("stopped", same=False, steps=4, arm="erase-update:shuffled", refresh=2),
            call("odd", same=False, steps=1, prompts=1, group=3, micro_batch=3),
            call("one", same=True, steps=4),
            call("two", same=True, steps=3),
        ],
        folder,
        2,
    )
    return folder, said


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
    straight, stopped = (load_file(folder / name / "delta.safetensors") for name in ("straight", "stopped"))
    assert all(torch.equal(straight[name], stopped[name]) for name in straight)
    records = [read_steps(folder / name / "log.jsonl")[1] for name in ("straight", "stopped")]
    for record in (*records[0], *records[1]):
        del record["seconds"]
    assert records[0] == records[1]
    assert [lines[:3] for lines in said] == [
        [f"4 steps from 0, first: {first}", f"2 steps from 0, first: {first}", f"4 steps from 2, first: {first}"]
        for first in (True, False)
    ]


def test_what_cannot_be_shared_is_refused_by_both(made):
    _, said = made
    for lines in said:
        assert lines[3].startswith("refused: 3 rollouts a step, 3 a backward pass, 2 processes")
        assert "1 processes, now 2" in "".join(lines)
