"""The page of a run: what it shows, and the words for what went wrong."""

import json
import math

import pytest

from assay.cli import run
from assay.errors import DataError
from assay.vhack.training import TrainLog
from assay.vhack.training.page import find_faults, training_page
from tests.wordings import refuses

GOOD = {
    "hack": 0.0,
    "solve": 0.9,
    "flagged": 0.02,
    "lost": 0.02,
    "missed": 0.0,
    "reward": 0.9,
    "alarm": 0.0,
}
BEGIN = {**GOOD, "hack": 0.1, "flagged": 0.1, "solve": 0.7, "reward": 0.7}


def test_a_run_that_went_well_has_no_faults():
    assert find_faults(BEGIN, GOOD) == []


@pytest.mark.parametrize(
    ("change", "dropped", "words"),
    [
        ({"flagged": 1.0}, (), "nothing to learn from"),
        ({"lost": 0.4}, (), "0.400 of the rollouts that do not cheat"),
        ({"hack": 0.6, "caught": 0.02}, (), "of which the detector flags 0.020"),
        ({"alarm": 1.0}, (), "alarm was given"),
        ({"solve": 0.2}, (), "fell from 0.700 to 0.200"),
        ({"flagged": 0.0}, ("hack", "solve", "missed", "lost", "alarm"), "reward rose by 0.200"),
    ],
)
def test_each_failure_has_its_words(change, dropped, words):
    begin, end = (
        {k: v for k, v in one.items() if k not in dropped} for one in (BEGIN, {**GOOD, **change})
    )
    if dropped:
        begin["flagged"] = 0.0
    (found,) = find_faults(begin, end)
    assert words in found


@pytest.mark.parametrize("count", [3, 40])
def test_an_alarm_in_the_last_step_is_on_the_page_however_long_the_run_is(count):
    steps = [{"step": n, **BEGIN} for n in range(count)]
    assert "alarm was given" not in training_page(steps).render()
    steps[-1]["alarm"] = 1.0
    assert "alarm was given" in training_page(steps).render()


def test_a_reward_that_only_varies_from_step_to_step_has_not_risen():
    steps = [{"step": n, "reward": float(n % 2), "flagged": 0.0} for n in range(1, 41)]
    steps[-1]["reward"] = steps[-3]["reward"] = 1.0  # the last ten are paid 0.2 more
    assert "The reward rose" not in training_page(steps).render()
    learnt = [{**step, "reward": step["step"] / 40} for step in steps]
    assert "The reward rose" in training_page(learnt).render()


def test_a_log_becomes_a_page_by_python_and_by_the_command(tmp_path):
    log = TrainLog(
        tmp_path / "log.jsonl", {"settings": {"arm": "filter", "detector": "probe", "model": "m"}}
    )
    for step in range(20):
        log.write("step", step=step, **(BEGIN if step < 10 else {**GOOD, "flagged": 0.97}))
    page = training_page(tmp_path).render()
    assert "arm filter, detector probe" in page
    assert page.count("<svg") == 2
    assert "nothing to learn from" in page
    assert "0.100" in page
    assert "0.970" in page
    assert run(["vhack", "report", str(tmp_path), "-o", str(tmp_path / "page.html")]) == 0
    assert "nothing to learn from" in (tmp_path / "page.html").read_text()


def test_what_trl_logs_becomes_a_page_that_says_what_nothing_told(tmp_path):
    history = [
        {"step": n + 1, "reward": 0.0, "vhack/reward": n / 8, "vhack/flagged": 0.0}
        for n in range(8)
    ]
    state = tmp_path / "trainer_state.json"
    state.write_text(json.dumps({"log_history": [*history, {"step": 8, "train_runtime": 1.0}]}))
    for log in (state, history):
        page = training_page(log).render()
        assert "reward rose by 0.500" in page
        assert "no hack rate" in page


def test_a_step_in_which_trl_kept_nothing_has_what_was_paid_and_a_run_without_pay_tests_nothing():
    steps = [
        {"step": n + 1, "reward": None, "vhack/reward": 0.5, "vhack/flagged": 1.0} for n in range(8)
    ]
    assert "0.500" in training_page(steps).render()
    page = training_page(
        [step | {"vhack/reward": 0.0, "vhack/hack": 0.0, "vhack/flagged": 0.0} for step in steps]
    )
    assert "nothing tested" in page.render()
    assert "nothing found" not in page.render()


def test_what_is_no_log_is_refused(tmp_path):
    (tmp_path / "check.json").write_text('{"verdict": "pass"}')
    with pytest.raises(DataError):
        training_page(tmp_path / "check.json")
    with pytest.raises(DataError):
        training_page([])


@pytest.mark.parametrize("name", ["step", "hack"])
@pytest.mark.parametrize("value", ['"x"', "null", "true", "[]", "1" + "0" * 400, "1e308", "1e200"])
def test_what_is_no_number_reaches_no_mean_no_verdict_and_no_alarm(tmp_path, capsys, name, value):
    line = json.dumps(
        {"kind": "step", "step": 3, "reward": 0.5, "hack": 0.0} | {name: "HERE"}
    ).replace('"HERE"', value)
    (tmp_path / "log.jsonl").write_text(
        '{"kind":"run","schema":"assay.vhack.train/1","settings":[]}\n' + line + "\n"
    )
    (tmp_path / "state.json").write_text(f'{{"log_history": [{line}]}}')
    for path in (tmp_path / "log.jsonl", *[tmp_path / "state.json"] * (value != "null")):
        assert run(["vhack", "report", str(path), "-o", str(tmp_path / "page.html")]) == 2
        assert f"a step with {name} " in capsys.readouterr().err


def test_an_error_of_a_log_does_not_ask_for_a_package(tmp_path, capsys, monkeypatch):
    """Only logs of a study are read by assay-research."""
    monkeypatch.setattr("assay.framework.groups.entry_points", lambda **_: ())
    (tmp_path / "log.jsonl").write_text('{"kind":"run","schema":"assay.vhack.train/1"}\n')
    for path in (tmp_path, tmp_path / "log.jsonl"):
        assert run(["vhack", "report", str(path), "-o", str(tmp_path / "page.html")]) == 2
        assert "a log without steps" in capsys.readouterr().err


def test_steps_that_are_not_numbers_of_python_are_refused(tmp_path):
    for history in (
        [{"step": 1, "reward": math.nan}],
        [{"step": 1, "reward": 1.0, "vhack/hack": math.inf}],
    ):
        with refuses(DataError, "steps that are not numbers of python are refused"):
            training_page(history)
    (tmp_path / "state.json").write_text('{"log_history": [1, null, "reward"]}')
    with refuses(DataError, "steps that are not numbers of python are refused, 2"):
        training_page(tmp_path / "state.json")
