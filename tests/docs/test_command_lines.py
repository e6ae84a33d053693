"""Every command line that a page shows is one that its program takes: all flags are known, and all values are read.

Pages whose commands take hours or need a GPU run here with small numbers behind the same flags, or up to the place
where weights would be read.
"""

import shlex
from pathlib import Path

import pytest

from assay.cli import run
from tests.docs.command_lines import refused, shown
from tests.docs.shell import ROOT, held, page, script
from tests.poc.validator.conftest import pins_text
from tests.poc.verdict import published

PAGES = sorted(
    path
    for folder in (".", "docs", "docs/decisions", "examples", "deploy")
    for path in (ROOT / folder).glob("*.md")
    if path.name != "troubleshooting.md"  # mistakes
    and any(shown(path.read_text(encoding="utf-8")))
)
NO_PARSER = ("benchmarks/redteam_tables.py", "scripts/page_blocks.py")
"""Programs that read their arguments as they work."""
TINY = {
    "assay poc experiment simulate": "--nodes 100 --cheating 0.02 --rounds 2 --checkers 1 --checked 4 --validators 10",
    "assay poc experiment": "--device cpu",
    "assay poc prove": "--model reference:qwen3 --nonces 0:4 --seq-len 16",
}
"""Flags behind a command, of which the last counts, that make it small."""


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
    assert len(lines) > 90
    for words in lines:
        assert "…" not in " ".join(words)
        assert words[0] == "assay" or (ROOT / words[1]).is_file(), words
    assert refused([words for words in lines if words[1] not in NO_PARSER], folder) == {}


@pytest.mark.slow
def test_lines_that_fail_are_found(folder: Path):
    lines = (
        "assay poc prove --model M --block-hash B --public-key K -o p.jsonl --nonce 0:4",
        "assay poc prove --model M --block-hash B -o p.jsonl",
        "assay poc experiment simulate --nodes many",
        "assay vhack train --model M -o run --steps 0",
        "python benchmarks/vhack_study3.py PART -o OUT",
        "python benchmarks/gpu_floor.py --modle shape:qwen3-0.6b",
        "python benchmarks/vhack_study_many.py second -o OUT --seed 8",
    )
    said = refused([shlex.split(line) for line in lines], folder)
    assert said.keys() == set(lines)
    assert all(text.startswith("exit code 2") for text in said.values()), said


def test_lines_are_found_in_blocks():
    text = "```sh\nA=1 assay doctor \\\n  --json > x   # why\ncd x\n```\n```python\nassay = 1\n```\n```\n"
    text += "torchrun --nproc-per-node 2 -m assay poc prove -o p\ntorchrun --nproc-per-node 2 benchmarks/b.py 1\n```\n"
    found = [["assay", "doctor", "--json"], ["assay", "poc", "prove", "-o", "p"], ["python", "benchmarks/b.py", "1"]]
    assert list(shown(text)) == found


def small(words: list[str]) -> list[str]:
    """Return the arguments of a line of assay and flags that make its work small."""
    line = shlex.join(words)
    flags = next(flags for command, flags in TINY.items() if line.startswith(command))
    return [*words[1:], *flags.split()]


@pytest.mark.parametrize("name", ["redteam", "redteam-responses", "experiments"])
def test_an_experiment_begins(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch):
    """Everything is checked that needs no weights, and then a model is asked for."""

    def load(*_, **__):
        raise Loaded

    class Loaded(Exception):
        """A model would be loaded."""

    monkeypatch.setattr("assay.models._load._load_trained", load)
    monkeypatch.setattr("assay.models._load.build", load)
    begun = 0
    for words in shown(page(name)):
        if words[:3] == ["assay", "poc", "experiment"] and words[3] not in ("simulate", "report"):
            with pytest.raises(Loaded):
                run(small(words))
            begun += 1
    assert begun


@pytest.mark.slow
def test_a_proof_with_the_largest_batch_and_a_simulated_network(folder: Path):
    proof, _ = (words for words in shown(page("gpu")) if words[0] == "assay")  # the second is torchrun's
    assert run(small(proof)) == 0
    simulated = [words for words in shown(page("redteam")) if words[:4] == ["assay", "poc", "experiment", "simulate"]]
    assert len(simulated) == 2
    for words in simulated:
        assert run(small(words)) == 0
    assert {path.name for path in (folder / "experiments").iterdir()} == {"simulate", "simulate-life"}


@pytest.mark.slow
def test_the_tables_of_the_red_team(folder: Path):
    (line,) = (shlex.join(words) for words in shown(page("redteam")) if words[1] in NO_PARSER)
    runs = ROOT / "benchmarks" / "results" / "experiments"
    line = line.replace("benchmarks/", f"{ROOT}/benchmarks/").replace(" experiments/", f" {runs}/")
    assert "| attack |" in held(line, folder)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_sets_of_a_network(folder: Path):
    named = [machine | {"set": f"{machine['set']}-minimax"} for machine in published.network(3, nonces=400)]
    published.write(folder / "nonces.jsonl.gz", named)
    published.write(folder / "awq.jsonl", [published.machine("awq", noise=1.0, nonces=400)])
    proofs = "assay poc prove --model reference:qwen3 --block-hash B --public-key K --seq-len 16 --nonces 0:64"
    made = "".join(f"{proofs} --batch-size {n} -o {name}.jsonl\n" for n, name in enumerate("ABC", start=6))
    said = held(script("networks", before=made, instead={"nonces.jsonl.gz  ": "nonces.jsonl.gz --audits 2  "}), folder)
    assert "int4" in said
    assert (folder / "both.json").is_file()
