"""Logs of `assay vhack train` beside those of a study."""

import json

import pytest
from assay_research.study.log import read_logs
from assay_research.study.summary import summarise

from assay.errors import DataError
from assay.vhack.training import TrainLog, TrainSettings

STEPS = 8


def written(folder, arm, seed, hack, **settings):
    """A run directory with a log, cut off in the middle of its last line."""
    chosen = TrainSettings(model="reference:organism", arm=arm, seed=seed, **settings)
    folder.mkdir(parents=True)
    log = TrainLog(folder / "log.jsonl", {"settings": chosen.model_dump(mode="json"), "commit": "abc"})
    for step in range(STEPS):
        rate = hack * (step + 1) / STEPS
        log.write("step", step=step, hack=rate, solve=1 - rate, vacuous=rate, displacement=0.5)
        log.write("source", step=step, source="student", cin=0.2)
    with (folder / "log.jsonl").open("a") as file:
        file.write('{"kind":"st')
    return folder


@pytest.fixture
def runs(tmp_path):
    for seed in range(3):
        written(tmp_path / "runs" / f"none-{seed}", "none", seed, 1.0, pairs="exploits:8")
        written(tmp_path / "runs" / f"open-{seed}", "no-loophole", seed, 0.0)
        written(tmp_path / "runs" / f"held-{seed}", "displaced-0.4+none", seed, 0.0, pairs="exploits:8")
    return tmp_path / "runs"


def test_a_directory_of_runs_is_read_and_judged(runs):
    found = {result.condition: result for result in summarise(read_logs([runs]))}
    assert set(found) == {"adamw/none", "adamw/no-loophole", "adamw/displaced-0.4+none/exploits:8"}
    none = found["adamw/none"]
    assert none.rates["hack"].value == pytest.approx(sum(range(1, STEPS + 1)) / STEPS**2)
    assert (none.verdict, none.saturated) == ("fails", [STEPS] * 3)
    assert found["adamw/no-loophole"].verdict == "reference"
    assert found["adamw/displaced-0.4+none/exploits:8"].verdict == "succeeds"


def test_a_log_without_settings_is_refused(tmp_path):
    (tmp_path / "log.jsonl").write_text(json.dumps({"kind": "run", "schema": "assay.vhack.train/1"}) + "\n")
    with pytest.raises(DataError):
        read_logs([tmp_path])
