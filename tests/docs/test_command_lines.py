"""Every command line that a page shows is one that its program takes: all flags are known, and all values are read.

Most of them also run (docs/blocks.md).
"""

import re
import shlex
from pathlib import Path

import pytest

from assay.cli import app
from assay.cli.framework import leaves
from research.tests import published
from tests.cli.test_app import FROZEN
from tests.docs.command_lines import VARIABLES, refused, shown
from tests.docs.shell import ROOT, held, script
from tests.poc.validator.conftest import pins_text

PAGES = sorted(
    path
    for folder in (".", "docs", "examples", "deploy")
    for path in (ROOT / folder).glob("*.md")
    if any(shown(path.read_text(encoding="utf-8")))
)
NO_PARSER = ("scripts/page_blocks.py",)
"""Programs that read their arguments as they work."""


@pytest.fixture
def folder(small_model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the files that a command reads before its work."""
    (tmp_path / "pins.toml").write_text(pins_text(small_model))
    (tmp_path / "keys").write_text("k" * 20 + "\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
def test_every_command_line_is_read_by_its_program(folder: Path):
    lines = [words for path in PAGES for words in shown(path.read_text(encoding="utf-8"))]
    assert len(lines) > 60
    for words in lines:
        assert "…" not in " ".join(words)
        assert words[0] == "assay" or (ROOT / words[1]).is_file(), words
    assert refused([words for words in lines if words[1] not in NO_PARSER], folder) == {}


@pytest.mark.slow
def test_every_example_of_a_help_text_is_read_by_its_program(folder: Path):
    texts = (f"{command.help}\n{command.epilog}" for _, command in leaves(app))
    found = [line.split() for text in texts for line in re.findall(r"Example: (assay [^\n]+)", text)]
    assert len(found) >= len(FROZEN)
    assert refused([[VARIABLES.get(word, word) for word in words] for words in found], folder) == {}


@pytest.mark.slow
def test_lines_that_fail_are_found(folder: Path):
    lines = (
        "assay poc prove --model M --block-hash B --public-key K -o p.jsonl --nonce 0:4",
        "assay poc prove --model M --block-hash B -o p.jsonl",
        "assay poc experiment simulate --nodes many",
        "assay vhack train --model M -o run --steps 0",
        "python research/benchmarks/vhack_study3.py PART -o OUT",
        "python research/benchmarks/gpu_floor.py --modle shape:qwen3-0.6b",
        "python research/benchmarks/soak.py service --kills many",
    )
    said = refused([shlex.split(line) for line in lines], folder)
    assert said.keys() == set(lines)
    assert all(text.startswith("exit code 2") for text in said.values()), said


def test_lines_are_found_in_blocks():
    text = "```sh\nA=1 assay doctor \\\n  --json > x   # why\ncd x\n```\n```python\nassay = 1\n```\n```\n"
    text += "torchrun --nproc-per-node 2 -m assay poc prove -o p\n"
    text += "torchrun --nproc-per-node 2 research/benchmarks/b.py 1\n```\n"
    found = [
        ["assay", "doctor", "--json"],
        ["assay", "poc", "prove", "-o", "p"],
        ["python", "research/benchmarks/b.py", "1"],
    ]
    assert list(shown(text)) == found


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.usefixtures("warm")
def test_sets_of_a_network(folder: Path):
    named = [machine | {"set": f"{machine['set']}-minimax"} for machine in published.network(3, nonces=400)]
    published.write(folder / "nonces.jsonl.gz", named)
    published.write(folder / "awq.jsonl", [published.machine("awq", noise=1.0, nonces=400)])
    proofs = "assay poc prove --model reference:qwen3 --block-hash B --public-key K --seq-len 16 --nonces 0:64"
    made = "".join(f"{proofs} --batch-size {n} -o {name}.jsonl\n" for n, name in enumerate("ABC", start=6))
    said = held(script("networks", before=made, instead={"nonces.jsonl.gz  ": "nonces.jsonl.gz --audits 2  "}), folder)
    assert "int4" in said
    assert (folder / "both.json").is_file()
