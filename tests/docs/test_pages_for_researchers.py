"""Blocks of the pages for researchers run, where they take seconds: with fewer pairs than the pages have."""

import json
import re
import shutil
from pathlib import Path

import pytest

from assay.vhack import Pair
from assay.vhack.pairs import generate_pairs, read_pairs, write_pairs
from tests.docs.shell import held, page, script

pytestmark = pytest.mark.usefixtures("warm")


def blocks(name: str, kind: str) -> list[str]:
    return re.findall(rf"^```{kind}\n(.*?)^```$", page(name), flags=re.DOTALL | re.MULTILINE)


def test_the_numbers_of_the_statistics(tmp_path: Path):
    rate, target = held(script("statistics"), tmp_path).split()
    assert 0.5 < float(rate) < 0.6
    assert 1.40 < float(target) < 1.41


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_basis_of_v_hack(tmp_path: Path):
    instead = {"generated:48": "generated:12", "generate_pairs(48)": "generate_pairs(12)"}
    said = held(script("vhack", instead=instead), tmp_path)
    assert "axes" in said
    assert {path.name for path in tmp_path.iterdir()} >= {"basis.safetensors", "hack.safetensors"}


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
    pair, tests = blocks("vhack-pairs", "json")
    (tmp_path / "mine.jsonl").write_text(pair)
    (tmp_path / "tests.jsonl").write_text(tests)
    preference = {"prompt": "p", "rejected": "h", "chosen": "c", "source": "s"}
    (tmp_path / "preferences.jsonl").write_text(json.dumps(preference))
    verify = "assay vhack pairs verify mine.jsonl --tests tests.jsonl\n"
    assert "1 of 1 pairs" in held(script("vhack-pairs", before=verify), tmp_path)
    assert read_pairs(tmp_path / "pairs.jsonl") == [Pair("p", "h", "c", "s")]


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_training(tmp_path: Path):
    pytest.importorskip("trl")
    (beginning,) = (body for body in blocks("vhack-training", "python") if "arm_named(" in body)
    made, _, _ = beginning.partition("adapter = DeltaS")
    trainer = "from pathlib import Path\n\nfrom trl import GRPOConfig\n"
    of_two = "per_device_train_batch_size=2, num_generations=2, max_completion_length=8, use_cpu=True"
    instead = {
        "exploits:48": "exploits:12",
        "DIR": "reference:organism",
        "path/of/a/cheater": "reference:organism",
        "episodes(512": "episodes(4",
        trainer: f"{made}{trainer}",
        "max_steps=100": f"max_steps=1, {of_two}",
    }
    of_few, of_one = "--max-new-tokens 8 --per-task 1", "--steps 1 --prompts 2 --group 2 --max-new-tokens 8"
    small = {
        "assay vhack train --model reference:organism --steps": f"{of_one} --pairs exploits:12",
        "assay vhack train": of_one,
        "assay vhack sample": f"{of_few} --tasks 4",
        "assay vhack evaluate --model": of_few,
        "assay vhack fuzz": "--count 20 --output fuzz.json",
    }
    write_pairs(tmp_path / "mine.jsonl", generate_pairs(12))
    held(script("vhack-training", instead=instead, small=small), tmp_path)
    for name in ("delta", "runs/held-0/delta", "run/delta", "trained/model", "merged/model"):
        assert (tmp_path / f"{name}.safetensors").is_file(), name
    for name in ("samples.jsonl", "graded.jsonl", "result.json", "pool.jsonl", "fuzz.json"):
        assert (tmp_path / name).is_file(), name
