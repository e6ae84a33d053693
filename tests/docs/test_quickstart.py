"""docs/vhack-quickstart.md runs, with fewer tasks: its two files, and then its commands. So does
docs/calibration.md.
"""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from assay.cli import run
from assay.models import load_model

DOCS = Path(__file__).parents[2] / "docs"
PAGE, CALIBRATION = (
    (DOCS / name).read_text(encoding="utf-8") for name in ("vhack-quickstart.md", "calibration.md")
)
MINE, SCRIPT, FILTER = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
FEWER = ("range(2, 16)", "range(2, 8)")
"""Numbers of the tasks of the page, and of those here: fewer pairs show as much."""
(BLOCK,) = re.findall(r"```sh\n(.*?)```", PAGE, flags=re.DOTALL)
COMMANDS = BLOCK.splitlines()
MACHINES = (("bfloat16", 16), ("bfloat16", 8), ("float16", 16), ("float32", 16), ("bfloat16", 16))
"""Number formats and sizes of batches in place of machines: this one would repeat itself bit by
bit, and in the same millisecond its second proof is a copy of its first."""


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:'pin_memory' argument")  # on a CPU, of TRL's own trainer
def test_its_files_and_its_commands_run(tmp_path, monkeypatch, capsys):
    pytest.importorskip("trl")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    assert FEWER[0] in MINE
    (tmp_path / "mine.py").write_text(MINE.replace(*FEWER))
    (tmp_path / "runs").mkdir()
    try:
        exec(compile(SCRIPT, "docs/vhack-quickstart.md", "exec"), {"__name__": "quickstart"})
        said = capsys.readouterr().out.splitlines()
        assert [line.split()[0] for line in said[-2:]] == ["reference:qwen3", "merged"]
        assert all(rate in said[-1] for rate in ("solve", "hack", "reward"))
        made = {"__name__": "quickstart"}
        exec(compile(FILTER, "docs/vhack-quickstart.md", "exec"), made)
        history = made["trainer"].state.log_history
        assert all(0 <= line["vhack/flagged"] <= 1 for line in history if "reward" in line)
        capsys.readouterr()
        for command in COMMANDS:
            if command.startswith("printf "):
                subprocess.run(["bash", "-c", command], check=True)
                continue
            code = run(shlex.split(command)[1:])
            told = capsys.readouterr()
            # 1 and 2 are verdicts of the check; then its table is there.
            assert code == 0 or (
                "vhack check" in command and code in (1, 2) and "verdict" in told.out
            ), told.err
    finally:
        sys.modules.pop("mine", None)
    for folder in ("merged", "runs/merged"):
        assert load_model(folder, device="cpu").tokenizer is not None
    steps = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    first = next(line for line in steps if line["kind"] == "step")
    assert {"hack", "solve", "flagged"} <= first.keys()


@pytest.mark.slow
def test_commands_of_calibration_run_and_their_answer_has_the_rows(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    # What comes before measures a law on one machine: tests/cli/test_calibrate.py does so with a
    # small model.
    several = CALIBRATION[CALIBRATION.index("## Collect, from several machines") :]
    blocks = re.findall(r"^```sh\n(.*?)^```$", several, flags=re.DOTALL | re.MULTILINE)
    lines = "".join(blocks).replace("MODEL", "reference:qwen3").splitlines()
    prove, calibrate, verify, export = (shlex.split(line)[1:] for line in lines)
    small = ("--nonces", "0:32", "--seq-len", "8")
    for number, (dtype, size) in enumerate(MACHINES, start=1):
        changed = [
            part.replace("machine-1", f"machine-{number}").replace("0:1000", "0:32")
            for part in prove
        ]
        own = ("--dtype", dtype, "--batch-size", str(size))
        assert run([*changed, *small, *own]) == 0
    assert run(calibrate) == 0
    answer = " ".join(capsys.readouterr().out.split())
    rows = re.findall(r"^\| `([\w ]+)` \|", CALIBRATION.split("## Read it")[1], flags=re.MULTILINE)
    assert len(rows) == 6
    assert all(row in answer for row in rows)
    assert run([*verify, "--seq-len", "8"]) in (0, 2)
    assert "calibration on 32 nonces of 4 machines" in " ".join(capsys.readouterr().out.split())
    # The chain counts vectors, and this law is of distances; tests/cli/test_calibrate.py has one.
    assert run(export) == 2
    assert "artifact" in capsys.readouterr().err
