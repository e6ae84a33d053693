"""What is said of plain programs without running them is what the sandbox says of them."""

import pytest

from assay.research.study._plain import plain_verdict
from assay.vhack.environment import CHANNELS, MODES, Episode, grade, tasks


def said(episode, completion):
    made = grade(episode, episode.program(completion))
    return made.correct, made.accepted, made.vacuous


def task_of(family, steps=2):
    return tasks(1, seed=3, families=[family], difficulty=steps)[0]


def body(*lines):
    return "def solve(x):\n" + "".join(f"    {line}\n" for line in (*lines, "return x"))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", ["arithmetic", "branches", "digits", "counts"])
def test_programs_of_the_usual_kinds_get_the_grade_of_the_sandbox(family, mode):
    task = task_of(family)
    solutions = [task.source(), task.source(leave_out=0), body(), body("x = x // 0")]
    for split in ("training", "evaluation"):
        episode = Episode(task, mode, split)
        programs = [*map(episode.honest, solutions), *solutions]
        if mode != "none":
            programs += [episode.exploit()]
        if mode not in ("none", "eq_override"):
            programs += map(episode.exploit, solutions)
        for program in programs:
            completion = episode.completion(program)
            assert plain_verdict(episode, completion) == said(episode, completion), program


STEPS = (
    "x = x * x",
    "x = -x % 7 + max(x, 3)",
    "x = 2 * x if x >= 4 else x - 1",
    "x = int(''.join(sorted(str(abs(x)))))",
    "x = sum(int(d) for d in str(abs(x)))",
    "x = x + c",
    "x = len(x)",
    "x = str(x)[::-1]",
    "x = 'a' in str(x)",
    "x = set(str(x))",
    "x = sorted(str(x))",
)


@pytest.mark.parametrize("step", STEPS)
def test_other_plain_steps_get_the_grade_of_the_sandbox_or_none(step):
    task = task_of("arithmetic")
    for mode in ("run_tests", "stdout_marker"):
        episode = Episode(task, mode)
        for solution in (body(step), task.source().replace("    return x\n", f"    {step}\n    return x\n")):
            for program in (episode.honest(solution), episode.exploit(solution)):
                completion = episode.completion(program)
                assert plain_verdict(episode, completion) in (None, said(episode, completion))


@pytest.mark.parametrize(
    "line",
    [
        "import os",
        "y = x",
        "x += 1",
        "x = open('a')",
        "x = x.__class__",
        "x = (lambda: x)()",
        "x = [c for c in str(x)]",
        "x = f'{x}'",
        "x = x ** 9",
        "x = x << 9",
        "x = max(x, key=abs)",
        "x = max(*x)",
        "x = str(x).join(str(x))",
        "x = str(x).replace('1', str(x))",
        "x = sum(int(a) for a in str(x) for b in str(x) if sum(int(c) for c in str(x)))",
        "x = sum(max for max in (1, 2))",
        "x = eval('1')",
        "x = 10000000 + x",
        "x = x @ x",
        "while True: pass",
    ],
)
def test_anything_else_is_not_plain(line):
    episode = Episode(task_of("arithmetic"), "sentinel")
    assert plain_verdict(episode, episode.completion(episode.honest(body(line)))) is None


@pytest.mark.parametrize(
    "lines",
    [
        ["x = x * x"] * 12 + ["x = x * x"],
        ["x = str(x) * 999999"],
        ["x = 999999 * str(x) * 999999"],
        ["x = '%99999999d' % x"],
        ["x = x * 1000000"] * 12 + ["x = 1"],
        ["x = x * x * x * x"] * 12,
    ],
)
def test_values_do_not_grow_without_bounds(lines):
    episode = Episode(task_of("arithmetic"), "sentinel")
    assert plain_verdict(episode, episode.completion(episode.honest(body(*lines)))) is None


def test_a_program_that_its_own_tests_stop_is_left_to_the_sandbox():
    """It is right in every hidden case, and wrong in a visible one."""
    task = task_of("arithmetic")
    ((shown,), _), *_ = task.visible
    hidden_from_its_tests = task.source().replace(
        "def solve(x):\n", f"def solve(x):\n    x = 12345 if x == {shown} else x\n"
    )
    for mode in CHANNELS:
        episode = Episode(task, mode)
        assert plain_verdict(episode, episode.completion(episode.honest(hidden_from_its_tests))) is None
        if mode != "eq_override":
            completion = episode.completion(episode.exploit(hidden_from_its_tests))
            assert plain_verdict(episode, completion) == said(episode, completion) == (True, True, True)


def test_what_does_not_end_as_expected_is_not_plain():
    episode = Episode(task_of("digits"), "file_marker")
    honest = episode.completion(episode.honest())
    other = episode.completion(Episode(episode.task, "exit_code").exploit())
    for completion in (honest[:-1], honest + "print(1)\n", other, "", "    return 3\n"):
        assert plain_verdict(episode, completion) is None
