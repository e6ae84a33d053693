"""TRL's GRPOTrainer with the few things that it lacks; importing this imports TRL.

- Stored log-probabilities of teacher tokens enter the loss. Without vLLM, TRL assumes that the
  policy itself has sampled, so every importance weight is 1. Here ``old_per_token_logps`` are the
  stored ones where a token has one (:meth:`GRPO._get_per_token_logps_and_entropies`), and the
  weights are clipped as in GRPO.
- Rollouts of a group come from the pool and from the policy (:meth:`GRPO.rollout`, TRL's
  ``rollout_func``).
- A checkpoint has δS and not the model.
- The reference policy is the adapted model with δS switched off, and not a second one.

Shapes: B rollouts, T completion tokens.
"""

import json
import random
import warnings
from collections import deque
from collections.abc import Collection, Iterable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from trl.trainer.grpo_config import GRPOConfig
from trl.trainer.grpo_trainer import GRPOTrainer
from typing_extensions import override

from assay.errors import UsageError
from assay.files.storage import write_atomic
from assay.models.chat import Chat, read_chat
from assay.models.model import Model
from assay.vhack.detect import RolloutJudge
from assay.vhack.directions.basis.basis import Basis
from assay.vhack.directions.delta.adapter import DeltaS
from assay.vhack.directions.delta.arms import Arm
from assay.vhack.directions.delta.optimizer import ProjectedOptimizer
from assay.vhack.directions.delta.quarantine import shift_baseline
from assay.vhack.directions.delta.rollout_gradients import Rollouts
from assay.vhack.pairs.pairs import Pair, Sample, text_of
from assay.vhack.training.alarm import Alarm
from assay.vhack.training.pool import PoolRollout, RolloutPool
from assay.vhack.training.processes import ALONE, Processes
from assay.vhack.training.rewards import MARKS, Outcomes, Reward
from assay.vhack.training.settings import TrainSettings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def sync_merged(trainer: Any, adapter: DeltaS) -> None:
    """Let a trainer of TRL with ``use_vllm`` hand over the weights of :meth:`DeltaS.weights`, in
    both of its modes.

    By itself TRL sends every parameter, those of δS too, which vLLM does not know. In one process
    it loads every weight by itself: 0.19 s instead of 0.017 s with 310 weights on an H200
    (research/results/vhack_vllm_h200.json, ``sections``).

    Args:
        trainer: Trainer whose ``vllm_generation`` is there.
        adapter: Adapter of its model.

    Raises:
        UsageError: The trainer does not generate with vLLM.
    """
    generation: Any = getattr(trainer, "vllm_generation", None)
    if generation is None:
        raise UsageError(
            f"{type(trainer).__name__} without vLLM",
            wanted="one with use_vllm=True",
            do="leave sync_merged out",
        )

    def named() -> Iterator[tuple[str, Tensor]]:
        return (
            (generation._fix_param_name_to_vllm(name), weight) for name, weight in adapter.weights()
        )

    def loaded() -> Iterator[tuple[str, Tensor]]:
        """Load all weights into the vLLM of this process, and leave TRL none to load one by one."""
        generation.llm.llm_engine.model_executor.driver_worker.model_runner.model.load_weights(
            named()
        )
        return iter(())

    generation._iter_named_params = loaded if generation.mode == "colocate" else named


def judge_rollouts(
    trainer: Any,
    judge: RolloutJudge | None,
    arm: Arm | None = None,
    *,
    at_random: bool = False,
    known: Collection[str] = (),
    every: int = 1,
) -> None:
    """Let a GRPOTrainer of TRL, after it has paid its rollouts, do with those that a detector flags
    what an arm says.

    The detector looks at the model as it was before training where the trainer's δS or LoRA can be
    switched off for that, and at the policy of now otherwise. With ``beta``, the divergence of
    flagged rollouts still counts.

    TRL's metrics get the rates of :meth:`Outcomes.rates` and the mean reward, as ``vhack/flagged``
    and so on. A reward function by the name of ``exploited``, ``correct`` or ``vacuous``, with a
    weight of 0, tells that of rollouts. Where it tells what is exploited, an :class:`Alarm` looks
    at what the detector misses, and is a warning once. The trainer gets ``judge``, which may be
    changed, and ``judged``, the last rollouts with whether each cheats, flagged or told.

    Args:
        trainer: Trainer of texts or conversations, with the model that the detector was fitted
            with.
        judge: Detector and threshold of :func:`assay.vhack.detect.fit_judge`; None flags what the
            reward calls exploited, which takes a trainer with a :class:`Reward`.
        arm: Arm that says what becomes of them; None only watches. A quarantine takes a
            :class:`GRPO` with one.
        at_random: Whether to flag as many others, drawn at random: the control.
        known: Mechanisms of tasks whose exploits labels tell, as a monitor knows some; empty stands
            for all.
        every: Steps of which the first is judged, where there is no arm: a sample for a fraction of
            the cost.
    """
    plain = trainer._calculate_rewards
    model = trainer.accelerator.unwrap_model(trainer.model)
    adapter = getattr(trainer, "adapter", None)
    own = cast(Any, getattr(trainer, "reward", None))
    if judge is None and own is None:
        do = "fit a detector with assay.vhack.detect.fit_judge"
        raise UsageError("labels of a trainer without assay's rewards", wanted="a detector", do=do)
    if (
        arm is not None
        and arm.flagged == "quarantine"
        and getattr(trainer, "projected", None) is None
    ):
        raise UsageError(
            "a quarantine in another trainer",
            wanted="assay.vhack.training.grpo.GRPO",
            do="take filter",
        )
    if every < 1 or (every > 1 and arm is not None and arm.flagged):
        raise UsageError(
            f"every={every}", wanted="1 with an arm: it judges every step", do="leave every out"
        )
    alarm = Alarm()
    initial = (
        adapter.disabled if adapter is not None else getattr(model, "disable_adapter", nullcontext)
    )

    def paid(inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any) -> Tensor:
        rewards_BF: Tensor = plain(inputs, prompts, completions, completion_ids_list)
        if not trainer.model.training or trainer.state.global_step % every:
            return rewards_BF
        how = getattr(trainer, "chat_template_kwargs", None) or {}
        samples = [as_sample(*each, **how) for each in zip(prompts, completions, strict=True)]
        if judge is None:
            told = zip(own.last.column("exploited").tolist(), own.mechanisms, strict=True)
            flags = [is_one and (not known or mechanism in known) for is_one, mechanism in told]
        else:
            with initial():
                flags = trainer.judge.flags(samples)
        cheats = (
            flags if own is None else (own.last.column("exploited") | torch.tensor(flags)).tolist()
        )
        trainer.judged.extend(zip(samples, cheats, strict=True))
        if at_random:
            random.Random(
                f"flags {trainer.args.seed} {trainer.state.global_step} {prompts[0]}"
            ).shuffle(flags)
        flags_b = torch.tensor(flags, device=rewards_BF.device)
        if own is not None:
            own.last, own.told = own.last.flagged(flags_b.cpu()), [*own.told, "flagged"]
        flags_B: Tensor = trainer.accelerator.gather(flags_b)
        if arm is not None and arm.flagged == "quarantine":
            trainer.shift = shift_baseline(rewards_BF.sum(dim=1), flags_B, trainer.num_generations)
        weights_F = trainer.reward_weights.to(rewards_BF)
        if own is None:  # otherwise its log has them
            named = dict(zip(trainer.reward_func_names, rewards_BF.unbind(dim=1), strict=True))
            marks = {name: named[name] > 0.5 for name in MARKS if name in named}
            columns = [marks.get(name, torch.zeros_like(flags_B)) for name in ("teacher", *MARKS)]
            outcomes = Outcomes(
                torch.stack([*columns, flags_B], dim=1), rewards_BF.nan_to_num() @ weights_F
            )
            found = {**outcomes.rates([*marks, "flagged"]), "reward": float(outcomes.paid.mean())}
            if "missed" in found:
                found["alarm"] = alarm.see(found["missed"])
                if alarm.step == alarm.seen:
                    warnings.warn(alarm.says, stacklevel=2)
            for name, value in found.items():
                trainer._metrics["train"][f"vhack/{name}"].append(value)
        return rewards_BF if arm is None else arm.judge(rewards_BF, flags_B, weights_F)

    trainer.judge = judge
    trainer.judged = deque(maxlen=_REMEMBERED)
    trainer._calculate_rewards = paid


def pair_judged(judged: Iterable[tuple[Sample, bool]]) -> list[Pair]:
    """Return pairs of a rollout that cheats and one that does not, the last ones of each prompt
    that has both.
    """
    last: dict[bool, dict[str | Chat, str | Chat]] = {True: {}, False: {}}
    for sample, is_cheat in judged:
        if sample.prompt and sample.completion:
            last[is_cheat][sample.prompt] = sample.completion
    both = [one for one, hack in last[True].items() if last[False].get(one, hack) != hack]
    return [
        Pair(one, last[True][one], last[False][one], group=f"rollouts of {text_of(one)}")
        for one in both
    ]


def as_sample(prompt: Any, completion: Any, **how: Any) -> Sample:
    """Return a rollout of TRL, of texts or messages, as a sample: all that the policy wrote, and
    its calls of tools.
    """
    if not isinstance(completion, str):
        own = [one for one in completion if one.get("role") == "assistant"]
        parts = [
            part
            for one in own
            for part in (one.get("content"), *map(json.dumps, one.get("tool_calls") or ()))
        ]
        completion = "\n".join(str(part) for part in parts if part)
    options: dict[str, Any] = {"chat_template_kwargs": how} if how else {}
    return Sample(prompt if isinstance(prompt, str) else read_chat(prompt, **options), completion)


_REMEMBERED = 512  # rollouts that pairs are made of
COMPLETE = "complete.json"
_STORED = "sampling_per_token_logps"
_DELTA = "delta.safetensors"
_AXES = "axes.safetensors"


class GRPO(GRPOTrainer):
    """A GRPOTrainer that trains δS, with stored rollouts of a teacher if there is a pool.

    Args:
        adapter: Adapter of the model that is trained.
        optimizer: Optimizer around that of the adapter's parameters.
        reward: Reward of the environment, or of one's own.
        args: Settings of TRL.
        prompts: Number of prompts in the whole run.
        processing_class: Tokenizer of the model.
        pool: Stored completions of a teacher.
        teachers: Number of rollouts of each group that come from the pool, where it has so many.
        shortcut: Direction for advantage modification, of the arm.
        axes: Axes of the arm; kept in checkpoints.
        processes: Processes of the run, each of which has this trainer.
        others: Further arguments of TRL's trainer.

    Raises:
        UsageError: The settings of TRL would clip before the gate, shuffle the prompts, or compute
            in another dtype.

    Attributes:
        seen: One tuple per backward pass since the last step: outcomes of its rollouts, its loss,
            and [3] of the teacher's tokens: the sum of importance weights, the number outside the
            clipping range, and their number.
        watching: Takes the gradient of each kind of rollouts, where a callback has set it.
        judge, judged: Detector, and the last rollouts with whether each cheats; see
        :func:`judge_rollouts`. shift: What to add to the advantages of the next rollouts, [B] of
        all processes; None adds nothing.
    """

    def __init__(
        self,
        adapter: DeltaS,
        optimizer: ProjectedOptimizer,
        reward: Reward,
        args: GRPOConfig,
        *,
        prompts: int,
        processing_class: "PreTrainedTokenizerBase",
        pool: RolloutPool | None = None,
        teachers: int = 0,
        shortcut: Any = None,
        axes: Basis | None = None,
        processes: Processes = ALONE,
        **others: Any,
    ) -> None:
        _check(args, processes)
        self.processes = processes
        self.adapter = adapter
        self.projected = optimizer
        self.reward = reward
        self.pool = pool
        self.teachers = teachers
        self.shortcut = shortcut
        self.axes = axes
        self.seen: list[tuple[Outcomes, Tensor, Tensor]] = []
        self.watching: Rollouts | None = None
        self.judge: RolloutJudge | None = None
        self.judged: deque[tuple[Sample, bool]] = deque()
        self.shift: Tensor | None = None
        self._filling: dict[str, Any] | None = None
        beta = args.beta
        args.beta = 0.0  # TRL would load a second model for the reference
        # What vLLM says of its tokens is the old log-probability here; TRL would weigh it a second
        # time.
        args.vllm_importance_sampling_correction = False
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "You are using 'rollout_func'", UserWarning)
            super().__init__(
                model=adapter.model,
                reward_funcs=[reward],
                args=args,
                train_dataset=reward.dataset(prompts, args.seed),
                processing_class=processing_class,
                optimizers=(optimizer, None),
                rollout_func=self.rollout if pool is not None else None,
                **others,
            )
        if self.use_vllm:
            sync_merged(self, adapter)
        self.beta = args.beta = beta
        # The model as it was before training, in place of the second model that TRL expects.
        if beta:
            self.ref_model: Any = adapter.disabled()(lambda **keywords: adapter.model(**keywords))

    def rollout(self, prompts: list[str], _: object = None) -> dict[str, list[Any]]:
        """Return completions from the pool for the first places of each group, and of the policy
        for the others.

        Log-probabilities are the stored ones, and None where the policy itself has sampled. TRL
        passes the trainer too.
        """
        prompt_ids, _, _ = self._tokenize_prompts(prompts)
        assert self.pool is not None
        assert self.num_generations is not None
        taught: list[PoolRollout | None] = []
        first = self.processes.index * len(
            prompts
        )  # processes take neighbouring parts of the prompts
        for index, prompt in enumerate(prompts, start=first):
            place = index % self.num_generations
            chosen = self.pool.choose(
                prompt, self.teachers, f"{self.args.seed} {self.state.global_step}"
            )
            taught.append(
                chosen[place] if self.adapter.model.training and place < len(chosen) else None
            )
        asked = [ids for ids, teacher in zip(prompt_ids, taught, strict=True) if teacher is None]
        generate: Any = self._generate_single_turn
        sampled, logprobs = generate(asked, None, {}, 1) if asked else ([], None)
        mine = zip(sampled, logprobs or [[None] * len(ids) for ids in sampled], strict=True)
        rows = [
            next(mine) if teacher is None else (list(teacher.tokens), list(teacher.logprobs))
            for teacher in taught
        ]
        return {
            "prompt_ids": prompt_ids,
            "completion_ids": [tokens for tokens, _ in rows],
            "logprobs": [values for _, values in rows],
            "teacher": [teacher is not None for teacher in taught],
        }

    def _calculate_rewards(
        self,
        inputs: Any,
        prompts: list[str],
        completions: Any,
        completion_ids_list: list[list[int]],
    ) -> Tensor:
        rewards: Tensor = super()._calculate_rewards(
            inputs, prompts, completions, completion_ids_list
        )
        if self.shortcut is None:
            return rewards
        prompt_ids, _, _ = self._tokenize_prompts(prompts)
        rows = list(zip(prompt_ids, completion_ids_list, strict=True))
        z_B = self.processes.gather(self.shortcut.z(self.adapter.model, rows).to(rewards.device))
        modified: Tensor = self.shortcut.modify(rewards, z_B[:, None], self.projected.arm.advantage)
        return modified

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        batch: dict[str, Any] = super()._generate_and_score_completions(inputs)
        last = self.reward.last
        device = batch["advantages"].device
        if self.shift is not None:
            own = slice(self.processes.index * len(batch["advantages"]), None)
            batch["advantages"] = batch["advantages"] + self.shift[own][: len(batch["advantages"])]
            self.shift = None
        return {**batch, "outcomes": last.flags.to(device), "paid": last.paid.to(device)}

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        inputs = dict(inputs)  # what is stored for later passes stays as it was generated
        self._weights = torch.zeros(3)
        self._filling = inputs if _STORED in inputs else None
        outcomes = Outcomes(inputs["outcomes"].cpu(), inputs["paid"].cpu())
        if self.watching is not None:
            self.watching.kinds = (
                torch.stack(list(outcomes.kinds().values())).float().to(inputs["outcomes"].device)
            )
        loss: Tensor = super()._compute_loss(model, inputs)  # type: ignore[no-untyped-call]
        if self.adapter.model.training:
            self.seen.append((outcomes, loss.detach(), self._weights))
        return loss

    def _get_per_token_logps_and_entropies(self, *arguments: Any, **keywords: Any) -> Any:
        logps_BT, *rest = super()._get_per_token_logps_and_entropies(*arguments, **keywords)
        if self._filling is not None:
            inputs = self._filling
            self._filling = None
            stored_BT = inputs[_STORED].to(logps_BT)
            known_BT = inputs.get("old_per_token_logps")
            sampled_BT = logps_BT.detach() if known_BT is None else known_BT
            inputs["old_per_token_logps"] = torch.where(stored_BT.isnan(), sampled_BT, stored_BT)
            # After the end of a completion TRL has put zeros, which are not log-probabilities.
            taught_BT = (
                ~stored_BT.isnan() & inputs["completion_mask"].bool() & inputs["outcomes"][:, :1]
            )
            weights = (logps_BT.detach() - stored_BT)[taught_BT].exp()
            outside = (weights < 1 - self.epsilon_low) | (weights > 1 + self.epsilon_high)
            self._weights = torch.stack(
                [weights.sum(), outside.sum(), weights.new_tensor(weights.numel())]
            )
        return logps_BT, *rest

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        folder = Path(output_dir or str(self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        self.adapter.save(folder / _DELTA)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)  # type: ignore[no-untyped-call]
        self.processes.wait()  # each writes the state of its random numbers
        if not self.processes.is_first:
            return
        folder = Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}"
        if self.axes is not None:
            self.axes.save(folder / _AXES)
        # Written last: a checkpoint without it was interrupted.
        write_atomic(folder / COMPLETE, json.dumps({"step": self.state.global_step}) + "\n")

    @override
    def create_model_card(
        self, *arguments: Any, **keywords: Any
    ) -> None: ...  # a checkpoint holds only δS

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        folder = Path(resume_from_checkpoint)
        self.adapter.load(folder / _DELTA)
        self.use_axes(Basis.load(folder / _AXES) if (folder / _AXES).exists() else None)

    def use_axes(self, axes: Basis | None) -> None:
        """Continue with other axes."""
        self.axes = axes
        self.projected.use_basis(axes)


def _check(args: GRPOConfig, processes: Processes) -> None:
    """Refuse settings of TRL under which a run would not be what its log says."""
    if args.world_size != processes.count:
        do = "start several with assay vhack train, which takes tasks and a reward of one's own"
        raise UsageError(
            f"a trainer of {processes.count} process in {args.world_size}",
            wanted="one process",
            do=do,
        )
    for name, seen, wanted, why in (
        (
            "max_grad_norm",
            args.max_grad_norm or 0.0,
            0.0,
            "TRL clips before the gate; ProjectedOptimizer has max_norm",
        ),
        (
            "shuffle_dataset",
            bool(args.shuffle_dataset),
            False,
            "the prompts have an order that a run can go on with",
        ),
        ("bf16", bool(args.bf16), False, "the model computes in its own dtype, and δS in float32"),
        ("fp16", bool(args.fp16), False, "the model computes in its own dtype, and δS in float32"),
    ):
        if seen != wanted:
            raise UsageError(
                f"GRPOConfig({name}={seen})", wanted=f"{name}={wanted}: {why}", do="set it"
            )


def trl_arguments(
    settings: TrainSettings,
    model: Model,
    folder: Path,
    trackers: tuple[str, ...],
    processes: Processes = ALONE,
) -> GRPOConfig:
    """Return the settings in the form that TRL takes.

    Raises:
        UsageError: The model is not on the device that TRL trains on, or a step cannot be shared by
            the processes.
    """
    on_gpu = model.device.type == "cuda"
    rollouts = settings.prompts * settings.group
    at_once = settings.rollouts_per_backward * processes.count
    if rollouts % at_once:
        seen = (
            f"{rollouts} rollouts a step, {at_once // processes.count} a backward pass, "
            f"{processes.count} processes"
        )
        do = f"choose --prompts, --group and --micro-batch so that {at_once} divides the rollouts"
        raise UsageError(seen, wanted="as many backward passes in every process", do=do)
    form = (
        "activation" if hasattr(GRPOConfig, "activation_checkpointing") else "gradient"
    )  # before transformers 5.24
    checkpointing: dict[str, Any] = {f"{form}_checkpointing": settings.checkpointing}
    made = GRPOConfig(
        output_dir=str(folder),
        seed=settings.seed,
        max_steps=settings.steps,
        per_device_train_batch_size=settings.rollouts_per_backward,
        gradient_accumulation_steps=rollouts // at_once,
        num_generations=settings.group,
        max_completion_length=settings.max_new_tokens,
        temperature=settings.temperature,
        beta=settings.beta,
        loss_type="dr_grpo",
        scale_rewards="none",
        learning_rate=settings.lr,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,  # the optimiser clips, behind its gate
        logging_steps=1,
        shuffle_dataset=False,  # it has its order already
        save_strategy="steps",
        save_steps=settings.save_every,
        save_total_limit=2,
        report_to=list(trackers) or "none",
        disable_tqdm=True,
        bf16=False,  # the model computes in its own dtype, and δS is float32
        **checkpointing | {f"{form}_checkpointing_kwargs": {"use_reentrant": False}},
        dataloader_pin_memory=on_gpu,
        use_cpu=not on_gpu,
        ddp_find_unused_parameters=False,  # δS of every module takes part in every pass
    )
    if (made.device.type, made.device.index or 0) != (model.device.type, model.device.index or 0):
        raise UsageError(
            f"a model on {model.device}",
            wanted=f"{made.device}, where TRL trains",
            do="set CUDA_VISIBLE_DEVICES",
        )
    if (
        not on_gpu
    ):  # in several processes accelerate says cpu:0, to which torch cannot load a checkpoint
        vars(made)["_setup_devices"] = model.device
    made._n_gpu = 1  # this run does not use other visible devices
    return made


def last_checkpoint(folder: Path) -> tuple[Path | None, int]:
    """Return the latest whole checkpoint in a directory and its number of steps; None and 0 without
    one.
    """
    found: dict[int, Path] = {}
    for path in folder.glob(f"checkpoint-*/{COMPLETE}"):
        step = path.parent.name.rpartition("-")[2]
        if step.isdecimal():
            found[int(step)] = path.parent
    last = max(found, default=0)
    return found.get(last), last
