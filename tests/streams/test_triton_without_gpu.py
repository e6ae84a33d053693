"""The kernels of Gumbel numbers where triton is and a GPU is not: compiled for one, and
interpreted.

`make test-vllm` runs this file too, because triton comes with vLLM.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from assay.streams import get_backend, seeds, step_seeds
from assay.streams.arrays import digest

from .inverse import seed_for

pytest.importorskip("triton", reason="triton is not installed: run make test-vllm")

KERNELS = {
    "gumbels": (
        "hash_kernel",
        {"seeds_B": "*i32", "out_BN": "*fp32", "n": "i32"},
        {"KIND": "gumbels", "BLOCK": 1024},
    ),
    "every row": ("add_gumbels_kernel", {"rows_N": "*i32"}, {"HAS_ROWS": False, "BLOCK": 1024}),
    "some rows": ("add_gumbels_kernel", {"rows_N": "*i64"}, {"HAS_ROWS": True, "BLOCK": 1024}),
}
SCORES = {"seeds_N": "*i32", "scores_RV": "*fp32", "rows": "i32", "columns": "i32", "stride": "i32"}
WIDE = ("scores_RV", "columns", "stride")


def compiled(name):
    """What triton makes of a kernel for the H200, with scores whose rows are aligned."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from assay.streams import triton_kernels

    function, types, constants = KERNELS[name]
    kernel = getattr(triton_kernels, function)
    if function == "add_gumbels_kernel":
        types = SCORES | types
    signature = {argument: types.get(argument, "constexpr") for argument in kernel.arg_names}
    aligned = {
        (kernel.arg_names.index(argument),): [["tt.divisibility", 16]]
        for argument in WIDE
        if argument in types
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    return triton.compile(
        source, target=GPUTarget("cuda", 90, 32), options={"enable_fp_fusion": False}
    )


@pytest.mark.parametrize("name", KERNELS)
def test_no_operation_is_fused(name):
    made = compiled(name)
    assert re.findall(r"\b(?:fma|mad)\.[\w.]*f32", made.asm["ptx"]) == []
    assert len(re.findall(r"\bmul\.(?:rn\.)?f32", made.asm["ptx"])) > 30  # the formulas are there
    assert "FFMA" not in made.asm["sass"]


@pytest.mark.parametrize("name", ["every row", "some rows"])
def test_scores_are_read_and_written_once_in_wide_pieces(name):
    machine = compiled(name).asm["sass"]
    numbers = 1024 // (4 * 32)  # of each thread
    for instruction in ("LDG", "STG"):
        assert len(re.findall(rf"\b{instruction}\.E\.128\b", machine)) == numbers // 4


@pytest.fixture(scope="module")
def interpreted():
    """What the interpreter gives, which has to be chosen before triton is imported."""
    command = [sys.executable, "-m", "tests.streams.interpreted"]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    root = Path(__file__).parents[2]
    done = subprocess.run(
        command, cwd=root, env=environment, capture_output=True, text=True, check=True, timeout=250
    )
    return json.loads(done.stdout)


def test_the_interpreter_gives_the_bits_of_the_definition(interpreted):
    from .interpreted import COLUMNS, HASHES, NUMBERS, STEPS, TEXTS, scores

    backend = get_backend("numpy")
    assert interpreted["gumbels"] == digest(
        np.asarray(backend.gumbels(seed_for(HASHES, 0), 1))[:, 0]
    )
    for name, rows in (("every row", [0, 1, 2, 3]), ("some rows", NUMBERS)):
        expected = scores().numpy()
        expected[rows, :COLUMNS] += np.asarray(backend.gumbels(seeds(TEXTS[: len(rows)]), COLUMNS))
        assert interpreted[name] == digest(expected)
    words = seeds(TEXTS, strength=256)
    by_row = [step_seeds(words[i : i + 1], STEPS[i : i + 1])[0, 0] for i in range(len(TEXTS))]
    assert interpreted["seeds"] == digest(np.array(by_row, np.uint32))
