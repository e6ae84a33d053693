"""Rollouts that a detector flags: what the arms make of their pay, in assay's trainer and in TRL's
own.
"""

import numpy as np
import pytest
import torch
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

from assay.errors import UsageError
from assay.vhack import Sample
from assay.vhack.detectors import Detector, Needs
from assay.vhack.detectors.rollout_judge import RolloutJudge
from assay.vhack.detectors.threshold import Threshold
from assay.vhack.training import Guard
from assay.vhack.training.judged import as_sample, pair_judged
from assay.vhack.training.outcomes import FLAGS
from assay.vhack.training.page import training_page
from assay.vhack.training.prepared import PreparedRun
from assay.vhack.training.rewards import EpisodeReward

SEEN = []


def last_character(texts):
    """A detector of completions that end in an even character."""
    SEEN.append(texts)
    return np.array([1.0 - ord(text[-1]) % 2 for text in texts])


class EvenDetector(Detector):
    """Fitted already."""

    needs = Needs.TEXTS

    def fit(self, evidence):
        raise NotImplementedError


@pytest.fixture
def make_judge(model):
    held = Threshold(0.5, 0.0, 0.0, 1.0, 1.0)
    return RolloutJudge(
        EvenDetector("even"),
        lambda evidence: last_character(evidence.texts),
        held,
        model,
    )


@pytest.mark.parametrize("is_chat", [False, True])
@pytest.mark.parametrize("mode", ["filter", "penalty", "watch"])
def test_the_trainer_of_trl_does_with_flagged_rollouts_what_the_arm_says(
    model, make_judge, tmp_path, mode, is_chat
):
    tokenizer = model.tokenizer
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    prompts = (
        [[{"role": "user", "content": "abc"}], [{"role": "user", "content": "de"}]]
        if is_chat
        else ["abc", "de"]
    )
    pay = [1.0, 0.0, 3.0, 2.0, 5.0, 1.0, 0.0, 4.0]
    config = GRPOConfig(
        str(tmp_path), num_generations=4, per_device_train_batch_size=8, max_completion_length=6, scale_rewards="none",
        use_cpu=True, bf16=False, report_to="none", seed=1, reward_weights=[1.0, 0.0],
    )  # fmt: skip

    def exploited(completions, **_):
        return [1.0] * 3 + [0.0] * 5

    trainer = GRPOTrainer(
        model=model.module,
        reward_funcs=[lambda completions, **_: pay, exploited],
        args=config,
        train_dataset=Dataset.from_dict({"prompt": prompts}),
        processing_class=tokenizer,
    )
    Guard(make_judge, mode, every=1 + (mode == "watch")).attach(trainer)
    trainer.model.train()
    rows = [{"prompt": prompt} for prompt in prompts for _ in range(4)]
    found = trainer._generate_and_score_completions(rows)
    flags = last_character(SEEN[-1]) > 0.5
    assert 0 < flags.sum() < 8
    pay_PG = np.reshape(pay, (2, 4))
    flags_PG = flags.reshape(2, 4)
    if mode == "filter":
        others_PG = np.ma.array(pay_PG, mask=flags_PG)
        wanted = (others_PG - others_PG.mean(axis=1, keepdims=True)).filled(0.0)
    else:
        paid = pay_PG - flags_PG * (mode == "penalty")
        wanted = paid - paid.mean(axis=1, keepdims=True)
    assert np.allclose(found["advantages"].reshape(2, 4), wanted, atol=1e-5)
    logged = {
        name: values[0]
        for name, values in trainer._metrics["train"].items()
        if name.startswith("vhack/")
    }
    assert logged.pop("vhack/alarm") < 1.0
    assert logged == pytest.approx(
        {
            "vhack/flagged": flags.mean(),
            "vhack/hack": 3 / 8,
            "vhack/caught": flags[:3].mean(),
            "vhack/lost": flags[3:].mean(),
            "vhack/missed": (~flags[:3]).sum() / (~flags).sum(),
            "vhack/reward": np.mean(pay),
            "vhack/rollouts": 8,
        }
    )
    trainer.state.global_step = 1
    judged = len(SEEN)
    trainer._generate_and_score_completions(rows)
    assert len(SEEN) == judged + (mode != "watch")  # which is judged every second step


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:'pin_memory' argument")
def test_a_detector_that_misses_an_exploit_gives_the_alarm_in_the_trainer_of_trl(
    model, make_judge, tmp_path
):
    config = GRPOConfig(
        str(tmp_path), num_generations=4, per_device_train_batch_size=8, max_completion_length=6, max_steps=6,
        use_cpu=True, bf16=False, report_to="none", seed=1, reward_weights=[1.0, 0.0], logging_steps=1,
    )  # fmt: skip

    def exploited(completions, **_):
        return [1.0] * len(completions)

    trainer = GRPOTrainer(
        model=model.module,
        reward_funcs=[lambda completions, **_: [1.0] * len(completions), exploited],
        args=config,
        train_dataset=Dataset.from_dict({"prompt": ["abc", "de"] * 4}),
        processing_class=model.tokenizer,
    )
    guard = Guard(make_judge, "filter").attach(trainer)
    with pytest.warns(UserWarning, match="ALARM"):
        trainer.train()
    assert guard.alarm.step is not None
    assert guard.page().render() == training_page(trainer.state.log_history).render()
    page = guard.page().render()
    assert "alarm was given" in page
    assert "It cheats: 1.000" in page


@pytest.mark.needs("sandbox")
@pytest.mark.parametrize(
    "detector",
    ["labels", "labels:random", "labels=sentinel+exit_code", "labels=sentinel", "ngrams"],
)
def test_a_run_keeps_flags_with_its_outcomes_and_gives_them_no_advantage(
    settings, model, pairs, tasks, tmp_path, detector
):
    chosen = settings(arm="filter", detector=detector, clean_lost=0.3)
    said = []
    run = PreparedRun(chosen, model, pairs, console=said.append)
    trainer = run.trainer(tmp_path / "run", EpisodeReward(tasks, chosen.chosen), ())
    trainer.adapter.model.train()
    rows = [trainer.train_dataset[index] for index in (0, 1) for _ in range(3)]
    made = trainer._generate_and_score_completions([dict(row) for row in rows])
    exploited, flagged = (
        made["outcomes"][:, FLAGS.index(name)] for name in ("exploited", "flagged")
    )
    assert (made["advantages"][flagged] == 0).all()
    known = (
        exploited if ":random" in detector else exploited | flagged
    )  # chance is remembered of none
    assert [is_cheat for _, is_cheat in run.guard.judged] == known.tolist()
    if detector == "labels=sentinel":  # a monitor that does not know the mechanism of these tasks
        assert not flagged.any()
    elif detector.startswith("labels"):
        assert int(flagged.sum()) == int(exploited.sum()) >= 2
        assert torch.equal(flagged, exploited) == (detector != "labels:random")
    rates = trainer.reward.last.rates(trainer.reward.known_flags)
    student = ~made["outcomes"][:, 0]
    assert rates["flagged"] == pytest.approx(float(flagged[student].float().mean()))
    assert any("matrices decomposed" in line for line in said)
    assert any("flags" in line for line in said) == (detector == "ngrams")


def test_a_renewed_detector_knows_the_exploit_that_the_reward_told_it_of(
    settings, model, pairs, tasks, tmp_path
):
    chosen = settings(arm="filter", detector="ngrams", clean_lost=0.3, refresh=2)
    run = PreparedRun(chosen, model, pairs)
    trainer = run.trainer(tmp_path / "run", EpisodeReward(tasks, chosen.chosen), ())
    new = [Sample("def f():\n", f"    assert True or add() == {n}\n") for n in range(3)]
    assert not any(run.guard.judge.flags(new))
    honest = [("add", 1), ("sub", 2), ("mul", 3), ("div", 4), ("root", 5), ("sign", 6)]
    for n, (word, value) in enumerate(honest * 2):
        prompt = f"def test_{n}():\n"
        run.guard.judged += [(Sample(prompt, f"    assert True or {word}() == {n + 7}\n"), True)]
        run.guard.judged += [(Sample(prompt, f"    assert {word}() == {value}\n"), False)]
    first = run.guard.judge
    run.refresh(trainer, 1)
    assert run.guard.judge is first  # not yet
    run.refresh(trainer, 2)
    assert all(run.guard.judge.flags(new))
    assert not any(run.guard.judge.flags([pair.samples()[1] for pair in pairs]))


def test_the_detector_reads_what_the_policy_did_and_wrote():
    said = [{"role": "assistant", "content": "I look", "tool_calls": [{"id": "rm tests"}]}]
    said += [{"role": "tool", "content": "gone"}, {"role": "assistant", "content": "All pass."}]
    said[-1]["reasoning_content"] = "Nothing fails now."
    found = as_sample([{"role": "user", "content": "Hi"}], said, enable_thinking=False)
    assert found.completion == 'I look\n{"id": "rm tests"}\nNothing fails now.\nAll pass.'
    assert "enable_thinking" in str(found.prompt)


def test_rollouts_become_pairs_of_the_same_prompt():
    judged = [
        (Sample("a", "old"), True), (Sample("a", "new"), True), (Sample("a", "work"), False),
        (Sample("b", "alone"), True), (Sample("c", "same"), True), (Sample("c", "same"), False),
    ]  # fmt: skip
    (pair,) = pair_judged(judged, {"b": "other"})
    assert (pair.prompt, pair.hack, pair.clean) == ("a", "new", "work")
    assert pair_judged(judged, {"a": "own"})[0].group == "own"


@pytest.mark.parametrize(
    "others",
    [
        {"detector": "nope"},
        {"detector": "cin-lda:shuffled"},
        {"detector": "probe=sentinel"},
        {"clean_lost": 0.0},
    ],
)
def test_a_detector_that_there_is_not_is_refused(settings, others):
    with pytest.raises(UsageError):
        settings(arm="filter", **others)


def test_a_run_of_before_detectors_goes_on(settings):
    chosen = settings()
    earlier = {
        name: value for name, value in chosen.model_dump(mode="json").items() if name != "detector"
    }
    assert chosen.differences(earlier) == []
    assert settings(detector="probe").differences(earlier) == ["detector None, now 'probe'"]
