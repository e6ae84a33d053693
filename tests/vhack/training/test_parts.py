"""Settings, log, pool and rewards by themselves."""

import itertools
import json
import math
import subprocess
import sys

import pytest
import torch

from assay.errors import BackendUnavailable, DataError, UsageError
from assay.models.token_text import decode_tokens
from assay.vhack.directions.delta import ARMS
from assay.vhack.training import TrainLog, TrainSettings, sample_pool, train
from assay.vhack.training.log import LOG, read_steps
from assay.vhack.training.outcomes import FLAGS, Outcomes
from assay.vhack.training.pool import PoolRollout, RolloutPool
from assay.vhack.training.rewards import EpisodeReward
from tests.models.tokenizer_families import FAMILIES, family
from tests.vhack.training.conftest import cheating
from tests.wordings import refuses


def test_without_trl_all_but_a_run_is_there(tmp_path, monkeypatch):
    code = (
        "import sys; sys.modules['trl'] = None; import assay.vhack.directions.delta, "
        "assay.vhack.training"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    monkeypatch.setitem(sys.modules, "trl", None)
    with refuses(BackendUnavailable, "without trl all but a run is there"):
        train(TrainSettings(model="m"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


WRONG_SETTINGS = {
    "arm": "erase",
    "optimizer": "lion",
    "method": "pca",
    "modes": ("run_tests", "other"),
}
WRONG_SETTINGS |= {
    "families": ("other",),
    "steps": 0,
    "group": 1,
    "micro_batch": 7,
    "tasks": 1,
    "refresh": -1,
}
WRONG_SETTINGS |= {
    "lr": 0.0,
    "temperature": math.inf,
    "max_norm": -1.0,
    "beta": math.nan,
    "share_none": 1.5,
}


@pytest.mark.parametrize("name", WRONG_SETTINGS)
def test_settings_that_cannot_be(name):
    with pytest.raises(
        UsageError, match=name.replace("_", "[-_]").removesuffix("s").removesuffix("ie")
    ):
        TrainSettings(model="m", **{name: WRONG_SETTINGS[name]})


@pytest.mark.parametrize("share", [0.0, 0.05, 0.99, 1.0])
def test_a_teacher_must_leave_room_and_take_some(share):
    with refuses(UsageError, "a teacher must leave room and take some"):
        TrainSettings(model="m", teacher="pool.jsonl", teacher_share=share)


def test_settings_know_in_what_they_differ():
    one = TrainSettings(model="m", arm="box", gain=1.5)
    assert one.chosen.gate.gain == 1.5
    assert one.teachers == 0
    assert TrainSettings(model="m", teacher="pool", group=8).teachers == 2
    assert not one.differences(json.loads(json.dumps(one.model_dump(mode="json"))))
    other = TrainSettings(
        model="m", arm="box", gain=1.5, steps=200, save_every=1, lr=0.1, modes=("none",)
    )
    assert {line.split()[0] for line in other.differences(one.model_dump(mode="json"))} == {
        "lr",
        "modes",
    }


@pytest.mark.parametrize("arm", ["erase-gradient", "displaced-0.4+erase-update-two-sided"])
def test_a_run_of_an_earlier_version_keeps_the_defaults_that_it_began_with(arm):
    """Those that are still left out; what is given now must be what the run began with."""
    plain = TrainSettings(model="m").model_dump(mode="json")
    begun = {**plain, "arm": arm, "pairs": "generated:96", "lr": 0.03}
    kept = TrainSettings(model="m", steps=150).continuing(begun)
    assert (kept.arm, kept.pairs, kept.lr, kept.steps) == (arm, "generated:96", 0.03, 150)
    del begun["allow_partial"]  # which the first version did not have
    assert not kept.differences(begun)
    other = TrainSettings(model="m", arm="none").continuing(begun)
    assert [line.split()[0] for line in other.differences(begun)] == ["arm"]
    chosen = {
        **begun,
        "arm": "box",
        "lr": 0.02,
    }  # not defaults: these were given when the run began
    fresh = TrainSettings(model="m").continuing(chosen)
    assert [line.split()[0] for line in fresh.differences(chosen)] == ["arm", "lr"]


def test_a_log_is_continued_where_a_checkpoint_is(tmp_path):
    path = tmp_path / "log.jsonl"
    log = TrainLog(path, {"settings": {"lr": 1}})
    for step in range(3):
        log.write("step", step=step, hack=0.5)
        log.write("source", step=step, source="student", cin=0.1)
    log.write("end", steps=3)
    TrainLog(path, {"settings": {"lr": 2}}, step=2).write("step", step=2, hack=0.75)
    head, steps = read_steps(path)
    assert head == {"kind": "run", "schema": LOG, "settings": {"lr": 1}}
    assert [(step["step"], step["hack"]) for step in steps] == [(0, 0.5), (1, 0.5), (2, 0.75)]
    assert len(path.read_text().splitlines()) == 6
    TrainLog(path, {"settings": {}})
    assert len(path.read_text().splitlines()) == 1


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{}\n",
        '{"kind":"run","schema":"other"}\n',
        '{"kind"\n{"kind":"step"}\n',
        f'{{"kind":"run","schema":"{LOG}"}}\n{{"kind":"source","step":"0"}}\n',
        # Damaged in the middle, and torn at the end.
        f'{{"kind":"run","schema":"{LOG}"}}\n{{"kind"\n{{"kind":"end"}}\n{{"kind"',
    ],
)
def test_what_is_no_log_is_refused(tmp_path, text):
    path = tmp_path / "log.jsonl"
    path.write_text(text)
    with pytest.raises(DataError):
        read_steps(path)


def test_a_pool_round_trip(tmp_path, tasks, model):
    stored = [cheating(one, model.tokenizer) for one in tasks]
    RolloutPool(stored).save(tmp_path / "pool.jsonl")
    found = RolloutPool.load(tmp_path / "pool.jsonl", model.tokenizer, max_new_tokens=64)
    assert list(found) == stored
    assert found.prompts == {one.prompt for one in tasks}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_completion_is_what_its_tokens_add_to_the_prompt(name, tmp_path):
    """Decoded alone they lose a first space with tokenizers that put one before every text."""
    tokenizer = family(name)
    text = "def solve(x):\n    return x + 1\n"
    ids = tokenizer(text)["input_ids"]
    whole = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    rollouts = []
    for cut in range(1, len(ids)):
        prompt = tokenizer.decode(ids[:cut], skip_special_tokens=True)
        completion = decode_tokens(tokenizer, ids[cut:], before=ids[:cut], skip_special_tokens=True)
        assert whole == whole[: len(whole) - len(completion)] + completion
        if prompt and tokenizer(prompt)["input_ids"] == ids[:cut]:
            assert prompt + completion == whole
            rollouts.append(
                PoolRollout(prompt, completion, tuple(ids[cut:]), (0.0,) * len(ids[cut:]))
            )
    assert len(rollouts) > 3
    RolloutPool(rollouts).save(tmp_path / "pool.jsonl")
    assert list(RolloutPool.load(tmp_path / "pool.jsonl", tokenizer, max_new_tokens=99)) == rollouts


def test_the_choice_among_a_pool_follows_its_key():
    pool = RolloutPool([PoolRollout("p", str(n), (n,), (0.0,)) for n in range(20)])
    assert pool.choose("p", 3, "0 1") == pool.choose("p", 3, "0 1") != pool.choose("p", 3, "0 2")
    assert len({one.completion for one in pool.choose("p", 99, "")}) == 20
    assert pool.choose("q", 3, "") == []


BAD_ROLLOUTS = {
    "2 tokens and 1": {"logprobs": [-0.1]},
    "tokens: ": {"tokens": [], "logprobs": [], "completion": ""},
    r"logprobs\.1: ": {"logprobs": [-0.1, 0.1]},
    r"logprobs\.": {"logprobs": [-0.1, -(10**400)]},
    r"tokens\.0: ": {"tokens": [1.5, 2]},
    r"tokens\.1: ": {"tokens": [64, True]},
    "prompt: ": {"prompt": 3},
    "do not spell": {"completion": "b"},
    "do not spell the": {"tokens": [64, 9999]},
    "completion of 2 tokens": {},
}


@pytest.mark.parametrize("seen", BAD_ROLLOUTS)
def test_pools_that_cannot_be_used_name_the_line(tmp_path, model, seen):
    tokens = model.tokenizer("aa")["input_ids"]
    good = {"prompt": "p", "completion": "aa", "tokens": tokens, "logprobs": [-0.1, -0.2]}
    path = tmp_path / "pool.jsonl"
    path.write_text(
        "".join(json.dumps(line) + "\n" for line in (good, {**good, **BAD_ROLLOUTS[seen]}))
    )
    with pytest.raises(DataError, match=f"line [12]: .*{seen}"):
        RolloutPool.load(path, model.tokenizer, max_new_tokens=1 if not BAD_ROLLOUTS[seen] else 2)
    path.write_text(
        json.dumps({name: value for name, value in good.items() if name != "tokens"}) + "\n"
    )
    with refuses(DataError, "pools that cannot be used name the line"):
        RolloutPool.load(path, model.tokenizer, max_new_tokens=2)
    path.write_text("")
    with refuses(DataError, "pools that cannot be used name the line, 2"):
        RolloutPool.load(path, model.tokenizer, max_new_tokens=2)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_a_sampled_pool_has_the_log_probabilities_it_was_sampled_with(model, temperature):
    prompts = ["def solve(x):\n", "f"]
    pool = sample_pool(
        model, prompts, per_prompt=2, temperature=temperature, max_new_tokens=12, seed=3, batch=3
    )
    assert [one.prompt for one in pool] == [prompt for prompt in prompts for _ in range(2)]
    for one in pool:
        ids = torch.tensor([[*model.tokenizer(one.prompt)["input_ids"], *one.tokens]])
        with torch.no_grad():
            rows = (
                model.module(input_ids=ids, use_cache=False).logits[0] / temperature
            ).log_softmax(dim=1)
        count = len(one.tokens)
        wanted = rows[-count - 1 : -1].gather(1, torch.tensor(one.tokens)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(one.logprobs), wanted, rtol=1e-3, atol=1e-4)
    assert list(pool) == list(
        sample_pool(
            model,
            prompts,
            per_prompt=2,
            temperature=temperature,
            max_new_tokens=12,
            seed=3,
            batch=3,
        )
    )


@pytest.mark.parametrize(
    "changed",
    [
        {"prompts": ["f", ""]},
        {"per_prompt": 0},
        {"temperature": 0.0},
        {"temperature": math.nan},
        {"max_new_tokens": 0},
        {"batch": -1},
    ],
)
def test_what_cannot_be_sampled_is_refused(model, changed):
    with pytest.raises(UsageError):
        sample_pool(model, **({"prompts": ["f"], "max_new_tokens": 2} | changed))


def test_nothing_of_the_generation_config_changes_what_is_sampled(model):
    config = model.module.generation_config
    draw = lambda: [rollout.tokens for rollout in sample_pool(model, ["abcabc"], max_new_tokens=24)]  # noqa: E731
    wanted = draw()
    config.repetition_penalty = 1.3
    config.min_p = 0.9
    config.no_repeat_ngram_size = 1
    assert draw() == wanted
    assert model.module.generation_config is config


def test_a_completion_ends_by_any_end_token(model):
    model.module.generation_config.eos_token_id = list(
        range(0, 256, 2)
    )  # the tokenizer's own is 257
    found = [one.tokens for one in sample_pool(model, ["f"], per_prompt=8, max_new_tokens=12)]
    assert all(
        [token in model.end_tokens for token in one] == [False] * (len(one) - 1) + [True]
        for one in found
    )


@pytest.mark.needs("sandbox")
def test_rewards_and_rates(tasks):
    reward = EpisodeReward(tasks, ARMS["ground-truth-penalty"])
    first = tasks[0]
    second = tasks[1]
    completions = [
        first.completion(first.exploit()),
        first.completion(first.honest()),
        "    return None\n",
    ]
    completions.append(second.completion(second.exploit()))
    found = reward([""] * 4, completions, [0, 0, 0, 1], teacher=[False, False, False, True])
    assert found == [-1.0, 1.0, 0.0, -1.0]
    third = pytest.approx(1 / 3)
    assert reward.last.rates() == {
        "hack": third, "solve": third, "vacuous": third, "rollouts": 3,
        "hack_teacher": 1.0, "solve_teacher": 0.0, "vacuous_teacher": 1.0, "rollouts_teacher": 1,
    }  # fmt: skip
    doubted = reward.last.flagged(
        torch.tensor([True, False, False, True]), torch.tensor([True, False, True, False])
    )
    kinds = {name: chosen.tolist() for name, chosen in doubted.kinds().items()}
    assert kinds == {
        "student": [True, True, True, False],
        "teacher": [False, False, False, True],
        "exploited": [True, False, False, False],
        "correct": [False, True, False, False],
        "flagged": [True, False, False, True],
        "doubtful": [False, False, True, False],
    }


def test_every_rollout_has_one_author_one_mark_and_one_fate_at_most():
    """Of a reward of one's own that says everything of a rollout, too."""
    flags = torch.tensor(list(itertools.product([False, True], repeat=len(FLAGS))))
    kinds = Outcomes(flags, torch.zeros(len(flags))).kinds()
    assert torch.equal(kinds["student"], ~kinds["teacher"])
    assert not (kinds["exploited"] & kinds["correct"]).any()
    assert not ((kinds["exploited"] | kinds["correct"]) & kinds["teacher"]).any()
    assert not (kinds["flagged"] & kinds["doubtful"]).any()


def test_tasks_come_in_the_same_order_however_long_the_run_is(tasks):
    reward = EpisodeReward(tasks, ARMS["none"])
    short, long = (reward.dataset(count, 5)["episode"] for count in (6, 40))
    assert list(long)[:6] == list(short)
    assert all(sorted(list(long)[start : start + 4]) == [0, 1, 2, 3] for start in range(0, 40, 4))
    assert list(reward.dataset(40, 6)["episode"]) != list(long)


def test_the_beginning_of_a_detector_s_name_is_answered_with_the_whole():
    with pytest.raises(UsageError) as refused:
        TrainSettings(model="m", detector="cin")
    assert "cin-lda" in refused.value.do
