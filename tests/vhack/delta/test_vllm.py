"""A vLLM that is given the weights of each step generates with the trained model; needs vLLM on this machine."""

import importlib.util
import json
import subprocess
import sys

import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
]


def test_it_samples_with_the_merged_weights_of_every_step(tmp_path):
    command = [sys.executable, "-m", "tests.vhack.delta.sampled", str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-4000:]
    steps = [json.loads(line) for line in run.stdout.splitlines() if line.startswith('{"difference"')]
    assert len(steps) == 3
    assert all(step["difference"] < 1e-4 for step in steps)  # NaN fails too
    assert len({step["first"] for step in steps}) == 3  # each step was another model
