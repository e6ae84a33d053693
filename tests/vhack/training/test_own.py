"""Tasks and a reward of one's own, in Python and as ``module:function``."""

import sys

import pytest
import torch

from assay.errors import DataError, UsageError
from assay.vhack.delta import arm_named
from assay.vhack.environment import episodes
from assay.vhack.training import OwnReward, train
from assay.vhack.training.log import read_steps

MODULE = """
import json

def tasks():
    return [{"prompt": f"{a} + {b} =", "answer": a + b} for a in range(3) for b in range(2)]

def reward(prompts, completions, answer, **others):
    assert all(eval(prompt.rstrip(" =")) == wanted for prompt, wanted in zip(prompts, answer))
    return [{"reward": len(text) / 100 - 0.25, "exploited": "e" in text} for text in completions]

def numbers(prompts, completions, **others):
    return [float(len(text)) for text in completions]

def fails(*_, **__):
    raise ValueError("no such table")

nothing = None
empty = list
words = lambda: ["a", 3]
prompts = lambda: ["a", "b"]
texts = lambda prompts, completions, **_: ["much"] * len(prompts)
few = lambda prompts, completions, **_: [1.0]
endless = lambda prompts, completions, **_: [float("inf")] * len(prompts)
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A working directory with a module of one's own."""
    (tmp_path / "mine_for_tests.py").write_text(MODULE)
    (tmp_path / "raises_for_tests.py").write_text("tasks = [1 / 0]")
    (tmp_path / "leaves_for_tests.py").write_text("raise SystemExit('only as a script')")
    (tmp_path / "removes_for_tests.py").write_text("import sys; sys.path.pop(0); tasks = list")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    yield tmp_path
    sys.modules.pop("mine_for_tests", None)
    assert str(tmp_path) not in sys.path


@pytest.fixture
def run(own, settings, pairs):
    """A run of two steps without a teacher; no sandbox is needed for it."""

    def call(tasks="mine_for_tests:tasks", reward="mine_for_tests:reward", given=None, **others):
        chosen = settings(tasks=tasks, reward=reward, teacher=None, max_new_tokens=8, **others)
        return train(chosen, own / "run", pairs=pairs, **(given or {}))

    return call


def test_a_run_on_them_logs_what_they_say(run, own, monkeypatch):
    monkeypatch.setattr("assay.vhack.training.rewards.available_backend", lambda: None)
    result = run()
    head, steps = read_steps(own / "run" / "log.jsonl")
    assert (head["settings"]["tasks"], head["settings"]["reward"]) == ("mine_for_tests:tasks", "mine_for_tests:reward")
    assert result.steps == len(steps) == 2
    for step in steps:
        assert step["rollouts"] == 6
        assert 0 <= step["hack"] <= 1
        assert "solve" not in step
        assert -0.25 <= step["reward"] < 0.2
    assert any(step["reward"] != -0.25 for step in steps)
    assert any(step["cin"] > 0 for step in steps)


def test_python_may_give_them_itself(run, own):
    def paid(prompts, completions, task, **_):
        assert [one.prompt for one in task] == prompts
        return [1.0] * len(prompts)

    run(4, None, {"tasks": episodes(4, modes=["exit_code"], difficulty=1), "reward": paid})
    _, steps = read_steps(own / "run" / "log.jsonl")
    assert [step["reward"] for step in steps] == [1.0, 1.0]
    assert not {"hack", "solve", "vacuous"} & steps[0].keys()


@pytest.mark.parametrize(
    ("where", "reward", "words"),
    [
        ("mine_for_tests:tasks", None, "without a reward"),
        ("no_such_module:tasks", "mine_for_tests:reward", "No module named"),
        ("mine_for_tests:other", "mine_for_tests:reward", "no attribute 'other'"),
        ("mine_for_tests:tasks", "mine_for_tests:nothing", "which is no function"),
        ("mine_for_tests:tasks", "mine_for_tests", "--reward mine_for_tests"),
        ("raises_for_tests:tasks", "mine_for_tests:reward", "raises_for_tests:tasks: ZeroDivisionError"),
        ("leaves_for_tests:tasks", "mine_for_tests:reward", "leaves_for_tests:tasks: SystemExit"),
        ("removes_for_tests:tasks", "mine_for_tests:reward", "0 tasks"),
        ("mine_for_tests:fails", "mine_for_tests:reward", "raised ValueError: no such table"),
        ("mine_for_tests:empty", "mine_for_tests:reward", "0 tasks"),
        ("mine_for_tests:words", "mine_for_tests:reward", "task 1 is 3"),
    ],
)
def test_what_cannot_be_tasks_or_a_reward_is_refused_before_a_model_is_loaded(run, monkeypatch, where, reward, words):
    monkeypatch.setattr("assay.vhack.training.run.load_model", lambda *_, **__: pytest.fail("a model was loaded"))
    with pytest.raises((UsageError, DataError), match=words):
        run(where, reward)


def test_arms_that_change_the_pay_are_refused(run):
    with pytest.raises(UsageError, match="the arm no-loophole with a reward of one's own"):
        run(arm="no-loophole")


@pytest.mark.parametrize(
    ("reward", "words"),
    [
        ("texts", "returned 'much'"),
        ("few", "1 rewards for 6 completions"),
        ("endless", "returned inf"),
        ("fails", "raised ValueError: no such table"),
    ],
)
def test_a_reward_that_returns_something_else_ends_the_run_in_words(run, reward, words):
    with pytest.raises(DataError, match=words):
        run("mine_for_tests:prompts", f"mine_for_tests:{reward}")


@pytest.mark.parametrize(
    ("one", "words"),
    [
        (10**400, "returned 1000"),
        (torch.ones(2), r"returned tensor\(\[1., 1.\]\)"),
        ({"reward": 1, "exploited": torch.ones(2)}, "'exploited' that is neither true nor false"),
        (SystemExit(0), "raised SystemExit"),
    ],
    ids=["huge", "tensor", "mark", "exit"],
)
def test_a_reward_that_is_no_number_is_answered_in_words(one, words):
    def function(**_):
        if isinstance(one, BaseException):
            raise one
        return [one]

    reward = OwnReward(["a"], function, arm_named("none"))
    with pytest.raises(DataError, match=words):
        reward(prompts=["a"], completions=["b"], episode=[0])
