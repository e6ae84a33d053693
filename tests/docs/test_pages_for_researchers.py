"""Blocks of the pages for researchers run, where they take seconds: with fewer pairs than the pages have."""

import json
import re
import shutil
from pathlib import Path

import pytest

from assay.vhack import Pair
from assay.vhack.pairs import read_pairs
from tests.docs.shell import ROOT, held, page, script

PROOF = "assay poc prove --model reference:qwen3 --block-hash BLOCK --public-key KEY --seq-len 16 -o proof.jsonl"
LOSS = "loss = model.module(torch.arange(24).reshape(2, 12)).logits.square().mean()\n"


def commands(name: str, beginning: str) -> str:
    """Return the block of a page that begins with some words."""
    blocks = re.findall(r"^```\w*\n(.*?)^```$", page(name), flags=re.DOTALL | re.MULTILINE)
    (found,) = (block for block in blocks if block.startswith(beginning))
    return found


def test_the_numbers_of_the_statistics(tmp_path: Path):
    mean, _, rate, _ = held(script("statistics"), tmp_path).split(maxsplit=3)
    assert 1.414 < float(mean) < 2**0.5
    assert 0.5 < float(rate) < 0.6


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_basis_of_v_hack(tmp_path: Path):
    instead = {"generated:48": "generated:12", "generate_pairs(48)": "generate_pairs(12)"}
    said = held(script("vhack", instead=instead), tmp_path)
    assert "axes" in said
    assert {path.name for path in tmp_path.iterdir()} >= {"basis.safetensors", "hack.safetensors", "extract.py"}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_checks_of_a_basis(tmp_path: Path):
    for pool, completion in (("hacking", "sys.exit(0)"), ("clean", "return a + b")):
        samples = ({"prompt": f"def add_{n}(a, b):", "completion": completion} for n in range(8))
        (tmp_path / f"{pool}.jsonl").write_text("".join(f"{json.dumps(sample)}\n" for sample in samples))
    instead = {"generated:96": "generated:12", "generate_pairs(96)": "generate_pairs(12)"}
    held(script("vhack-checks", instead=instead), tmp_path)
    assert {path.name for path in tmp_path.iterdir()} >= {"check.html", "check.json", "pools.json"}


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("jq") is None, reason="needs jq: apt-get install jq")
def test_pairs_of_ones_own(tmp_path: Path):
    pair, tests = re.findall(r"```json\n(.*?)```", page("vhack-pairs"), flags=re.DOTALL)
    (tmp_path / "mine.jsonl").write_text(pair)
    (tmp_path / "tests.jsonl").write_text(tests)
    preference = {"prompt": "p", "rejected": "h", "chosen": "c", "source": "s"}
    (tmp_path / "preferences.jsonl").write_text(json.dumps(preference))
    verify = "assay vhack pairs verify mine.jsonl --tests tests.jsonl\n"
    assert "1 of 1 pairs" in held(script("vhack-pairs", before=verify), tmp_path)
    assert read_pairs(tmp_path / "pairs.jsonl") == [Pair("p", "h", "c", "s")]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_training_loop_of_ones_own(tmp_path: Path):
    step = commands("vhack-training", "import torch\n").replace("environment_pairs(48", "environment_pairs(12")
    gates = commands("vhack-training", "with adapter.per_sample()")
    made = 'from assay.vhack.delta import Gate\ngate, threshold = Gate("none"), 0.0\n'
    made += "optimizer = ProjectedOptimizer(inner, adapter, basis, gate=gate, max_norm=1.0)\n"
    program = step.replace("loss.backward()", f"{LOSS}loss.backward()")
    program = program.replace(
        "adapter.save(", made + gates.replace("    loss.", f"    {LOSS}    loss.") + "adapter.save("
    )
    (tmp_path / "loop.py").write_text(program)
    held("python loop.py", tmp_path)
    assert (tmp_path / "delta.safetensors").is_file()
    assert (tmp_path / "trained" / "model.safetensors").is_file()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_rates_of_valid_nonces(tmp_path: Path):
    rates = commands("experiments", "assay poc calibrate --valid-rate 0.1 ")
    of_one_block, _, _ = rates.partition("assay poc calibrate --valid-rate 0.1 block*.jsonl")
    said = held(f"set -e\n{PROOF} --nonces 0:128\n{of_one_block}", tmp_path)
    assert len(re.findall(r"\bagrees +True\b", said)) == 2


@pytest.mark.slow
def test_the_report_of_a_study(tmp_path: Path):
    (command,) = re.findall(r"^assay vhack report .*$", page("vhack-results"), flags=re.MULTILINE)
    held(command.replace("benchmarks/results", str(ROOT / "benchmarks" / "results")), tmp_path)
    assert "<svg" in (tmp_path / "page.html").read_text()
