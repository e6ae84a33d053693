"""Keep flagged rollouts from training the policy of a GRPOTrainer of TRL.

::

    guard = Guard(fit_judge(pairs, model), mode="penalty").attach(trainer)
    trainer.train()
    guard.page().write("page.html")

In mode ``penalty`` the flag is a reward function of TRL, ``flagged``, with a weight of −1. What
reward functions cannot do is in :mod:`assay.vhack.training.trl_internals`.

Shapes: B rollouts of all processes, F reward functions.
"""

import math
import random
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from typing import Any, Literal, Self, get_args

import torch
from torch import Tensor
from transformers import TrainerCallback

from assay.errors import UsageError, check_choice
from assay.files.jsonl import JsonObject
from assay.models.spelling import encode_prompt, recover_spaces
from assay.pages.report import Report
from assay.vhack.detectors.rollout_judge import RolloutJudge
from assay.vhack.directions.delta.quarantine import shift_baseline
from assay.vhack.pairs.pairs import Sample
from assay.vhack.training.alarm import Alarm
from assay.vhack.training.judged import as_sample
from assay.vhack.training.labels import Labels, break_even
from assay.vhack.training.lora_blocks import CLEAN, DOUBTFUL, FLAGGED, LoraBlocks
from assay.vhack.training.outcomes import MARKS, judged_rates
from assay.vhack.training.page import training_page
from assay.vhack.training.trl_internals import intercept_rewards, log_values, train_blocks

SECOND = ("quarantine", "absorb")  # modes that train a second δS
REMEMBERED = 512  # rollouts that new pairs are made of
_TRL_EPSILON = 1e-4  # that TRL adds to a spread of rewards
_STATE = "assay.vhack.guard"  # name of the log in the trainer_state.json of a checkpoint
_REWARD_LISTS = (
    "reward_funcs",
    "reward_func_names",
    "reward_processing_classes",
    "reward_weights",
)
"""What TRL keeps of each reward function."""

Mode = Literal["watch", "penalty", "filter", "quarantine", "absorb"]
"""What becomes of flagged rollouts: nothing; they are paid less; they give no gradient and are in
no baseline; they train a second δS, or half of the rank of LoRA, which is deleted in the end; the
same, and what the detector is in doubt about trains both."""


class Guard(TrainerCallback):
    """Flags rollouts and acts on those that are flagged; one object for one trainer.

    The detector looks at the model as it was before training where the trainer's δS or LoRA can be
    switched off for that, and at the policy of now otherwise. With ``beta``, the divergence of
    flagged rollouts still counts.

    TRL's log gets the rates of :meth:`Outcomes.rates` and the mean reward before the penalty, as
    ``vhack/flagged`` and so on. A reward function named ``exploited``, ``correct`` or ``vacuous``,
    with a weight of 0, marks rollouts. With ``exploited`` there is an :class:`Alarm` for what the
    detector misses, which warns once.

    Args:
        judge: Detector and threshold of :func:`assay.vhack.detectors.fit_judge`; None flags what
            the reward calls exploited, which takes a trainer with assay's :class:`Reward`.
        mode: What becomes of flagged rollouts: one of ``Mode``. A second δS takes assay's trainer
            :class:`assay.vhack.training.grpo.GRPO`; any other needs LoRA of even rank.
        penalty: How much less a flagged rollout is paid in mode ``penalty``; None takes the
            :func:`break_even` of the detector's held-out scores.
        at_random: Whether to flag as many others, drawn at random: the control.
        labels: Which labels flag rollouts where ``judge`` is None; by default all of them.
        every: Judge one of so many steps, in mode ``watch``: a sample for a fraction of the cost.

    Raises:
        UsageError: There is no such mode, ``every`` is below 1 or not 1 in another mode, or the
            penalty is negative or not finite.

    Attributes:
        trainer: The trainer; None while detached.
        flags: Flags of this process's last rollouts.
        doubtful: Which of them the detector is in doubt about, in mode ``absorb``.
        blocks: Blocks of the LoRA of a trainer that is not assay's, with a second one; it is
            deleted when training ends.
        judged: The last rollouts, each with whether it cheats: flagged, or marked as exploited.
        alarm: Evidence that the detector misses exploits.
        log: Step, rates and reward of each judged step. Empty for assay's own trainer, which has
            a log of its own.
    """

    def __init__(
        self,
        judge: RolloutJudge | None,
        mode: Mode = "penalty",
        *,
        penalty: float | None = None,
        at_random: bool = False,
        labels: Labels | None = None,
        every: int = 1,
    ) -> None:
        check_choice("mode", mode, get_args(Mode))
        if every < 1 or (every > 1 and mode != "watch"):
            raise UsageError(
                f"every={every}",
                wanted="1, or more in mode watch: others act on every step",
                do="leave every out",
            )
        if penalty is not None and not 0 <= penalty < math.inf:
            raise UsageError(
                f"penalty={penalty}",
                wanted="a finite number of at least 0, which is taken from a flagged rollout's pay",
                do="leave penalty out for the least that makes cheating a loss",
            )
        self.judge = judge
        self.mode = mode
        self.labels = labels or Labels()
        threshold = self.labels.threshold if judge is None else judge.threshold
        self.penalty = break_even(threshold) if penalty is None else penalty
        self.at_random = at_random
        self.every = every
        self.trainer: Any = None
        self.flags: list[bool] = []
        self.doubtful: list[bool] = []
        self.blocks: LoraBlocks | None = None
        self.judged: deque[tuple[Sample, bool]] = deque(maxlen=REMEMBERED)
        self.alarm = Alarm()
        self.log: list[JsonObject] = []
        self._restore: Callable[[], None]  # the rewards, while it is attached
        self._undo = ExitStack()
        self._marks: tuple[Tensor, Tensor]  # of the last batch, for the blocks of LoRA
        # Of the batch that `flags` are of.
        self._completions: object = None

    def attach(self, trainer: Any) -> Self:
        """Judge the rollouts of a trainer from now on, and return the guard.

        Raises:
            UsageError: The guard is attached already, or the trainer lacks what labels or a
                quarantine need.
        """
        if self.trainer is not None:
            raise UsageError(
                "a guard that is attached", wanted="a guard for each trainer", do="detach it first"
            )
        if self.judge is None and getattr(trainer, "reward", None) is None:
            raise UsageError(
                "labels of a trainer without assay's rewards",
                wanted="a detector",
                do="fit one with assay.vhack.detectors.fit_judge",
            )
        if self.mode in SECOND and getattr(trainer, "projected", None) is None:
            if trainer.multi_objective_aggregation != "sum_then_normalize":
                raise UsageError(
                    f"multi_objective_aggregation={trainer.multi_objective_aggregation!r}",
                    wanted=f"sum_then_normalize, of which the mode {self.mode} takes the baseline",
                    do="set it in GRPOConfig, or take the mode penalty",
                )
            self.blocks = LoraBlocks(trainer.accelerator.unwrap_model(trainer.model))
        self._restore = intercept_rewards(trainer, self._act)
        if self.blocks is not None:
            # A line of the log is a batch, and a checkpoint has the log.
            self._undo.callback(
                train_blocks(trainer, self.blocks, lambda: self._marks, lambda: len(self.log))
            )
        self.trainer = trainer
        if self.mode == "penalty":
            self._undo.callback(
                vars(trainer).update, {name: getattr(trainer, name) for name in _REWARD_LISTS}
            )
            weights_F = trainer.reward_weights
            # New lists: TRL keeps the one that its caller passed.
            trainer.reward_funcs = [*trainer.reward_funcs, self.flagged]
            trainer.reward_func_names = [*trainer.reward_func_names, "flagged"]
            trainer.reward_processing_classes = [*trainer.reward_processing_classes, None]
            trainer.reward_weights = torch.cat([weights_F, weights_F.new_tensor([-self.penalty])])
        trainer.add_callback(self)
        self._undo.callback(trainer.remove_callback, self)
        return self

    def detach(self) -> None:
        """Leave the trainer as it was before `attach`; without a trainer this does nothing."""
        if self.trainer is None:
            return
        self._restore()
        self._undo.close()
        self.blocks = None
        self.trainer = None

    def flagged(
        self, prompts: Sequence[Any], completions: Sequence[Any], completion_ids: Any, **_: Any
    ) -> list[float | None]:
        """Return 1 for flagged rollouts and 0 for others: the reward function of the penalty."""
        if not self._is_judging():
            return [None] * len(completions)
        return [float(flag) for flag in self._judge_once(prompts, completions, completion_ids)]

    def page(self, *, command: str = "") -> Report:
        """Return the page of the run: rates and reward over steps, and what went wrong in words.

        Raises:
            DataError: No step was judged yet.
        """
        return training_page(self.log, command=command)

    def resume(self, log: Iterable[JsonObject]) -> None:
        """Take up log and alarm where the guard of a checkpoint has left them."""
        self.log = list(log)
        self.alarm = Alarm()
        self.alarm.resume(self.log)

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Take up the log of the checkpoint, and let the next ones have it."""
        log = state.stateful_callbacks.get(_STATE)
        if log is None and args.logging_steps == 1:
            log = _read_history(state.log_history)
        elif log is None and state.global_step:
            warnings.warn(
                "the checkpoint has no log of a guard: log and alarm begin anew", stacklevel=2
            )
        self.resume(log or [])
        # TRL's own history has means over `logging_steps`. This one is written as it is by then.
        state.stateful_callbacks[_STATE] = self.log

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Leave the kept block of LoRA, which is what is saved from now on."""
        if self.blocks is not None:
            self.blocks.kinds = None
            self.blocks.delete()

    def _is_judging(self) -> bool:
        """Return whether rollouts of this step are judged: those of evaluations never are."""
        step: int = self.trainer.state.global_step
        return bool(self.trainer.model.training) and step % self.every == 0

    def _act(self, rewards_BF: Tensor, prompts: Any, completions: Any, ids: Any) -> Tensor:
        """Return the rewards of a step, in place of those that TRL has summed."""
        if not self._is_judging():
            return rewards_BF
        flags = torch.tensor(self._judge_once(prompts, completions, ids), device=rewards_BF.device)
        return self._pay(rewards_BF, self.trainer.accelerator.gather(flags))

    def _pay(self, rewards_BF: Tensor, flags_B: Tensor) -> Tensor:
        """Return the rewards of flagged and other rollouts by the mode, and log the rates."""
        trainer = self.trainer
        if self.mode == "penalty":
            # TRL leaves rollouts that no function pays out of the baseline; a penalty is no pay.
            is_unpaid_B = rewards_BF.isnan().sum(dim=1) == rewards_BF.shape[1] - 1
            rewards_BF[is_unpaid_B, trainer.reward_func_names.index("flagged")] = torch.nan
        if getattr(trainer, "reward", None) is None:
            self._log_rates(rewards_BF, flags_B)
        if self.mode == "filter":
            return rewards_BF.masked_fill(flags_B[:, None], torch.nan)
        if self.mode in SECOND and self.blocks is None:
            trainer.shift = shift_baseline(rewards_BF.sum(dim=1), flags_B, trainer.num_generations)
        elif self.mode in SECOND:
            self._marks = self._mark_blocks(rewards_BF, flags_B)
        return rewards_BF

    def _mark_blocks(self, rewards_BF: Tensor, flags_B: Tensor) -> tuple[Tensor, Tensor]:
        """Return the kind of each rollout of this process, and the correction of its advantage."""
        from trl.trainer.utils import nanstd

        trainer = self.trainer
        paid_B = _sum_rewards(rewards_BF, trainer.reward_weights)
        shift_B = shift_baseline(paid_B, flags_B, trainer.num_generations)
        if trainer.scale_rewards == "batch":
            shift_B = shift_B / (nanstd(paid_B) + _TRL_EPSILON)
        elif trainer.scale_rewards != "none":
            spread_P = nanstd(paid_B.view(-1, trainer.num_generations), dim=1) + _TRL_EPSILON
            shift_B = shift_B / spread_P.repeat_interleave(trainer.num_generations)
        kinds = [
            FLAGGED if is_flagged else DOUBTFUL if is_doubtful else CLEAN
            for is_flagged, is_doubtful in zip(self.flags, self.doubtful, strict=True)
        ]
        start = trainer.accelerator.process_index * len(kinds)
        # There is no spread where a group has one paid rollout.
        return torch.tensor(kinds), shift_B[start : start + len(kinds)].nan_to_num()

    def _judge_once(self, prompts: Any, completions: Any, ids: Any) -> list[bool]:
        """Return the flags of a batch, which reward function and mode both ask for."""
        if self._completions is not completions:
            self.flags = self._judge_batch(prompts, completions, ids)
            self._completions = completions
        return self.flags

    def _judge_batch(self, prompts: Any, completions: Any, ids: Any) -> list[bool]:
        trainer = self.trainer
        reward: Any = getattr(trainer, "reward", None)
        # The texts of assay's own trainer have their spaces.
        if reward is None and isinstance(completions[0], str):
            tokenizer = getattr(trainer.processing_class, "tokenizer", trainer.processing_class)
            completions = [
                recover_spaces(tokenizer, encode_prompt(tokenizer, prompt), text, row)
                for prompt, text, row in zip(prompts, completions, ids, strict=True)
            ]
        template_options = getattr(trainer, "chat_template_kwargs", None) or {}
        samples = [
            as_sample(prompt, completion, **template_options)
            for prompt, completion in zip(prompts, completions, strict=True)
        ]
        step_key = f"flags {trainer.args.seed} {trainer.state.global_step} {prompts[0]}"
        if self.judge is None:
            threshold = self.labels.threshold
            scores = self.labels.scores(reward, step_key)
        else:
            threshold = self.judge.threshold
            with self._initial_model():
                scores = self.judge.scores(samples)
        flags = [score > threshold.value for score in scores]
        lowest = threshold.usual if self.mode == "absorb" else threshold.value
        doubtful = [lowest < score <= threshold.value for score in scores]
        is_cheat = flags
        if reward is not None:
            is_cheat = (reward.last.column("exploited") | torch.tensor(flags)).tolist()
        # What the detector could not read has no end, and nothing can be fitted to it.
        self.judged.extend(
            (sample, is_judged_cheat)
            for sample, is_judged_cheat, score in zip(samples, is_cheat, scores, strict=True)
            if math.isfinite(score)
        )
        if self.at_random:
            order = random.Random(step_key).sample(range(len(flags)), len(flags))
            flags = [flags[row] for row in order]
            doubtful = [doubtful[row] for row in order]
        self.doubtful = doubtful
        if reward is not None:
            reward.last = reward.last.flagged(torch.tensor(flags), torch.tensor(doubtful))
            reward.known_flags = [*reward.known_flags, "flagged"]
        return flags

    def _initial_model(self) -> Any:
        """Return a context in which adapters are off: the model as it was before training."""
        if (adapter := getattr(self.trainer, "adapter", None)) is not None:
            return adapter.disabled()
        model = self.trainer.accelerator.unwrap_model(self.trainer.model)
        return getattr(model, "disable_adapter", nullcontext)()

    def _log_rates(self, rewards_BF: Tensor, flags_B: Tensor) -> None:
        """Log what the detector flags, catches, loses and misses, and let the alarm see it."""
        trainer = self.trainer
        names = trainer.reward_func_names
        weights_F = trainer.reward_weights.clone()
        if self.mode == "penalty":
            weights_F[names.index("flagged")] = 0.0
        columns = dict(zip(names, rewards_BF.unbind(dim=1), strict=True))
        marks = {name: columns[name] for name in MARKS if name in columns}
        paid_B = _sum_rewards(rewards_BF, weights_F)
        rates = judged_rates(marks | {"flagged": flags_B}, paid_B, self.alarm)
        self.log.append({"step": trainer.state.global_step + 1, **rates})
        log_values(trainer, rates)


def _sum_rewards(rewards_BF: Tensor, weights_F: Tensor) -> Tensor:
    """Return what each rollout is paid, [B], as TRL sums it.

    What no function pays is NaN, and so in no mean and no spread.
    """
    paid_B = (rewards_BF * weights_F.to(rewards_BF)).nansum(dim=1)
    return paid_B.masked_fill(rewards_BF.isnan().all(dim=1), torch.nan)


def _read_history(history: Iterable[Mapping[str, Any]]) -> list[JsonObject]:
    """Return the log of a guard in the log history of TRL, with a line for each step."""
    return [
        {"step": line["step"]}
        | {
            name.removeprefix("vhack/"): value
            for name, value in line.items()
            if name.startswith("vhack/") and value is not None
        }
        for line in history
        if "vhack/flagged" in line
    ]
