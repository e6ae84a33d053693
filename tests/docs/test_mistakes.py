"""A mistake is answered in three parts that name what to change, before a model is loaded; the page shows them all."""

import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

import mistakes  # noqa: E402
from mistake_commands import VERIFY  # noqa: E402

COMMANDS = [command for commands in mistakes.MISTAKES.values() for command in commands]
NAMED = re.compile(r"(?<![\w-])(--[a-z]|-[no]\b)|\b[A-Z]{5,}\b|\([A-Z]+\)|did you mean|see assay|whl\[[a-z]+\]")
"""A flag, an argument, a word that was meant, the help of the command, or an extra to install."""
TO_CHANGE = {
    "assay poc serve --model reference:qwen3 --data-dir mine --port 8000": "--port",
    "assay poc serve --model reference:qwen3 --data-dir busy --port 0": "--data-dir",
    "assay poc calibrate few.jsonl theirs.jsonl -o calibration.json": "--nonces",
    "assay poc calibrate-responses answers.jsonl --model reference:qwen3 -o responses.json": "RECEIPTS",
    "assay poc serve --model reference:qwen3 --seq-len 99999": "--seq-len",
    "assay poc serve --model reference:qwen3 --ledger empty": "--ledger",
    "assay poc serve --model reference:qwen3 --data-dir new --ledger strict.sqlite3": "--alpha",
    "assay poc validator --model reference:qwen3 --pins agreed.toml --data-dir life": "--alpha",
    "assay poc calibrate-responses answers.jsonl others.jsonl --model reference:qwen3 -o responses.json": "RECEIPTS",
    "assay models info sizes": "REFERENCE",
    "assay poc validator --model reference:qwen3 --pins long.toml": "--pins",
    "assay vhack check --model reference:qwen3 --pairs generated:1": "--pairs",
    "assay vhack sample --model reference:organism -o samples.jsonl --max-new-tokens 9999": "--max-new-tokens",
    "assay vhack evaluate --samples preferences.jsonl --model reference:organism": "--model",
    "assay vhack check --model reference:qwen3 --basis stale.safetensors": "--basis",
    **dict(zip(mistakes.MISSING, ("whl[serve]", "whl[vllm]", "whl[quant]", "whl[train]"), strict=True)),
}
"""What to change after the mistakes of which more than one value could be the cause."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("mistakes").resolve()
    mistakes.prepare(made)
    return made


@pytest.fixture(scope="module")
def prepared(folder: Path) -> set[Path]:
    """The files that are there before a mistake is made."""
    return files(folder)


@pytest.fixture(scope="module")
def outcomes(folder: Path, prepared: set[Path]) -> dict[str, mistakes.Outcome]:
    return mistakes.outcomes(folder)


def files(folder: Path) -> set[Path]:
    return {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()}


def test_there_are_two_hundred_and_none_is_made_twice():
    assert len(set(COMMANDS)) == len(COMMANDS) >= 200


@pytest.mark.parametrize("command", COMMANDS)
def test_a_mistake_is_answered_in_three_parts(command: str, outcomes: dict[str, mistakes.Outcome]):
    found = outcomes[command]
    assert found.code == 2
    assert found.parts, found.text
    assert "Traceback" not in found.text
    assert NAMED.search(" ".join(found.parts)), found.parts


@pytest.mark.parametrize(("command", "flag"), TO_CHANGE.items())
def test_it_says_what_to_change(command: str, flag: str, outcomes: dict[str, mistakes.Outcome]):
    assert flag in outcomes[command].parts[-1]


def test_no_mistake_leaves_a_file(folder: Path, prepared: set[Path], outcomes: dict[str, mistakes.Outcome]):
    left = {path for path in files(folder) - prepared if path.parts[0] not in ("service.log", "busy", "__pycache__")}
    assert left == set()


def test_the_page_is_what_was_said(outcomes: dict[str, mistakes.Outcome]):
    """`make docs` writes it."""
    assert mistakes.PAGE.read_text(encoding="utf-8") == mistakes.page(outcomes)


def test_a_command_that_would_load_a_model_is_no_mistake(folder: Path):
    with pytest.raises(mistakes.Loaded):
        mistakes.outcome(VERIFY % "proof.jsonl", folder)
