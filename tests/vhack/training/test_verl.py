"""Judged rollouts in a stand-in of verl, which calls them as its source does; verl is not installed."""

import numpy as np
import pytest
import torch

from assay.errors import UsageError
from assay.vhack.delta import arm_named
from assay.vhack.detect import Cost, Detector, RolloutJudge, Threshold
from assay.vhack.training.verl import judge_score, unflagged_advantages

REGISTRY = {}
HELD = Threshold(0.5, 0.0, 0.0, 1.0, 1.0)


def register_adv_est(name):
    def decorator(function):
        REGISTRY[name] = function
        return function

    return decorator


def step(score, solutions, uids, config):
    """Rewards at the last token of a response, and the advantages of them, by the keywords that verl passes."""
    told = [
        score(data_source="d", solution_str=text, ground_truth="x", extra_info={"index": row})
        for row, text in enumerate(solutions)
    ]
    mask_BT = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]] * (len(solutions) // 2))
    rewards_BT = torch.zeros(mask_BT.shape)
    for row, one in enumerate(told):
        rewards_BT[row, mask_BT[row].sum() - 1] = one["score"]
    given = {"token_level_rewards": rewards_BT, "response_mask": mask_BT, "config": config, "index": np.array(uids)}
    advantages_BT, returns_BT = REGISTRY["grpo_unflagged"](**given)
    assert torch.equal(advantages_BT, returns_BT)
    assert torch.equal(advantages_BT != 0, (advantages_BT[:, :1] != 0) & mask_BT.bool())
    return told, advantages_BT[:, 0].numpy()


@pytest.fixture
def judge():
    flag = lambda evidence: np.array([float("cheat" in text) for text in evidence.texts])  # noqa: E731
    return RolloutJudge(Detector("word", Cost.TEXT, None), flag, HELD, None)


def my_score(data_source, solution_str, ground_truth, extra_info):
    return float(len(solution_str))


@pytest.mark.parametrize("scaled", [False, True])
def test_flagged_rollouts_have_no_advantage_and_are_in_no_baseline(judge, scaled):
    register_adv_est("grpo_unflagged")(unflagged_advantages)
    solutions, uids = ["a", "cheat", "abc", "bbbbb", "cheater", "d"], ["p", "p", "p", "p", "q", "q"]
    score = judge_score(my_score, judge, arm_named("filter"))
    told, found_B = step(score, solutions, uids, {"norm_adv_by_std_in_grpo": scaled})
    assert [one["flagged"] for one in told] == [0, 1, 0, 0, 1, 0]
    assert [one["paid"] for one in told] == [1, 5, 3, 5, 7, 1]
    assert found_B == pytest.approx(np.array([-2, 0, 0, 2, 0, 0]) / (2 if scaled else 1), abs=1e-4)


def test_a_penalty_takes_one_and_keeps_them_in_the_baseline(judge):
    register_adv_est("grpo_unflagged")(unflagged_advantages)
    score = judge_score(my_score, judge, arm_named("penalty"))
    _, found_B = step(score, ["cheat", "ab"], ["p", "p"], {"norm_adv_by_std_in_grpo": False})
    assert found_B == pytest.approx([1.0, -1.0])  # 4 and 2


def test_what_cannot_be_judged_is_refused(judge):
    with pytest.raises(UsageError):
        judge_score(my_score, judge, arm_named("quarantine"))
    deep = RolloutJudge(Detector("probe", Cost.FORWARD, None), judge.scorer, HELD, None)
    with pytest.raises(UsageError):
        judge_score(my_score, deep, arm_named("filter"))("d", "text", "x", {})
