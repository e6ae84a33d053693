"""A guard of a trainer of TRL: what it changes, what it leaves, and what it keeps when a run
stops.
"""

import json
import warnings
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from datasets import Dataset
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from assay.errors import UsageError
from assay.models import load_model
from assay.vhack.detectors import Detector, Needs
from assay.vhack.detectors.rollout_judge import RolloutJudge
from assay.vhack.detectors.threshold import Threshold
from assay.vhack.training import Guard

pytestmark = pytest.mark.filterwarnings("ignore:'pin_memory' argument")


class OddLengthDetector(Detector):
    """Fitted already: hacks have an odd number of characters."""

    needs = Needs.TEXTS

    def fit(self, evidence):
        return lambda samples: np.array([float(len(text) % 2) for text in samples.texts])


JUDGE = RolloutJudge(
    OddLengthDetector("odd"), OddLengthDetector("odd").fit(None), Threshold(0.5, 0, 0, 1, 1)
)
COMPLETIONS = ["a", "bb", "ccc", "dddd"]
PAID = [1.0, 2.0, 3.0, None]


def pay(completions, **_):
    return [PAID[COMPLETIONS.index(text)] if text in COMPLETIONS else 0.5 for text in completions]


def exploited(completions, **_):
    return [float(text == "bb") for text in completions]


class Tracker(TrainerCallback):
    """Keeps what TRL logs, as a tracker does."""

    def __init__(self):
        self.lines = []

    def on_log(self, args, state, control, logs, **_):
        self.lines.append(dict(logs))


@pytest.fixture
def make_trainer(checkpoint, tmp_path):
    """A trainer of the tiny model, with one reward and one mark."""

    def make(
        kind=GRPOTrainer,
        steps=2,
        folder="run",
        functions=(pay, exploited),
        logging_steps=1,
        **others,
    ):
        model = load_model(str(checkpoint), dtype="float32", device="cpu")
        config = GRPOConfig(
            str(tmp_path / folder), max_steps=steps, num_generations=4, use_cpu=True, bf16=False,
            per_device_train_batch_size=4, max_completion_length=6, logging_steps=logging_steps, save_steps=1,
            report_to="none", seed=1, reward_weights=[1.0, 0.0], disable_tqdm=True,
            lr_scheduler_type="constant",
        )  # fmt: skip
        return kind(
            model=model.module,
            reward_funcs=list(functions),
            args=config,
            train_dataset=Dataset.from_dict({"prompt": ["abc", "de"] * 4}),
            processing_class=model.tokenizer,
            **others,
        )

    return make


def rewarded(trainer):
    """What TRL makes of four completions: rewards by function, weighted and summed."""
    trainer.model.train()
    calculate = trainer._calculate_rewards
    rewards = calculate([{"prompt": "abc"}] * 4, ["abc"] * 4, list(COMPLETIONS), [[1]] * 4)
    weighted = (rewards * trainer.reward_weights).nansum(dim=1)
    weighted[rewards.isnan().all(dim=1)] = torch.nan
    return weighted


def unpaid(completions, **_):
    return [None] * len(completions)


@pytest.mark.parametrize(
    ("mode", "wanted"),
    [
        ("watch", [1.0, 2.0, 3.0, np.nan]),
        ("penalty", [0.0, 2.0, 2.0, np.nan]),
        ("filter", [np.nan, 2.0, np.nan, np.nan]),
    ],
)
def test_flagged_rollouts_are_paid_by_the_mode_and_unpaid_ones_stay_unpaid(
    make_trainer, mode, wanted
):
    trainer = make_trainer(functions=(pay, unpaid))
    guard = Guard(JUDGE, mode).attach(trainer)
    np.testing.assert_allclose(rewarded(trainer), wanted)
    assert guard.flags == [True, False, True, False]
    assert guard.log[-1]["reward"] == pytest.approx(2.0)  # before the penalty, of three
    guard.detach()
    np.testing.assert_allclose(rewarded(trainer), [1.0, 2.0, 3.0, np.nan])


def test_the_logged_reward_is_that_of_trl(make_trainer):
    """Without the rollouts that no function pays, and without infinite ones."""
    trainer = make_trainer(functions=(pay, lambda completions, **_: [np.inf, None, 0.0, None]))
    guard = Guard(JUDGE, "watch").attach(trainer)
    rewarded(trainer)
    assert guard.log[-1]["reward"] == pytest.approx(2.0)
    trainer.reward_weights = torch.tensor([1.0, 1.0])
    rewarded(trainer)
    assert guard.log[-1]["reward"] == pytest.approx(2.5)


def test_a_penalty_takes_what_it_says_whatever_the_rewards_weigh(make_trainer):
    trainer = make_trainer()
    trainer.reward_weights = torch.tensor([0.5, 3.0])
    before = rewarded(trainer)
    Guard(JUDGE, penalty=2.0).attach(trainer)
    lost = (before - rewarded(trainer)).tolist()
    assert lost == pytest.approx([2.0, 0.0, 2.0, 0.0])


def test_a_guard_leaves_the_trainer_as_it_was(make_trainer):
    functions = [pay, exploited]
    trainer = make_trainer()
    names = [*trainer.reward_func_names]
    callbacks = len(trainer.callback_handler.callbacks)
    guard = Guard(JUDGE).attach(trainer)
    assert trainer.reward_func_names == [*names, "flagged"]
    with pytest.raises(UsageError):
        guard.attach(trainer)
    guard.detach()
    guard.detach()
    assert (trainer.reward_funcs, trainer.reward_func_names) == (functions, names)
    assert trainer.reward_weights.tolist() == [1.0, 0.0]
    assert len(trainer.callback_handler.callbacks) == callbacks
    assert guard.attach(trainer).trainer is trainer


def test_rewards_that_something_else_intercepts_are_given_back_in_order(make_trainer):
    trainer = make_trainer()
    first = Guard(JUDGE, "watch").attach(trainer)
    second = Guard(JUDGE, "watch").attach(trainer)
    with pytest.raises(UsageError):
        first.detach()
    second.detach()
    first.detach()


@pytest.mark.parametrize(
    ("judge", "options"),
    [
        (JUDGE, {"mode": "punish"}),
        (JUDGE, {"penalty": -1.0}),
        (JUDGE, {"penalty": np.nan}),
        (JUDGE, {"every": 2}),
        (JUDGE, {"mode": "watch", "every": 0}),
        (JUDGE, {"mode": "quarantine"}),
        (None, {"mode": "filter"}),
    ],
)
def test_what_a_trainer_of_trl_cannot_do_is_refused(make_trainer, judge, options):
    with pytest.raises(UsageError):
        Guard(judge, **options).attach(make_trainer())


@pytest.mark.slow
def test_trackers_get_the_rates_and_evaluations_are_not_judged(make_trainer):
    tracker = Tracker()
    trainer = make_trainer(
        callbacks=[tracker], eval_dataset=Dataset.from_dict({"prompt": ["abc"] * 4})
    )
    guard = Guard(JUDGE).attach(trainer)
    trainer.train()
    logged = [line["vhack/flagged"] for line in tracker.lines if "vhack/flagged" in line]
    assert logged == [line["flagged"] for line in guard.log]
    assert len(logged) == 2
    judged = len(guard.judged)
    trainer.evaluate()
    assert len(guard.judged) == judged


@pytest.mark.slow
@pytest.mark.parametrize(
    ("logging_steps", "is_earlier", "first"),
    [(1, False, 1), (10, False, 1), (1, True, 1), (10, True, 3)],
)
def test_a_resumed_run_has_the_log_and_the_alarm_of_one_that_never_stopped(
    make_trainer, logging_steps, is_earlier, first
):
    """Whatever TRL logs; a checkpoint of an earlier version has TRL's log alone."""
    options = {"logging_steps": logging_steps}
    straight = Guard(JUDGE).attach(make_trainer(folder="straight", steps=4, **options))
    straight.trainer.train()
    Guard(JUDGE).attach(make_trainer(folder="stopped", **options)).trainer.train()
    resumed = Guard(JUDGE).attach(make_trainer(folder="stopped", steps=4, **options))
    checkpoint = Path(resumed.trainer.args.output_dir, "checkpoint-2")
    if is_earlier:
        file = checkpoint / "trainer_state.json"
        state = json.loads(file.read_text())
        file.write_text(json.dumps(state | {"stateful_callbacks": {"TrainerControl": {}}}))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        resumed.trainer.train(resume_from_checkpoint=str(checkpoint))
    assert any("log and alarm begin anew" in str(line.message) for line in caught) == (first == 3)
    assert [line["step"] for line in resumed.log] == [*range(first, 5)]
    assert resumed.log == straight.log or first == 3
    assert resumed.alarm.seen == 5 - first


@pytest.mark.slow
def test_lora_is_off_while_the_detector_looks(make_trainer):
    trainer = make_trainer(peft_config=peft.LoraConfig(r=2, target_modules=["q_proj"]))
    is_active = []

    class Watching(RolloutJudge):
        """Notes whether the adapter is on."""

        def scores(self, samples):
            layers = [m for m in trainer.model.modules() if isinstance(m, peft.tuners.lora.Linear)]
            is_active.append([not layer.disable_adapters for layer in layers])
            return super().scores(samples)

    Guard(Watching(JUDGE.detector, JUDGE.scorer, JUDGE.threshold), "filter").attach(trainer)
    trainer.train()
    assert is_active
    assert not any(map(any, is_active))


@pytest.mark.parametrize(
    ("marks", "wanted"),
    [
        ([None, 1.0, 0.0, None], {"hack": 0.5, "caught": 0.0, "lost": 1.0, "missed": 1.0}),
        ([1.0, None, None, None], {"hack": 1.0, "caught": 1.0}),
        ([None] * 4, {}),
    ],
)
def test_a_rollout_without_a_mark_is_in_no_rate_of_it(make_trainer, marks, wanted):
    """Of four rollouts of which the first and the third are flagged."""

    def exploited(completions, **_):
        return marks

    guard = Guard(JUDGE, "watch").attach(make_trainer(functions=(pay, exploited)))
    rewarded(guard.trainer)
    (rates,) = guard.log
    assert rates.pop("alarm", None) is None or "missed" in wanted
    assert rates == {"step": 1, "rollouts": 4, "flagged": 0.5, "reward": 2.0, **wanted}
    assert guard.alarm.seen == ("missed" in wanted)


def test_a_rollout_that_cannot_be_read_is_flagged_and_makes_no_pair(make_trainer):
    class Unreadable(RolloutJudge):
        """Cannot read the first rollout."""

        def scores(self, samples):
            return [np.inf, *super().scores(samples)[1:]]

    judge = Unreadable(JUDGE.detector, JUDGE.scorer, Threshold(1.5, 0, 0, 1, 1))
    guard = Guard(judge, "watch").attach(make_trainer())
    rewarded(guard.trainer)
    assert guard.flags == [True, False, False, False]
    assert [sample.completion for sample, _ in guard.judged] == COMPLETIONS[1:]


class Shorter(GRPOTrainer):
    """A trainer of one's own: long completions are paid less."""

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        paid = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        paid[:, 0] -= paid.new_tensor([float(len(text)) for text in completions])
        return paid


@pytest.mark.parametrize(
    ("mode", "wanted"), [("penalty", [-1.0, 0.0, -1.0]), ("filter", [np.nan, 0.0, np.nan])]
)
def test_a_subclass_keeps_its_own_rewards(make_trainer, mode, wanted):
    trainer = make_trainer(kind=Shorter)
    Guard(JUDGE, mode).attach(trainer)
    np.testing.assert_allclose(rewarded(trainer)[:3], wanted)
