"""``assay poc ledger merge``, and ``assay`` where this package is not installed."""

import json
from pathlib import Path

import pytest

from assay.framework import groups
from assay.poc.verdict import Ledger
from assay.vhack.names import STUDY
from tests.poc.verdict.ledgers import filled, honest, update


@pytest.fixture
def ledger(tmp_path: Path) -> Path:
    return filled(tmp_path / "ledger.sqlite3")


@pytest.fixture
def good(tmp_path: Path) -> Path:
    """A ledger of one honest node."""
    with Ledger(tmp_path / "good.sqlite3") as opened:
        opened.append([update(seed, residuals=honest(8, seed)) for seed in range(10)])
    return tmp_path / "good.sqlite3"


def test_an_export_is_merged(assay, ledger: Path, good: Path, tmp_path: Path):
    out = tmp_path / "ledger.jsonl"
    assert assay("poc", "ledger", "export", ledger, "-o", out).code == 0
    merged = assay("poc", "ledger", "merge", out, good)
    assert merged.code == 1, merged.err
    assert "1 of 2" in merged.out
    told = json.loads(
        assay("poc", "ledger", "merge", out, good, "--public-key", "node_2", "--json").out
    )
    (account,) = told["accounts"]
    assert (account["verdict"], len(account["shares"])) == ("fraud", 2)


def test_the_code_of_a_merge_is_that_of_its_verdicts(assay, good: Path, ledger: Path):
    assert assay("poc", "ledger", "merge", good).code == 0
    assert (
        assay("poc", "ledger", "merge", ledger, "--public-key", "node_0").code == 2
    )  # too few nonces to decide
    assert assay("poc", "ledger", "merge", ledger, "--public-key", "nobody").code == 2
    assert assay("poc", "ledger", "merge", good, good).code == 2
    assert assay("poc", "ledger", "merge", good, "--alpha", 2).code == 2


@pytest.mark.parametrize(
    "command",
    [
        ("poc", "experiment", "matrix"),
        ("research", "clusters", "x"),
        ("vhack", "fuzz"),
        ("poc", "ledger", "merge", "x"),
        ("poc", "calibrate", "--vectors", "x", "-o", "c.json"),
        ("vhack", "report", "runs", "-o", "page.html"),
    ],
)
def test_without_this_package_a_command_says_what_to_install(
    command, assay, monkeypatch, tmp_path: Path
):
    monkeypatch.chdir(tmp_path)
    Path("runs").mkdir()
    Path("runs/log.jsonl").write_text(json.dumps({"schema": STUDY}) + "\n")
    monkeypatch.setattr(groups, "entry_points", lambda **_: [])
    found = assay(*command)
    assert found.code == 2
    assert "install assay-research" in found.err
    assert assay("poc", "--help").code == 0
