"""Quantised checkpoints, models whose layers keep a state, and models that read images too, beside
transformers.
"""

from pathlib import Path

import pytest
import torch
from vllm_support import CASES, PRESETS, checkpoint, measure

from assay.models import load_model
from assay.models.device import processor
from assay.poc.vllm import compatibility
from assay.poc.vllm.vllm_engine import VLLMEngine
from tests.models.storing import make_hybrid
from tests.vllm.conftest import ON_GPU, make_round
from tests.vllm.test_inprocess import check_agreement

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(ON_GPU, reason="models of the CPU build"),
    pytest.mark.usefixtures("forked_engines"),
]


LONG = 192
"""Positions of a nonce with state: more than a block of the cache, so that its state is kept where
the block ends.
"""

BLOCKS = 48
"""Blocks of the cache, for eight nonces at once: those of a nonce that were kept would soon be
missing.
"""


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory: pytest.TempPathFactory):
    """An engine of a model with state, and the model on transformers."""
    path = make_hybrid("falcon_h1", tmp_path_factory.mktemp("hybrid") / "falcon_h1")
    # The cache of prefixes is that of a server. A step takes less than a nonce, whose state is
    # carried to the next.
    options = {
        "enforce_eager": True,
        "max_model_len": 256,
        "max_num_batched_tokens": 160,
        "max_num_seqs": 8,
    }
    options |= {"num_gpu_blocks_override": BLOCKS, "in_flight": 8, "enable_prefix_caching": True}
    with VLLMEngine(str(path), dtype="float32", batch_size=8, seq_len=LONG, **options) as engine:
        yield engine, load_model(path, dtype="float32", device="cpu")


@pytest.mark.parametrize("preset", PRESETS)
def test_nonces_with_state_are_those_of_transformers(hybrid, preset: str):
    engine, model = hybrid
    check_agreement(engine, model, make_round(preset, seq_len=LONG), preset)


def check(row: dict) -> None:
    """Check that both engines find each other honest, and the cheaper model a fraud.

    64 nonces may be too few to exclude that a tenth of them was computed cheaply; none may accuse.
    """
    for preset in PRESETS:
        found = row["presets"][preset]
        assert {found["vllm_on_transformers"], found["transformers_on_vllm"]} <= {
            "honest",
            "undecided",
        }, found
        assert found["cheat_on_vllm"] == "fraud", found
        assert found["residual_median"] < found["cheat_median"] / 2
        assert found["beside_the_scheduler"]["nonces"] > 0


def test_a_checkpoint_that_reads_images_is_honest_as_text_on_both_engines(tmp_path: Path):
    kind, dtype = CASES["Qwen2.5-VL, as text"]
    check(measure(checkpoint(kind, tmp_path), kind, dtype))


RUN = {
    "int8 W8A8, compressed-tensors": ("int8-rows", "CPUInt8ScaledMMLinearKernel onednn"),
    "int4 W4A16, compressed-tensors": ("int4-groups", "CPUWNA16LinearKernel"),
    "Qwen3-MoE": ("bfloat16", "experts CPUUnquantizedExperts"),
    "not quantised, cache in fp8": ("bfloat16+fp8_e4m3-cache", "vllm 0.32"),
}


WITHOUT_AVX512 = processor(torch.device("cpu")) in compatibility.WITHOUT_AVX512
NEEDS_AVX512 = pytest.mark.skipif(
    WITHOUT_AVX512, reason="vLLM computes it on a CPU with AVX-512 alone"
)


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=() if "MoE" in case else NEEDS_AVX512) for case in RUN]
)
def test_a_format_is_honest_on_both_engines_and_a_cheaper_model_is_a_fraud(
    case: str, tmp_path: Path
):
    kind, dtype = CASES[case]
    row = measure(checkpoint(kind, tmp_path), kind, dtype)
    name, kernel = RUN[case]
    assert row["fingerprint"]["dtype"] == name
    assert kernel in row["fingerprint"]["library"]
    check(row)
    if "router" in row:
        # The null, and the noise: engines that round differently ask other experts where two are
        # nearly as good.
        assert row["router"]["vllm_again"] == {"in_a_layer": 0, "in_any_layer": 0}
        assert 0 < row["router"]["vllm_from_transformers"]["in_any_layer"] < 0.15
