"""The kernel of products in eight bits where triton is and a GPU is not: interpreted, against the
definition.
"""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="triton is not installed: run make test-vllm")

INTERPRETED = """
import json
import torch
from assay.models.triton_products import multiply
from assay.models.eight_bits import CUDA_BLOCK, INT8, float8_blocks
from tests.models.storing import rounded_weight

def random(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))

found = {}
for by in (INT8, float8_blocks(*CUDA_BLOCK)):
    for rows, width, outputs, ends in ((5, 160, 48, None), (150, 256, 300, None), (150, 160, 256, [3, 3, 20, 150])):
        x = by.round(random(rows, width, seed=1))
        if ends is None:
            given = x, rounded_weight(random(outputs, width, seed=2), by)
            ours, theirs = multiply(*x, *given[1], None, torch.float32), by.product(*given, None, torch.float32)
        else:
            weights = rounded_weight(random(len(ends), outputs, width, seed=2), by)
            given = x, weights, torch.tensor(ends, dtype=torch.int32), torch.float32
            ours, theirs = multiply(*x, *weights, *given[2:]), by.grouped_product(*given)
        found[f"{by.name} {rows} {ends}"] = ((ours - theirs).norm() / theirs.norm()).item()
print(json.dumps(found))
"""


def test_products_are_those_of_the_definition():
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    run = subprocess.run(
        [sys.executable, "-c", INTERPRETED], capture_output=True, text=True, env=environment
    )
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    assert len(found) == 6
    for name, error in found.items():
        # The definition of float8 rounds to bfloat16.
        assert error == 0 if name.startswith("int8") else error < 2**-8, name
