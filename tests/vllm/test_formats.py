"""Quantised checkpoints on engines of vLLM beside transformers: honest both ways, and a cheat a fraud.

What is measured, and the refusals, are those of the benchmark from which docs/vllm.md has its table.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from vllm_support import CASES, PRESETS, checkpoint, measure

from assay.errors import AssayError
from assay.models.device import processor
from assay.poc.vllm import compatibility
from tests.models.storing import FOUR_BITS
from tests.vllm.conftest import ON_GPU, ROOT

pytestmark = [
    pytest.mark.skipif(ON_GPU, reason="formats of the CPU build"),
    pytest.mark.usefixtures("forked_engines"),
]

RUN = {
    "int8 W8A8, compressed-tensors": ("int8-rows", "CPUInt8ScaledMMLinearKernel onednn"),
    "int4 W4A16, compressed-tensors": ("int4-groups", "CPUWNA16LinearKernel"),
    "int4 W4A16, AWQ": ("int4-groups", "CPUWNA16LinearKernel"),
    "int4 W4A16, GPTQ": ("int4-groups", "CPUWNA16LinearKernel"),
    "Qwen3-MoE": ("bfloat16", "experts CPUUnquantizedExperts"),
    "not quantised, cache in fp8": ("bfloat16+fp8_e4m3-cache", "vllm 0.32"),
}
REFUSED = {
    "int4 W4A16, compressed-tensors, in float32": "pass --dtype bfloat16",
    "fp8 by tensor": "a checkpoint in float8 on cpu",
    "fp8 by block of 128 x 128": "a checkpoint in float8-block on cpu",
    "Qwen3-MoE, int8 W8A8, compressed-tensors": "experts in int8-rows on cpu",
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


@pytest.mark.parametrize("case", REFUSED)
def test_a_format_that_was_not_run_is_refused_before_an_engine_is_loaded(case: str, tmp_path: Path, monkeypatch):
    from vllm.v1.engine.async_llm import AsyncLLM

    def started(*args: object, **kwargs: object) -> None:
        raise AssertionError("an engine was loaded")

    monkeypatch.setattr(AsyncLLM, "from_vllm_config", started)
    kind, dtype = CASES[case]
    with pytest.raises(AssayError) as refusal:
        measure(checkpoint(kind, tmp_path), kind, dtype)
    assert REFUSED[case] in str(refusal.value)


@NEEDS_AVX512
def test_single_layers_multiply_as_those_of_the_transformers_engine():
    command = [sys.executable, "-m", "tests.vllm.layers"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=1000, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    for form in FOUR_BITS:
        assert max(found[f"{form} bfloat16"], found[f"{form} float16"]) < 1e-4
    assert max(found["int8 bfloat16"], found["int8 float16"]) < 1e-3
    if isinstance(found["block bfloat16"], str):
        assert "AMX" in found["block bfloat16"]
