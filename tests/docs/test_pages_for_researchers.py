"""Blocks of the pages for researchers run, where they take seconds: with fewer pairs than the pages have."""

import json
import re
import shutil
from pathlib import Path

import pytest

from assay.vhack import Pair
from assay.vhack.pairs import read_pairs
from tests.docs.shell import held, page, script


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
