"""Quantised checkpoints on engines of vLLM beside transformers: honest both ways, and a cheat a fraud.

What is measured, and the refusals, are those of the benchmark from which docs/vllm.md has its table.
"""

from pathlib import Path

import pytest
import torch
from vllm_support import CASES, PRESETS, checkpoint, measure

from assay.models.device import processor
from assay.poc.vllm import compatibility
from tests.vllm.conftest import ON_GPU

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(ON_GPU, reason="formats of the CPU build"),
    pytest.mark.usefixtures("forked_engines"),
]

RUN = {
    "int8 W8A8, compressed-tensors": ("int8-rows", "CPUInt8ScaledMMLinearKernel onednn"),
    "int4 W4A16, compressed-tensors": ("int4-groups", "CPUWNA16LinearKernel"),
    "Qwen3-MoE": ("bfloat16", "experts CPUUnquantizedExperts"),
    "not quantised, cache in fp8": ("bfloat16+fp8_e4m3-cache", "vllm 0.32"),
}


WITHOUT_AVX512 = processor(torch.device("cpu")) in compatibility.WITHOUT_AVX512
NEEDS_AVX512 = pytest.mark.skipif(WITHOUT_AVX512, reason="vLLM computes it on a CPU with AVX-512 alone")


@pytest.mark.parametrize("case", [pytest.param(case, marks=() if "MoE" in case else NEEDS_AVX512) for case in RUN])
def test_a_format_is_honest_on_both_engines_and_a_cheaper_model_is_a_fraud(case: str, tmp_path: Path):
    kind, dtype = CASES[case]
    row = measure(checkpoint(kind, tmp_path), kind, dtype)
    name, kernel = RUN[case]
    assert row["fingerprint"]["dtype"] == name
    assert kernel in row["fingerprint"]["library"]
    for preset in PRESETS:
        found = row["presets"][preset]
        # 64 nonces may be too few to exclude that a tenth of them was computed cheaply; none may accuse.
        assert {found["vllm_on_transformers"], found["transformers_on_vllm"]} <= {"honest", "undecided"}, found
        assert found["cheat_on_vllm"] == "fraud", found
        assert found["residual_median"] < found["cheat_median"] / 2
        assert found["beside_the_scheduler"]["nonces"] > 0
    if "router" in row:
        # The null, and the noise: engines that round differently ask other experts where two are nearly as good.
        assert row["router"]["vllm_again"] == {"in_a_layer": 0, "in_any_layer": 0}
        assert 0 < row["router"]["vllm_from_transformers"]["in_any_layer"] < 0.15
