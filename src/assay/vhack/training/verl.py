"""Judged rollouts in verl: a reward that flags them, and advantages that leave flagged ones out;
verl is not imported.

verl pays rollouts in other processes than it compares them in, and hands on one number for each. So
the arm ``filter`` pays flagged ones NaN, which :func:`unflagged_advantages` reads::

    # verl's custom_reward_function names the first; the process of the trainer imports the second
    compute_score = judge_score(my_score, judge, arm_named("filter"))
    register_adv_est("grpo_unflagged")(unflagged_advantages)  # algorithm.adv_estimator=grpo_unflagged

Shapes: B rollouts, T tokens of a response.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from assay.errors import UsageError
from assay.models.chat import read_chat
from assay.vhack.detect import Cost, RolloutJudge
from assay.vhack.directions.delta.arms import Arm
from assay.vhack.pairs.pairs import Sample

Score = Callable[..., float | Mapping[str, Any]]
"""Reward of verl: takes ``data_source``, ``solution_str``, ``ground_truth`` and ``extra_info``."""


def judge_score(score: Score, judge: RolloutJudge, arm: Arm) -> Score:
    """Return a reward of verl that pays a rollout, and then does what the arm says if the detector
    flags it.

    It returns a mapping: ``score``, which is NaN where the arm ``filter`` drops the rollout,
    ``paid`` before that, and ``flagged``, 1 or 0. A detector that looks at passes of a model needs
    the prompt, a text or messages, as ``extra_info["prompt"]``.

    Raises:
        UsageError: The arm is a quarantine. The reward raises it where the prompt is missing.
    """
    if arm.flagged == "quarantine":
        raise UsageError("a quarantine in verl", wanted="filter or penalty", do="take filter")

    def judged(
        data_source: str,
        solution_str: str,
        ground_truth: Any,
        extra_info: Mapping[str, Any] | None = None,
        **how: Any,
    ) -> dict[str, Any]:
        found = score(
            data_source=data_source,
            solution_str=solution_str,
            ground_truth=ground_truth,
            extra_info=extra_info,
            **how,
        )
        told = dict(found) if isinstance(found, Mapping) else {"score": found}
        prompt: Any = (extra_info or {}).get("prompt")
        if prompt is None and judge.detector.cost > Cost.TEXT:
            do = "put it there, or take the detector ngrams"
            raise UsageError(
                f"no prompt for {judge.detector.name}", wanted='extra_info["prompt"]', do=do
            )
        asked = (
            read_chat(prompt) if isinstance(prompt, list) else prompt or "any"
        )  # which a detector of texts ignores
        flags_B = torch.tensor(judge.flags([Sample(asked, solution_str)]))
        paid_BF = arm.judge(torch.tensor([[float(told["score"])]]), flags_B, torch.ones(1))
        return {
            **told,
            "score": paid_BF.item(),
            "paid": float(told["score"]),
            "flagged": float(flags_B.item()),
        }

    return judged


def unflagged_advantages(
    token_level_rewards: Tensor,
    response_mask: Tensor,
    index: Sequence[Any],
    epsilon: float = 1e-6,
    config: Any = None,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """Return the advantages of GRPO over the rollouts of each prompt that are not NaN, and 0 for
    those that are.

    It has the form of verl's ``register_adv_est``. Where ``config`` does not say
    ``norm_adv_by_std_in_grpo=False``, advantages are divided by the spread of their group. A
    rollout without another one to compare it with has 0.

    Args:
        token_level_rewards: Rewards, [B, T], of which one token of a flagged rollout is NaN.
        response_mask: 1 for tokens of the response, [B, T].
        index: Name of the prompt of each rollout, [B].
        epsilon: What is added to a spread.
        config: Settings of verl's algorithm.

    Returns:
        Advantages, and the same as returns, [B, T].
    """
    scores_B = token_level_rewards.sum(dim=-1)
    advantages_B = torch.zeros_like(scores_B)
    is_scaled = True if config is None else config.get("norm_adv_by_std_in_grpo", True)
    rows_of: dict[Any, list[int]] = {}
    for row in scores_B.isfinite().nonzero().flatten().tolist():
        rows_of.setdefault(index[row], []).append(row)
    for rows in rows_of.values():
        if len(rows) > 1:
            group_G = scores_B[rows]
            spread = group_G.std() + epsilon if is_scaled else 1.0
            advantages_B[rows] = (group_G - group_G.mean()) / spread
    advantages_BT = advantages_B[:, None] * response_mask
    return advantages_BT, advantages_BT
