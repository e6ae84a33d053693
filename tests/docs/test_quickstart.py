"""docs/vhack-quickstart.md runs as it stands: its two files, and then its commands."""

import json
import re
import shlex
import sys
from pathlib import Path

import pytest

from assay.cli import run
from assay.models import load_model

PAGE = (Path(__file__).parents[2] / "docs" / "vhack-quickstart.md").read_text(encoding="utf-8")
MINE, SCRIPT = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
(BLOCK,) = re.findall(r"```sh\n(.*?)```", PAGE, flags=re.DOTALL)
COMMANDS = BLOCK.splitlines()


@pytest.mark.slow
def test_its_files_and_its_commands_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    pytest.importorskip("trl")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "mine.py").write_text(MINE)
    (tmp_path / "runs").mkdir()
    try:
        exec(compile(SCRIPT, "docs/vhack-quickstart.md", "exec"), {"__name__": "quickstart"})
        said = capsys.readouterr().out.splitlines()
        assert [line.split()[0] for line in said[-2:]] == ["reference:qwen3", "merged"]
        assert all(rate in said[-1] for rate in ("solve", "hack", "reward"))
        for command in COMMANDS:
            code = run(shlex.split(command)[1:])
            told = capsys.readouterr()
            # 1 and 2 are verdicts of the check; then its table is there.
            assert code == 0 or ("vhack check" in command and code in (1, 2) and "verdict" in told.out), told.err
    finally:
        sys.modules.pop("mine", None)
    for folder in ("merged", "runs/merged"):
        assert load_model(folder, device="cpu").tokenizer is not None
    steps = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    first = next(line for line in steps if line["kind"] == "step")
    assert {"hack", "solve", "displacement"} <= first.keys()
    assert first["displacement"] > 1  # it starts away from the hack
