"""Blocks of the pages of measurements run on a CPU, with small numbers behind the same flags.

They use the bundled models. Red teams have smaller ones, for they fine-tune and run dozens of variants. Programs of
benchmarks lie in a folder of their own, so what they write is not what is committed.
"""

from pathlib import Path

import pytest

from tests.docs.shell import ROOT, held, script

pytestmark = pytest.mark.usefixtures("warm")
PROOFS = """\
python - <<'END'
from assay import load_model
from assay.poc import Round, prove

for name, block, dtype, nonces in PROOFS:
    round, made = Round(block_hash=block, public_key=KEY, seq_len=16), load_model("reference:qwen3", dtype=dtype)
    prove(made, round, range(nonces), output=f"{name}.jsonl")
END
"""
MODELS = """\
python - <<'END'
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from assay.models import load_tokenizer

shape = {
    "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 4096, "max_position_embeddings": 512,
    "tie_word_embeddings": False, "initializer_range": 0.15,
}
for name, config, model in (("qwen3", Qwen3Config, Qwen3ForCausalLM), ("llama", LlamaConfig, LlamaForCausalLM)):
    torch.manual_seed(0)
    made = model(config(**shape))
    made.lm_head.weight.data *= 2  # as sure of the next token as a trained model
    made.save_pretrained(f"small-{name}")
    load_tokenizer(f"reference:{name}").save_pretrained(f"small-{name}")
END
"""
"""Lines that make models of few random weights that read the text of the bundled ones."""


def proofs(*, block: str = "BLOCK", key: str = "KEY", blocks: int = 0, nonces: int = 128, **dtypes: str) -> str:
    """Return lines that prove a block once under each name, in its format, and other blocks once."""
    made = [(name, block, dtype, nonces) for name, dtype in dtypes.items()]
    made += [(f"block{turn}", f"block {turn}", "bfloat16", 32) for turn in range(blocks)]
    return PROOFS.replace("PROOFS", repr(made)).replace("KEY", repr(key))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder in which the programs of a checkout lie, and no results but those of finished studies."""
    programs = tmp_path / "research" / "benchmarks"
    (programs / "results").mkdir(parents=True)
    for path in (ROOT / "research" / "benchmarks").glob("*.py"):
        (programs / path.name).symlink_to(path)
    return tmp_path


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_experiments(folder: Path):
    tiny = "--seq-len 16 --batch-size 16"
    of_one = f"--models reference:qwen3 --blocks a,b --device cpu {tiny}"
    small = {
        "assay poc experiment approaches": f"{of_one} --approaches poc-2.0 --nonces 16 --checked 8 --timed 0",
        "assay poc experiment weights": f"{of_one} --nonces 16",
        "assay poc experiment matrix": f"{of_one} --modes sign-flips --duration 1 --public-keys node_A",
    }
    held(script("experiments", before=proofs(proof="bfloat16", blocks=8), small=small), folder)
    runs = {path.name for path in (folder / "experiments").iterdir()}
    assert runs == {"NAME", "h200", "h200-shapes", "h200-deep", "cpu"}
    assert (folder / "experiments" / "NAME" / "report.html").is_file()


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_red_teams(folder: Path):
    simulated = "--nodes 100 --cheating 0.02 --rounds 2 --checkers 1 --checked 4 --validators 10"
    small = {
        "assay poc experiment redteam": "--models ./small-llama --device cpu --nonces 8 --honest 64 --searched 0 "
        "--seq-len 16 --batch-size 16",
        "assay poc experiment responses": "--models ./small-qwen3 --device cpu --honest 12 --responses 2 "
        "--prompt-tokens 16 --seq-len 96 --batch-size 12",
        "assay poc experiment simulate": simulated,
    }
    held(script("redteam", before=MODELS, small=small), folder)
    held(script("redteam-responses", small=small), folder)
    runs = {"redteam-llama-float16", "simulate", "simulate-life", "responses-qwen3"}
    assert {path.name for path in (folder / "experiments").iterdir()} == runs


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_proofs_of_a_gpu_without_one(folder: Path):
    tiny = "--model reference:qwen3 --nonces 0:16 --seq-len 16 --device cpu"
    small = {"assay poc prove": tiny, "torchrun --nproc-per-node 2 -m assay poc prove": f"{tiny} --batch-size 8"}
    held(script("gpu", instead={"--nproc-per-node 8": "--nproc-per-node 2"}, small=small), folder)
    one, both = ((folder / f"{name}.jsonl").read_text().splitlines() for name in ("proof", "eight"))
    assert len(one) == len(both) == 18  # header, nonces, footer


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_noise_between_vllm_and_transformers(folder: Path):
    made = proofs(vllm="float32", transformers="bfloat16", block="B", key="K") + "cp vllm.jsonl proof.jsonl\n"
    small = {"assay poc verify": "--seq-len 16 --dtype bfloat16"}  # as on a machine without vLLM
    said = held(script("vllm", before=made, instead={"MODEL": "reference:qwen3"}, small=small), folder)
    assert "honest" in said
