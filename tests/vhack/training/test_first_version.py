"""A run that the first version began goes on."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from assay.vhack.training import train

FIRST = Path(__file__).parents[2] / "vectors" / "first"


@pytest.mark.slow
def test_a_checkpoint_of_the_first_version_goes_on(tasks, pairs, settings, checkpoint, pool, tmp_path):
    shutil.copytree(FIRST / "training", tmp_path / "run")
    log = tmp_path / "run" / "log.jsonl"
    log.write_text(log.read_text().replace('"MODEL"', f'"{checkpoint}"').replace('"POOL"', f'"{pool}"'))
    common = {"refresh": 1, "arm": "erase-update:shuffled", "save_every": 2}
    result = train(settings(steps=4, **common), tmp_path / "run", tasks=tasks, pairs=pairs)
    assert (result.resumed_from, result.steps) == (2, 4)
    now, then = load_file(tmp_path / "run" / "delta.safetensors"), load_file(FIRST / "training_step_4.safetensors")
    assert now.keys() == then.keys()
    for name, tensor in then.items():
        torch.testing.assert_close(now[name], tensor, rtol=1e-4, atol=1e-6)
