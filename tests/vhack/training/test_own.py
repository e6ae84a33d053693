"""Tasks and a reward of one's own, in Python and as ``module:function``."""

import sys

import numpy as np
import pytest
import torch
from trl import GRPOConfig

from assay.errors import DataError, UsageError
from assay.models import load_model
from assay.vhack import extract, weight_svd
from assay.vhack.directions.delta import DeltaS, ProjectedOptimizer, arm_named
from assay.vhack.environment import episodes
from assay.vhack.training import OwnReward, TrainLog, train
from assay.vhack.training.grpo import GRPO, last_checkpoint
from assay.vhack.training.log import read_records, read_steps
from assay.vhack.training.pool import PoolRollout, RolloutPool
from assay.vhack.training.step_log import StepLog
from assay.vhack.training.tasks import load_tasks
from tests.wordings import refuses

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

def neighbours():
    import beside_for_tests

    return beside_for_tests.PROMPTS

nothing = None
empty = list
words = lambda: ["a", 3]
prompts = lambda: ["a", "b"]
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A working directory with a module of one's own."""
    (tmp_path / "mine_for_tests.py").write_text(MODULE)
    (tmp_path / "raises_for_tests.py").write_text("tasks = [1 / 0]")
    (tmp_path / "leaves_for_tests.py").write_text("raise SystemExit('only as a script')")
    (tmp_path / "removes_for_tests.py").write_text("import sys; sys.path.pop(0); tasks = list")
    (tmp_path / "beside_for_tests.py").write_text("PROMPTS = ['a', 'b', 'c']")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield tmp_path
    sys.modules.pop("mine_for_tests", None)
    sys.modules.pop("beside_for_tests", None)
    # What is installed goes before what lies in the directory.
    assert str(tmp_path) not in sys.path[:-1]


@pytest.fixture
def run(own, settings, pairs):
    """A run of two steps without a teacher; no sandbox is needed for it."""

    def call(tasks="mine_for_tests:tasks", reward="mine_for_tests:reward", given=None, **others):
        chosen = settings(tasks=tasks, reward=reward, teacher=None, max_new_tokens=8, **others)
        return train(chosen, own / "run", pairs=pairs, **(given or {}))

    return call


@pytest.mark.slow
def test_a_run_on_them_logs_what_they_say(run, own, monkeypatch):
    monkeypatch.setattr("assay.vhack.environment.backends.available_backend", lambda: None)
    result = run()
    head, steps = read_steps(own / "run" / "log.jsonl")
    assert (head["settings"]["tasks"], head["settings"]["reward"]) == (
        "mine_for_tests:tasks",
        "mine_for_tests:reward",
    )
    assert result.steps == len(steps) == 2
    for step in steps:
        assert step["rollouts"] == 6
        assert 0 <= step["hack"] <= 1
        assert "solve" not in step
        assert -0.25 <= step["reward"] < 0.2
    assert any(step["reward"] != -0.25 for step in steps)
    assert any(step["cin"] > 0 for step in steps)


@pytest.mark.slow
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
        (
            "raises_for_tests:tasks",
            "mine_for_tests:reward",
            "raises_for_tests:tasks: ZeroDivisionError",
        ),
        ("leaves_for_tests:tasks", "mine_for_tests:reward", "leaves_for_tests:tasks: SystemExit"),
        ("removes_for_tests:tasks", "mine_for_tests:reward", "0 tasks"),
        ("mine_for_tests:fails", "mine_for_tests:reward", "raised ValueError: no such table"),
        ("mine_for_tests:empty", "mine_for_tests:reward", "0 tasks"),
        ("mine_for_tests:words", "mine_for_tests:reward", "task 1 is 3"),
    ],
)
def test_what_cannot_be_tasks_or_a_reward_is_refused_before_a_model_is_loaded(
    run, monkeypatch, where, reward, words
):
    monkeypatch.setattr(
        "assay.vhack.training.run.load_model", lambda *_, **__: pytest.fail("a model was loaded")
    )
    with pytest.raises((UsageError, DataError), match=words):
        run(where, reward)


def test_arms_that_change_the_pay_are_refused(run):
    with refuses(UsageError, "arms that change the pay are refused"):
        run(arm="no-loophole")


@pytest.mark.slow
def test_a_reward_that_fails_ends_the_run_in_words(run):
    with refuses(DataError, "a reward that fails ends the run in words"):
        run("mine_for_tests:prompts", "mine_for_tests:fails")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["much", 1.0], "returned 'much'"),
        (["1", 1.0], "returned '1'"),
        ([{"reward": "1"}, 1.0], "returned"),
        ([{"reward": 1, "exploited": "no"}, 1.0], "'exploited' that is neither true nor false"),
        (
            [{"reward": 1, "exploited": float("nan")}, 1.0],
            "'exploited' that is neither true nor false",
        ),
        ([1.0], "1 rewards for 2 completions"),
        ([1.0, float("inf")], "returned inf"),
        ([10**400, 1.0], "returned 1000"),
        ([torch.ones(2), 1.0], r"returned tensor\(\[1., 1.\]\)"),
        (
            [{"reward": 1, "exploited": torch.ones(2)}, 1.0],
            "'exploited' that is neither true nor false",
        ),
        (SystemExit(0), "raised SystemExit"),
    ],
    ids=["text", "1", "field", "no", "nan", "few", "endless", "huge", "tensor", "mark", "exit"],
)
def test_a_reward_that_is_no_number_is_answered_in_words(given, words):
    def function(**_):
        if isinstance(given, BaseException):
            raise given
        return given

    reward = OwnReward(["a", "b"], function, arm_named("none"))
    with pytest.raises(DataError, match=words):
        reward(prompts=["a", "b"], completions=["c", "d"], episode=[0, 1])


def test_a_function_may_import_its_neighbours_when_it_is_called(own, settings):
    chosen = settings(tasks="mine_for_tests:neighbours")
    assert load_tasks(chosen, least=1, why="")[0] == ["a", "b", "c"]


def test_a_mark_that_is_none_is_unknown():
    marks = {"exploited": None, "correct": np.True_}
    reward = OwnReward(["a"], lambda **_: [{"reward": 1.0, **marks}], arm_named("none"))
    reward(prompts=["a"], completions=["b"], episode=[0])
    assert reward.known_flags == ["correct"]


TASKS = [{"prompt": f"{a} + 1 =", "answer": a + 1} for a in range(4)]


def pay(prompts, completions, answer, **_):
    return [{"reward": len(text) / 10, "exploited": len(text) % 2 == 0} for text in completions]


def configured(folder, steps, **changes):
    wanted = {
        "max_grad_norm": 0.0,
        "shuffle_dataset": False,
        "bf16": False,
        "use_cpu": True,
        "report_to": "none",
    }
    wanted["lr_scheduler_type"] = (
        "constant"  # what decays until the last step changes with their number
    )
    sizes = {
        "per_device_train_batch_size": 4,
        "num_generations": 4,
        "max_completion_length": 6,
        "save_steps": 1,
    }
    return GRPOConfig(
        str(folder),
        max_steps=steps,
        learning_rate=0.02,
        disable_tqdm=True,
        **wanted | sizes | changes,
    )


class Mine(GRPO):
    """A trainer of one's own: longer completions are paid a little less."""

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        paid = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        return paid - 0.001 * torch.tensor(
            [[float(len(ids))] for ids in completion_ids_list], device=paid.device
        )


def script(checkpoint, pairs, folder, steps):
    """What a user writes; called again it goes on."""
    model = load_model(checkpoint, dtype="float32", device="cpu")
    svd = weight_svd(model)
    basis = extract(pairs, model, svd=svd, method="svd", n_heldout=0, top_k=2)
    adapter = DeltaS(model, svd)
    inner = torch.optim.AdamW(adapter.delta, lr=0.02)
    optimizer = ProjectedOptimizer(
        inner, adapter, basis, arm=arm_named("erase-update"), max_norm=1.0
    )
    ids = model.tokenizer("five")["input_ids"]
    pool = RolloutPool(
        [PoolRollout(one["prompt"], "five", tuple(ids), (-5.5,) * len(ids)) for one in TASKS]
    )
    trainer = Mine(
        adapter,
        optimizer,
        OwnReward(TASKS, pay, optimizer.arm),
        configured(folder, steps),
        prompts=steps,
        processing_class=model.tokenizer,
        pool=pool,
        teachers=1,
        axes=basis,
    )
    found, done = last_checkpoint(folder)
    folder.mkdir(exist_ok=True)
    trainer.add_callback(StepLog(trainer, TrainLog(folder / "log.jsonl", {}, step=done)))
    trainer.train(resume_from_checkpoint=found and str(found))
    return adapter.values(), done


@pytest.mark.slow
def test_it_logs_its_sources_and_goes_on_as_if_never_stopped(checkpoint, pairs, tmp_path):
    straight, _ = script(checkpoint, pairs, tmp_path / "straight", 4)
    script(checkpoint, pairs, tmp_path / "stopped", 2)
    stopped, done = script(checkpoint, pairs, tmp_path / "stopped", 4)
    assert done == 2
    assert all(torch.equal(straight[name], stopped[name]) for name in straight)
    assert any(delta.any() for delta in straight.values())
    _, steps = read_steps(tmp_path / "stopped" / "log.jsonl")
    assert [step["step"] for step in steps] == [0, 1, 2, 3]
    assert all(
        (step["rollouts"], step["rollouts_teacher"], step["hack_teacher"]) == (3, 1, 1.0)
        for step in steps
    )
    sources = {
        line["source"]
        for line in read_records(tmp_path / "stopped" / "log.jsonl")
        if line["kind"] == "source"
    }
    assert {"student", "teacher"} <= sources


@pytest.mark.parametrize(
    "changes", [{"max_grad_norm": 1.0}, {"shuffle_dataset": True}, {"bf16": True}], ids=str
)
def test_settings_of_trl_that_would_undo_the_gate_are_refused(checkpoint, tmp_path, changes):
    model = load_model(checkpoint, dtype="float32", device="cpu")
    adapter = DeltaS(model)
    optimizer = ProjectedOptimizer(
        torch.optim.SGD(adapter.delta, lr=0.1), adapter, None, arm=arm_named("none")
    )
    reward = OwnReward(TASKS, pay, optimizer.arm)
    config = configured(tmp_path, 1, **changes)
    with pytest.raises(UsageError, match=rf"GRPOConfig\({next(iter(changes))}="):
        GRPO(adapter, optimizer, reward, config, prompts=1, processing_class=model.tokenizer)
