import json

import pytest

from assay.errors import DataError, UsageError
from assay.vhack.environment import tasks
from assay.vhack.environment.tasks import FAMILIES, HARDEST, task_named
from tests.wordings import refuses

DIFFICULTIES = range(1, HARDEST + 1)


def answers(task, source):
    namespace = {}
    exec(source, namespace)
    found = []
    for args, _ in task.visible + task.hidden:
        try:
            found.append(json.dumps(namespace["solve"](*args)))
        except (TypeError, ValueError, LookupError):
            found.append("error")
    return found


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("difficulty", DIFFICULTIES)
def test_solutions_are_right_and_no_step_is_idle(family, difficulty):
    for task in tasks(4, families=[family], difficulty=difficulty):
        expected = [json.dumps(value) for _, value in task.visible + task.hidden]
        assert answers(task, task.source()) == expected
        assert len(task.steps) == difficulty
        assert task.statement.count("; then ") == difficulty - 1
        for index in range(difficulty):
            wrong = answers(task, task.source(index))
            assert wrong[:3] != expected[:3]
            assert wrong[3:] != expected[3:]


def test_a_task_follows_from_its_name_alone():
    for task in tasks(16, seed=3, difficulty=(1, 6)):
        first, again = (
            (t.statement, t.source(), t.visible, t.hidden) for t in (task, task_named(task.name))
        )
        assert first == again


def test_what_is_drawn_is_pinned():
    """The format: another draw of the same seed would make results of the past unrepeatable."""
    task = task_named("arithmetic/2/7")
    assert task.statement == PINNED[0]
    assert task.visible == PINNED[1]
    assert [task.name for task in tasks(3, seed=1)] == PINNED[2]


def test_longer_lists_begin_with_shorter_ones_and_seeds_differ():
    assert tasks(20, seed=1)[:7] == tasks(7, seed=1)
    assert tasks(7, seed=1) != tasks(7, seed=2)


def test_training_and_evaluation_share_no_statement():
    training = {task.statement for task in tasks(300)}
    evaluation = {task.statement for task in tasks(60, split="evaluation")}
    assert len(training) == 300
    assert len(evaluation) == 60
    assert not training & evaluation


def test_arguments_all_differ_and_neither_a_constant_nor_the_argument_is_a_solution():
    for task in tasks(64, difficulty=1) + tasks(32):
        seen = {json.dumps(args) for args, _ in task.visible + task.hidden}
        assert len(seen) == 11
        for part in (task.visible, task.hidden):
            assert len({json.dumps(value) for _, value in part}) > 1
            assert any(args[0] != value for args, value in part)


@pytest.mark.parametrize(
    "name",
    ["arithmetic/2", "arithmetic/0/1", "arithmetic/7/1", "none/1/1", "lists/1/x", "lists/1/-1"],
)
def test_names_of_no_task_are_refused(name):
    with refuses(DataError, "names of no task are refused"):
        task_named(name)


@pytest.mark.parametrize(
    "settings",
    [
        {"families": ["chess"]},
        {"families": []},
        {"split": "test"},
        {"difficulty": 0},
        {"difficulty": (3, 2)},
        {"difficulty": 7},
    ],
)
def test_settings_that_cannot_be_are_refused(settings):
    with pytest.raises(UsageError):
        tasks(1, **settings)


def test_more_tasks_than_there_are_is_an_error():
    with refuses(UsageError, "more tasks than there are is an error"):
        tasks(300, families=["counts"], difficulty=1)


PINNED = (
    "solve(x) takes a number and does this to it: take the larger one of it and 24; then change "
    "the sign",
    (((53,), -53), ((23,), -24), ((35,), -35)),
    ["arithmetic/2/385854897", "branches/1/2083498624", "loops/1/1696054524"],
)
