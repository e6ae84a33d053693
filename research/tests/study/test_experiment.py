"""The third experiment's plan as code: every part can be made, claims name arms that are there, tables are printed."""

import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "scripts")]

import _vhack_plan3  # noqa: E402
import vhack_study3_results as results  # noqa: E402
import vhack_study_organisms  # noqa: E402
import vhack_tables  # noqa: E402
from assay_research.study.log import RunLog  # noqa: E402
from assay_research.study.plan import StudyRun  # noqa: E402

from assay.files.jsonl import dumps  # noqa: E402


def log_of(part, run, *, steps=None):
    settings = _vhack_plan3.PARTS[part].settings
    about = {"part": part, "commit": "c", "device": "d", "torch": "t", "model": "m"}
    log = RunLog.begin(run, settings, about)
    hack = float(run.arm in ("none", _vhack_plan3.DISPLACED) and not run.start)
    for step in range(steps or settings.steps):
        values = {"hack": 0.95 * hack, "solve": 0.5, "vacuous": 0.0, "reward": 1.0}
        log.add_step(step, values, settings.log_every)
    return log


def write(folder, part, logs):
    (folder / part).mkdir(parents=True)
    for index, log in enumerate(logs):
        log.write(folder / part / f"{index}.jsonl")


@pytest.mark.parametrize("name", _vhack_plan3.PARTS)
def test_the_arms_of_the_hypotheses_and_the_others_are_together_the_runs_of_a_part(name):
    every, main, others = (_vhack_plan3.PARTS[name].cell(300, which) for which in ("all", "main", "others"))
    assert sorted(run.name for run in main + others) == sorted(run.name for run in every)
    claimed = {"none", "no-loophole", _vhack_plan3.DISPLACED, _vhack_plan3.HELD, _vhack_plan3.GATED}
    assert {run.arm for run in others if run.basis == "whole" and not run.start}.isdisjoint(claimed)
    assert name != "stored" or (len(main), len(others)) == (6, 7)


@pytest.mark.parametrize("name", _vhack_plan3.PARTS)
def test_a_cell_has_different_runs_of_one_regime_and_its_reference(name):
    part = _vhack_plan3.PARTS[name]
    cell = part.cell(301)
    assert {run.seed for run in cell} == {301}
    assert len({run.name for run in cell}) == len(cell) == len(part.runs)
    assert len({run.regime for run in cell}) == 1
    assert part.evaluations[0] == 0
    assert part.evaluations[-1] == part.settings.steps
    late = part.evaluations[-part.late :]
    assert [after - before for before, after in pairwise(late)] == [part.apart] * (part.late - 1)
    if name not in ("origins", "mechanisms"):  # compared with the part `stored`, whose runs have the same seeds
        assert {"none", "no-loophole"} <= {run.arm for run in cell}


def test_every_part_has_an_organism_of_its_size():
    assert {part.size for part in _vhack_plan3.PARTS.values()} <= set(vhack_study_organisms.SIZES)
    assert len(_vhack_plan3.PARTS["stored"].runs) * _vhack_plan3.PARTS["stored"].seeds == 104


def test_parts_without_runs_are_said_not_to_be_run(tmp_path):
    assert results.read_parts(tmp_path) == {}
    assert {claim["verdict"] for claim in results.claims({})} == {"not run yet"}
    assert results.figures("stored", [])["state"] == "not run yet"


def test_claims_are_decided_by_the_runs_of_their_part(tmp_path, monkeypatch, capsys):
    part = _vhack_plan3.PARTS["stored"]
    logs = [log_of("stored", run) for seed in range(300, 306) for run in part.cell(seed)]
    cut = log_of("stored", part.cell(306)[0], steps=50)
    cut.add_evaluation(40, "training", {"hack": 0.75, "solve": 0.125})
    write(tmp_path, "stored", [*logs, cut])
    read = results.read_parts(tmp_path)
    found = [claim["verdict"] for claim in results.claims(read)]
    assert found == ["holds", "holds", "holds", "not run yet", "not run yet"]
    made = {name: results.figures(name, read.get(name, [])) for name in _vhack_plan3.PARTS if name != "check"}
    assert made["stored"]["state"] == "in part"
    assert [arm["verdict"] for arm in made["stored"]["arms"]][:4] == ["fails", "reference", "fails", "succeeds"]
    seen = {"steps": 50, "at": 40, "hack": 0.75, "solve": 0.125}
    assert made["stored"]["cut_off"] == [{"condition": cut.header["condition"], "seed": 306} | seen]
    assert made["stored"]["rivals"]["from-dpo less " + _vhack_plan3.HELD]["equal"] == "yes"
    assert made["stored"]["rivals"]["from-dpo less " + _vhack_plan3.DISPLACED]["equal"] == "no"
    (tmp_path / "vhack_study3.json").write_text(dumps({"claims": results.claims(read), "parts": made}))
    monkeypatch.setattr(vhack_tables, "RESULTS", tmp_path)
    vhack_tables.claims()
    assert capsys.readouterr().out.count("**holds**") == 3


def test_a_part_without_a_reference_of_its_own_is_compared_with_that_of_the_first():
    stored, origins = (_vhack_plan3.PARTS[name] for name in ("stored", "origins"))
    read = {
        name: [log_of(name, run) for seed in range(300, 303) for run in part.cell(seed)]
        for name, part in (("stored", stored), ("origins", origins))
    }
    made = results.figures("origins", read["origins"], read["stored"])
    assert [arm["verdict"] for arm in made["arms"]] == ["succeeds"] * 3
    assert {arm["condition"].split("/")[2] for arm in made["arms"]} == {
        "axes-written",
        "axes-generated",
        "axes-sampled",
    }


def test_a_run_that_is_there_twice_is_refused(tmp_path):
    log = log_of("stored", StudyRun("none", 300, stored="whole"), steps=5)
    write(tmp_path, "stored", [log, log])
    with pytest.raises(Exception, match="twice"):
        results.read_parts(tmp_path)


@pytest.mark.slow
def test_an_organism_is_made_in_two_goes(tmp_path):
    """The base is stopped after ten steps; the same command goes on from there and makes the organism."""
    script = str(ROOT / "benchmarks" / "vhack_study_organisms.py")
    command = [sys.executable, script, "tiny", "-o", str(tmp_path / "made"), "--device", "cpu", "--workers", "1"]
    first = subprocess.run([*command, "--after", "10"], capture_output=True, text=True, check=False)
    assert first.returncode == 3, first.stderr
    assert (tmp_path / "made-base.partial").exists()
    second = subprocess.run(command, capture_output=True, text=True, check=False)
    assert second.returncode == 0, second.stderr
    assert "goes on from step 10" in second.stderr
    assert (tmp_path / "made" / "organism.json").exists()
