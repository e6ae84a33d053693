"""The grader holds against a few hundred hostile cases, and a grader that does not hold is found
out.
"""

import json

import pytest
from assay_research import fuzz as _fuzz
from assay_research.fuzz import fuzz
from assay_research.hostile import HOSTILE_KINDS, hostile_case

from assay.cli import run as run_command
from assay.errors import DataError
from assay.vhack.environment import Limits
from assay.vhack.environment import grading as _grade


@pytest.fixture
def few(monkeypatch):
    """Small steps, so that few cases make several."""
    monkeypatch.setattr(_fuzz, "_STEP", 10)


def test_the_grader_holds_against_every_kind():
    report = fuzz(20 * len(HOSTILE_KINDS), limits=Limits(seconds=0.5))
    assert report.failures == ()
    assert report.holds
    assert {kind: found["cases"] for kind, found in report.counts.items()} == dict.fromkeys(
        HOSTILE_KINDS, 20
    )
    total = report.total
    assert not {"ended_a_step", "grader_raised", "graded_as_right"} & total.keys()
    # The cases do what they are made for: each way to end is among them.
    assert (
        min(total[name] for name in ("exploited", "timed_out", "overflowed", "raised", "crashed"))
        >= 1
    )
    assert report.honest == 8


def test_a_case_follows_from_its_name_and_no_two_are_the_same():
    names = [f"{kind}/3/{number}" for kind in HOSTILE_KINDS for number in range(8)]
    cases = [hostile_case(name) for name in names]
    assert cases == [hostile_case(name) for name in names]
    assert [case.name for case in cases] == names
    assert len({(case.program, case.episode.mode) for case in cases}) > 0.9 * len(cases)
    assert all(case.kind == name.split("/")[0] for case, name in zip(cases, names, strict=True))


@pytest.mark.parametrize("name", ["ends", "ends/1", "magic/1/1", "ends/x/1", "ends/1/2/3", ""])
def test_names_of_no_case_are_refused(name):
    with pytest.raises(DataError, match="hostile case"):
        hostile_case(name)


def test_an_error_of_the_grader_is_found(few, monkeypatch):
    real = _grade.answers_match

    def sometimes(outcomes, cases):
        if any(outcome.kind == "none" for outcome in outcomes):
            raise RecursionError
        return real(outcomes, cases)

    monkeypatch.setattr(_grade, "answers_match", sometimes)
    report = fuzz(20, kinds=["text"])
    assert not report.holds
    assert report.total["grader_raised"] == 20
    assert report.failures[0] == ("text/0/0", "grader raised: RecursionError")


@pytest.mark.parametrize("alone", [True, False])
def test_a_case_that_ends_a_step_is_found_and_the_others_are_graded(few, monkeypatch, alone):
    real = _fuzz.grade_many
    bad = hostile_case("markers/0/13").program

    def ending(items, **options):
        listed = list(items)
        if any(program == bad for _, program in listed) and (alone or len(listed) > 1):
            raise ValueError("a digit too many")
        return real(listed, **options)

    monkeypatch.setattr(_fuzz, "grade_many", ending)
    report = fuzz(20, kinds=["markers"])
    assert report.counts["markers"]["cases"] == 20
    assert report.counts["markers"]["ended_a_step"] == 1
    cause = "ValueError" if alone else "ValueError, beside other cases only"
    assert report.failures == (
        ("markers/0/13" if alone else "markers/0/10", f"ended a step: {cause}"),
    )


def test_a_wrong_program_that_is_graded_as_right_is_found(few, monkeypatch):
    monkeypatch.setattr(_grade, "answers_match", lambda outcomes, cases: True)
    report = fuzz(10, kinds=["nearly-right"])
    assert report.total["graded_as_right"] == 10
    assert ("honest program of step 0", "graded as right") in report.failures


def test_the_command_says_and_writes_what_was_found(tmp_path, capsys, monkeypatch):
    output = tmp_path / "fuzz.json"
    arguments = [
        "vhack",
        "fuzz",
        "-n",
        "6",
        "--kind",
        "text",
        "--kind",
        "answers",
        "-o",
        str(output),
    ]
    monkeypatch.setattr("sys.argv", ["assay", *arguments])
    assert run_command(arguments) == 0
    assert "the grader holds: 6 hostile cases and 2 honest programs" in capsys.readouterr().out
    written = json.loads(output.read_text())
    assert written["schema"] == "assay.vhack.fuzz/1"
    assert written["command"].startswith("assay vhack fuzz -n 6 ")
    assert {kind: found["cases"] for kind, found in written["kinds"].items()} == {
        "text": 3,
        "answers": 3,
    }
    assert {"commit", "cpu", "versions", "seed", "backend"} <= written.keys()
    monkeypatch.setattr(_grade, "answers_match", lambda outcomes, cases: True)
    assert run_command([*arguments, "--json"]) == 1
    printed = json.loads(capsys.readouterr().out)
    assert not printed["holds"]
    assert printed["failures"][0] == {"case": "text/0/0", "did": "graded as right"}
    assert run_command(["vhack", "fuzz", "--kind", "magic"]) == 2


@pytest.mark.parametrize(
    "arguments", [("--count", "5"), ("--kind", "text"), ("--seed", "1"), ("--workers", "3")]
)
def test_a_grader_of_ones_own_takes_no_option_of_hostile_programs(
    tmp_path, monkeypatch, capsys, arguments
):
    monkeypatch.chdir(tmp_path)
    problem = {"prompt": "17 + 25 =", "solution": "42"}
    (tmp_path / "problems.jsonl").write_text(json.dumps(problem) + "\n")
    grader = ("--grader", "touch asked {completion}", "--problems", "problems.jsonl")
    assert run_command(["vhack", "fuzz", *grader, *arguments]) == 2
    assert f"{arguments[0]} with --problems" in capsys.readouterr().err
    assert not (tmp_path / "asked").exists()
