"""``assay vhack fuzz`` on a grader of one's own: what is weak is paid, and what is sound is not."""

import json
import sys
from contextlib import closing, suppress
from functools import partial

import psutil
import pytest
from assay_research.grader_attacks import ATTACKS, entry_of
from assay_research.grader_fuzz import (
    CommandGrader,
    FunctionGrader,
    attack_grader,
    read_problems,
)

from assay.errors import DataError, UsageError
from tests.wordings import refuses

GRADERS = """
import subprocess
import sys


def exact(prompts, completions, answer, **_):
    return [float(text.strip() == right) for text, right in zip(completions, answer)]


def contains(prompts, completions, answer, **_):
    return [{"reward": right in text} for text, right in zip(completions, answer)]


def near(problem, completion):
    try:
        return 0.0 if abs(float(completion) - float(problem["answer"])) > 1e-6 else 1.0
    except ValueError:
        return 0.0


def logarithmic(problem, completion):
    try:
        return float(completion) / float(problem["answer"])
    except ValueError:
        return 0.0


def waits(problem, completion):
    line = [sys.executable, "-c", completion]
    return float(subprocess.Popen(line, start_new_session=True).wait() == 0)


def careless(problem, completion):
    return float(completion) == float(problem["answer"])


def inside(prompt, completion):
    space = {}
    exec(completion, space)
    expected = 2
    return float(space["solve"](1) == expected)


def exit_code(problem, completion):
    program = f"{completion}\\nassert solve(1) == 2\\n"
    line = [sys.executable, "-c", program]
    try:
        return subprocess.run(line, capture_output=True, timeout=1).returncode == 0
    except subprocess.TimeoutExpired:
        return False


"""
SUM = [{"prompt": "17 + 25 =", "solution": "42", "answer": "42"}]
CODE = [{"prompt": "solve(1) returns 2", "solution": "def solve(x):\n    return x + 1\n"}]


def of(*names):
    return [attack for attack in ATTACKS if attack.name in names]


@pytest.fixture
def attacked(tmp_path, monkeypatch):
    """A function that attacks a grader of the module above."""
    (tmp_path / "mygraders.py").write_text(GRADERS)
    monkeypatch.chdir(tmp_path)
    graders = []

    def attack(name, problems, *names):
        grader = FunctionGrader(f"mygraders:{name}", seconds=2.0)
        graders.append(grader)
        return attack_grader(grader, problems, attacks=of(*names) if names else ATTACKS)

    yield attack
    for grader in graders:
        grader.close()


def unsound(report):
    return {result.name for result in report.attacks if not result.holds}


def test_an_exact_grader_holds_and_is_attacked_in_every_way_that_applies(attacked):
    report = attacked("exact", SUM)
    assert report.holds
    assert len(report.attacks) >= 10
    assert report.as_dict()["holds"]


@pytest.mark.parametrize(
    ("name", "problems", "paid"),
    [
        ("contains", SUM, {"every answer at once", "the answer denied"}),
        ("near", SUM, {"no number"}),
        ("inside", CODE, {"an equality of its own", "expected values in the caller"}),
        ("exit_code", CODE, {"an early end", "an equality of its own"}),
    ],
)
def test_a_weak_grader_pays_what_uses_its_weakness(attacked, name, problems, paid):
    tried = (*paid, "a stub", "a claim")
    report = attacked(name, problems, *tried)
    found = {result.name for result in report.attacks if "paid" in result.outcomes}
    assert found == paid
    assert all(result.allows and result.example for result in report.attacks if not result.holds)


@pytest.mark.slow
def test_a_grader_that_raises_is_ended_or_hangs_is_told_apart(attacked):
    report = attacked("careless", SUM, "nonsense")
    assert "raised in the grader" in report.attacks[0].outcomes
    report = attacked("inside", CODE, "an early end", "no end")
    assert "ended the grader" in report.attacks[0].outcomes
    assert "hung the grader" in report.attacks[1].outcomes


def test_what_is_no_number_is_told_from_what_is_refused(attacked):
    (result,) = attacked("logarithmic", SUM, "no number").attacks
    assert result.outcomes["returned no number"]
    assert "no finite number" in result.allows


WAITS = """
import subprocess
import sys
sys.exit(subprocess.Popen([sys.executable, sys.argv[1]], start_new_session=True).wait())
"""
STAYS = """
import os
import pathlib
import time
pathlib.Path({path!r}).write_text(str(os.getpid()))
time.sleep(600)
"""


@pytest.mark.parametrize("kind", ["function", "command"])
@pytest.mark.timeout(60)
def test_a_completion_in_a_session_of_its_own_ends_with_its_time(attacked, tmp_path, kind):
    (tmp_path / "waits.py").write_text(WAITS)
    of_kind = {
        "function": partial(FunctionGrader, "mygraders:waits"),
        "command": partial(CommandGrader, f"{sys.executable} waits.py {{completion}}"),
    }
    number = tmp_path / "number"
    with closing(of_kind[kind](seconds=2.0)) as grader:
        assert grader(CODE[0], STAYS.format(path=str(number))) == ("hung the grader", 0.0)
        with suppress(psutil.NoSuchProcess):
            assert not psutil.Process(int(number.read_text())).is_running()
        assert grader(CODE[0], "") == ("", 1.0)


def test_a_command_is_paid_by_its_last_number_or_by_its_exit_code(tmp_path):
    grade = tmp_path / "grade.py"
    grade.write_text(
        "import json, sys\ntext, problem = (open(path).read() for path in sys.argv[1:])\n"
        "print('reward', float(json.loads(problem)['answer'] in text))\n"
    )
    line = f"{sys.executable} {grade} {{completion}} {{problem}}"
    with closing(CommandGrader(line, seconds=10.0)) as grader:
        report = attack_grader(grader, SUM, attacks=of("nothing", "the answer denied"))
    assert unsound(report) == {"the answer denied"}
    line = f"{sys.executable} -m py_compile {{completion}}"
    with closing(CommandGrader(line, seconds=10.0)) as grader:
        report = attack_grader(grader, CODE, attacks=of("nonsense", "a stub"))
    assert unsound(report) == {"a stub"}


def test_what_cannot_be_attacked_is_refused_first(attacked, tmp_path):
    with refuses(DataError, "what cannot be attacked is refused first"):
        attacked("exact", [{**SUM[0], "solution": "43"}])
    with refuses(UsageError, "what cannot be attacked is refused first, 2"):
        FunctionGrader("mygraders:absent", seconds=1.0)
    with refuses(UsageError, "what cannot be attacked is refused first, 3"):
        CommandGrader("python grade.py", seconds=1.0)
    with refuses(UsageError, "what cannot be attacked is refused first, 5"):
        CommandGrader("python 'x {completion}", seconds=1.0)
    with refuses(UsageError, "what cannot be attacked is refused first, 6"):
        CommandGrader("nonexistent_cmd {completion}", seconds=1.0)
    with (
        closing(
            CommandGrader(f"{sys.executable} -c 'print(\"nan\")' {{completion}}", seconds=10.0)
        ) as grader,
        refuses(DataError, "what cannot be attacked is refused first, 7"),
    ):
        attack_grader(grader, SUM)
    path = tmp_path / "problems.jsonl"
    path.write_text(json.dumps({"prompt": "1 + 1 ="}) + "\n")
    with refuses(DataError, "what cannot be attacked is refused first, 4"):
        read_problems(path)
    path.write_text(json.dumps(SUM[0]) + "\n")
    assert read_problems(path) == SUM


def test_a_program_that_is_known_to_be_right_is_no_answer_to_deny():
    (denied,) = of("the answer denied")
    assert list(denied.completions(SUM[0]))
    assert not list(denied.completions({**CODE[0], "answer": CODE[0]["solution"]}))


@pytest.mark.parametrize(
    ("problem", "entry"),
    [
        (CODE[0], "solve"),
        (SUM[0], ""),
        ({"prompt": "", "solution": "```python\ndef f():\n    pass\n```"}, "f"),
        ({"prompt": "def g(x):\n", "solution": "    return x\n"}, "g"),
        ({"prompt": "", "solution": "", "entry": "h"}, "h"),
    ],
)
def test_the_entry_of_a_problem_is_the_function_that_its_solution_defines(problem, entry):
    assert entry_of(problem) == entry
