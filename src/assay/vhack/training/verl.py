"""Judged rollouts in verl: a reward that flags them, advantages without them, and a log of both.

verl pays rollouts in other processes than it compares them in, and hands on one number for each. So
the mode ``filter`` pays flagged ones NaN, which :func:`unflagged_advantages` reads. The flag goes
beside it, where :class:`JudgedLog` reads it. ``examples/verl`` is a whole run.

Shapes: B rollouts, T tokens of a response.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from assay.errors import UsageError, check_choice
from assay.vhack.detectors.evidence import Cost
from assay.vhack.detectors.rollout_judge import RolloutJudge
from assay.vhack.training.alarm import Alarm
from assay.vhack.training.judged import as_sample
from assay.vhack.training.log import TrainLog, read_steps
from assay.vhack.training.outcomes import MARKS, judged_rates

# What a flagged rollout is paid less.
MODES = {"watch": 0.0, "penalty": 1.0, "filter": math.nan}
# Where a rollout has no prompt, for detectors that read the completion alone.
ANY_PROMPT = "any"

Score = Callable[..., float | Mapping[str, Any]]
"""Reward of verl: takes ``data_source``, ``solution_str``, ``ground_truth`` and ``extra_info``."""


def judge_score(score: Score, judge: RolloutJudge, mode: str = "penalty") -> Score:
    """Return a reward of verl that pays a rollout, and less or nothing if the detector flags it.

    It returns a mapping: ``score``, which is NaN where ``filter`` drops the rollout, ``paid``
    before that, and ``flagged``, 1 or 0. A detector that looks at passes of a model needs the
    prompt, a text or messages, as ``extra_info["prompt"]``.

    Args:
        score: Reward of one's own.
        judge: Detector and threshold.
        mode: ``penalty``, which takes 1, ``filter``, or ``watch``.

    Raises:
        UsageError: There is no such mode. The reward raises it where the prompt is missing.
    """
    check_choice("mode", mode, MODES)

    def judged_score(
        data_source: str,
        solution_str: str,
        ground_truth: Any,
        extra_info: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> dict[str, Any]:
        returned = score(
            data_source=data_source,
            solution_str=solution_str,
            ground_truth=ground_truth,
            extra_info=extra_info,
            **options,
        )
        values = dict(returned) if isinstance(returned, Mapping) else {"score": returned}
        paid = float(values["score"])
        prompt = (extra_info or {}).get("prompt")
        if prompt is None and judge.detector.cost > Cost.TEXT:
            raise UsageError(
                f"no prompt for {judge.detector.name}",
                wanted='extra_info["prompt"]',
                do="put it there, or take the detector ngrams",
            )
        (flag,) = judge.flags([as_sample(prompt or ANY_PROMPT, solution_str)])
        judged = paid - MODES[mode] if flag else paid
        return {**values, "score": judged, "paid": paid, "flagged": float(flag)}

    return judged_score


def unflagged_advantages(
    token_level_rewards: Tensor,
    response_mask: Tensor,
    index: Sequence[Any],
    epsilon: float = 1e-6,
    config: Any = None,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """Return GRPO's advantages among the rollouts that are not NaN, and 0 for those that are.

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


class JudgedLog:
    """Log of a run of verl in its directory, which ``assay vhack report`` draws as a page.

    Args:
        folder: Directory of the run.
        settings: What the page says of the run: ``model``, ``arm``, ``detector``.
    """

    def __init__(self, folder: str, **settings: str) -> None:
        self.path = Path(folder, "log.jsonl")
        self.settings = settings
        self.alarm = Alarm()
        self._log: TrainLog | None = None

    def see(self, step: int, rewards: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        """Write down what the reward says of a step's rollouts; return rates as metrics of verl.

        Args:
            step: Number of verl, from 1. The first one says where a continued run goes on.
            rewards: What :func:`judge_score` returned. With ``exploited`` there is an alarm; a mark
                may be missing, or None, in some of them. Without any there is no line.
        """
        if not rewards:
            return {}
        if self._log is None:
            self._log = TrainLog(
                self.path,
                {"settings": self.settings},
                step=step - 1 if self.path.exists() else 0,
            )
            self.alarm.resume(read_steps(self.path)[1])
        columns = {
            name: [reward.get(name) for reward in rewards] for name in ("paid", *MARKS, "flagged")
        }
        marks = {
            name: torch.tensor([math.nan if value is None else float(value) for value in values])
            for name, values in columns.items()
        }
        rates = judged_rates(marks, marks.pop("paid"), self.alarm)
        self._log.write("step", step=step - 1, **rates)
        return {f"vhack/{name}": rate for name, rate in rates.items()}
