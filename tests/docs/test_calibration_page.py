"""docs/calibration.md and docs/verdicts.md: their commands run, and what they say of the answers is so."""

import re
import shlex
from pathlib import Path

import pytest

from assay.cli import run

DOCS = Path(__file__).parents[2] / "docs"
CALIBRATION = (DOCS / "calibration.md").read_text(encoding="utf-8")
MACHINES = ("bfloat16", "bfloat16", "float16", "float32", "bfloat16")
"""Number formats in place of machines: this one would repeat itself bit by bit."""


def commands() -> list[list[str]]:
    blocks = re.findall(r"^```sh\n(.*?)^```$", CALIBRATION, flags=re.DOTALL | re.MULTILINE)
    return [
        shlex.split(line.replace("MODEL", "reference:qwen3"))[1:] for block in blocks for line in block.splitlines()
    ]


@pytest.mark.slow
def test_the_commands_run_and_their_answer_has_the_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.chdir(tmp_path)
    prove, calibrate, verify = commands()
    small = ("--nonces", "0:32", "--seq-len", "8", "--batch-size", "16")
    for number, dtype in enumerate(MACHINES, start=1):
        changed = [part.replace("machine-1", f"machine-{number}").replace("0:1000", "0:32") for part in prove]
        assert run([*changed, *small, "--dtype", dtype]) == 0
    assert run(calibrate) == 0
    answer = " ".join(capsys.readouterr().out.split())
    rows = re.findall(r"^\| `([\w ]+)` \|", CALIBRATION.split("## Read it")[1], flags=re.MULTILINE)
    assert len(rows) == 6
    assert all(row in answer for row in rows)
    assert run([*verify, "--seq-len", "8"]) in (0, 2)
    assert "calibration on 32 nonces of 4 machines" in " ".join(capsys.readouterr().out.split())
