"""TRL's GRPOTrainer with the few things that it lacks; importing this imports TRL.

- Stored log-probabilities of teacher tokens enter the loss. Without vLLM, TRL assumes that the
  policy itself has sampled, so every importance weight is 1. Here ``old_per_token_logps`` are the
  stored ones where a token has one (:meth:`GRPO._get_per_token_logps_and_entropies`), and the
  weights are clipped as in GRPO.
- Rollouts of a group come from the pool and from the policy (:meth:`GRPO.rollout`, TRL's
  ``rollout_func``).
- Prompts have no token that would end a text, and completions keep their first space.
- The policy samples from its whole distribution, whatever its checkpoint asks of a sampler.
- A checkpoint has δS and not the model.
- The reference policy is the adapted model with δS switched off, and not a second one.

Shapes: B rollouts, T completion tokens.
"""

import json
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from trl.trainer.grpo_config import GRPOConfig
from trl.trainer.grpo_trainer import GRPOTrainer
from typing_extensions import override

from assay.errors import UsageError
from assay.files.storage import write_atomic
from assay.models.load import plain_generation
from assay.models.model import Model, Tokenizer
from assay.models.spelling import encode_prompt, recover_spaces
from assay.vhack.directions.basis.basis import Basis
from assay.vhack.directions.delta.adapter import DeltaS
from assay.vhack.directions.delta.groups import Rollouts
from assay.vhack.directions.delta.optimizer import ProjectedOptimizer
from assay.vhack.training.outcomes import Outcomes
from assay.vhack.training.pool import PoolRollout, RolloutPool
from assay.vhack.training.processes import Processes
from assay.vhack.training.rewards import Reward
from assay.vhack.training.settings import TrainSettings
from assay.vhack.training.trl_internals import sync_merged

COMPLETE = "complete.json"
"""File that is written last in a checkpoint: one without it was interrupted."""

# TRL's name for log-probabilities of the sampler.
STORED_LOGPS = "sampling_per_token_logps"
DELTA_FILE = "delta.safetensors"
AXES_FILE = "axes.safetensors"
OWN_DTYPE = "the model computes in its own dtype, and δS in float32"
REQUIRED = (
    ("max_grad_norm", 0.0, "TRL clips before the gate; ProjectedOptimizer has max_norm"),
    ("shuffle_dataset", False, "the prompts have an order that a run can go on with"),
    ("bf16", False, OWN_DTYPE),
    ("fp16", False, OWN_DTYPE),
)
"""Settings of TRL, their values, and why a run with others would not be what its log says."""


class BackwardPass(NamedTuple):
    """What a backward pass was made of."""

    outcomes: Outcomes
    loss: Tensor
    teacher_weights: Tensor
    """[3] of the teacher's tokens: sum of importance weights, number clipped, number."""


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
        axes: Axes of the arm; kept in checkpoints.
        processes: Processes of the run, each of which has this trainer.
        others: Further arguments of TRL's trainer.

    Raises:
        UsageError: The settings of TRL would clip before the gate, shuffle the prompts, or compute
            in another dtype.

    Attributes:
        passes: Backward passes since the last step.
        gradients: Takes the gradient of each kind of rollouts, where a callback has set it.
        shift: What to add to the advantages of the next rollouts, [B] of all processes; None adds
            nothing.
    """

    def __init__(
        self,
        adapter: DeltaS,
        optimizer: ProjectedOptimizer,
        reward: Reward,
        args: GRPOConfig,
        *,
        prompts: int,
        processing_class: Tokenizer,
        pool: RolloutPool | None = None,
        teachers: int = 0,
        axes: Basis | None = None,
        processes: Processes = Processes(),
        **others: Any,
    ) -> None:
        _check(args, processes)
        self.processes = processes
        self.adapter = adapter
        self.projected = optimizer
        self.reward = reward
        self.pool = pool
        self.teachers = teachers
        self.axes = axes
        self.passes: list[BackwardPass] = []
        self.gradients: Rollouts | None = None
        self.shift: Tensor | None = None
        self._teacher_weights = torch.zeros(3)
        # Of the loss that is computed, until its logps.
        self._inputs: dict[str, Any] | None = None
        beta = args.beta
        # TRL would load a second model for the reference.
        args.beta = 0.0
        # vLLM's log-probabilities are the old ones here; TRL would weigh by them a second time.
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
        """Return completions of the pool for the first places of each group, then of the policy.

        Log-probabilities are the stored ones, and None where the policy itself has sampled. TRL
        passes the trainer too.
        """
        prompt_ids, _, _ = self._tokenize_prompts(prompts)
        stored = self._stored_rollouts(prompts) if self.adapter.model.training else []
        teachers = stored or [None] * len(prompts)
        student_ids = [
            ids for ids, teacher in zip(prompt_ids, teachers, strict=True) if teacher is None
        ]
        sampled: list[list[int]] = []
        logprobs: Any = None
        if student_ids:
            sampled, logprobs = self._generate_single_turn(student_ids, None, {}, 1)
        if logprobs is None:
            logprobs = [[None] * len(ids) for ids in sampled]
        students = zip(sampled, logprobs, strict=True)
        rows: list[tuple[list[int], list[Any]]] = [
            next(students) if teacher is None else (list(teacher.tokens), list(teacher.logprobs))
            for teacher in teachers
        ]
        return {
            "prompt_ids": prompt_ids,
            "completion_ids": [tokens for tokens, _ in rows],
            "logprobs": [values for _, values in rows],
            "teacher": [teacher is not None for teacher in teachers],
        }

    def _tokenize_prompts(self, prompts: list[str]) -> tuple[list[list[int]], None, dict[str, Any]]:
        tokenizer: Any = self.processing_class
        return [encode_prompt(tokenizer, prompt) for prompt in prompts], None, {}

    def _generate_single_turn(self, *arguments: Any, **options: Any) -> Any:
        # What TRL leaves unset, such as min_p, would be the checkpoint's own: log-probabilities of
        # the loss are those of the whole distribution.
        with plain_generation(self.adapter.model):
            return super()._generate_single_turn(*arguments, **options)  # type: ignore[no-untyped-call]

    def _generate(self, prompts: list[str]) -> tuple[Any, ...]:
        prompt_ids, completion_ids, mask, texts, *others = super()._generate(prompts)
        tokenizer: Any = self.processing_class
        # TRL decodes them alone, which takes a space of indentation from Llama 2's.
        spelled = [
            recover_spaces(tokenizer, prompt, text, ids)
            for prompt, text, ids in zip(prompt_ids, texts, completion_ids, strict=True)
        ]
        return (prompt_ids, completion_ids, mask, spelled, *others)

    def _stored_rollouts(self, prompts: list[str]) -> list[PoolRollout | None]:
        """Return the teacher's rollout for each place, None where the policy samples."""
        assert self.pool is not None
        assert self.num_generations is not None
        # Processes take neighbouring parts of the prompts.
        start = self.processes.index * len(prompts)
        key = f"{self.args.seed} {self.state.global_step}"
        chosen = [self.pool.choose(prompt, self.teachers, key) for prompt in prompts]
        places = [index % self.num_generations for index in range(start, start + len(prompts))]
        return [
            rollouts[place] if place < len(rollouts) else None
            for rollouts, place in zip(chosen, places, strict=True)
        ]

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        batch: dict[str, Any] = super()._generate_and_score_completions(inputs)
        outcomes = self.reward.last
        advantages_B = batch["advantages"]
        if self.shift is not None:
            start = self.processes.index * len(advantages_B)
            batch["advantages"] = advantages_B + self.shift[start : start + len(advantages_B)]
            self.shift = None
        device = advantages_B.device
        return {**batch, "outcomes": outcomes.flags.to(device), "paid": outcomes.paid.to(device)}

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        # What is stored for later passes stays as it was generated.
        inputs = dict(inputs)
        self._teacher_weights = torch.zeros(3)
        self._inputs = inputs if STORED_LOGPS in inputs else None
        outcomes = Outcomes(inputs["outcomes"].cpu(), inputs["paid"].cpu())
        if self.gradients is not None:
            kinds = torch.stack(list(outcomes.kinds().values()))
            self.gradients.kinds = kinds.float().to(inputs["outcomes"].device)
        loss: Tensor = super()._compute_loss(model, inputs)  # type: ignore[no-untyped-call]
        if self.adapter.model.training:
            self.passes.append(BackwardPass(outcomes, loss.detach(), self._teacher_weights))
        return loss

    def _get_per_token_logps_and_entropies(self, *arguments: Any, **keywords: Any) -> Any:
        logps_BT, *others = super()._get_per_token_logps_and_entropies(*arguments, **keywords)
        # TRL calls this once more for the reference policy, whose log-probabilities stay.
        if self._inputs is not None:
            inputs = self._inputs
            self._inputs = None
            stored_BT = inputs[STORED_LOGPS].to(logps_BT)
            sampled_BT = inputs.get("old_per_token_logps")
            if sampled_BT is None:
                sampled_BT = logps_BT.detach()
            is_stored_BT = ~stored_BT.isnan()
            inputs["old_per_token_logps"] = torch.where(is_stored_BT, stored_BT, sampled_BT)
            # After the end of a completion TRL has put zeros, which are not log-probabilities.
            is_completion_BT = inputs["completion_mask"].bool()
            is_teacher_BT = is_stored_BT & is_completion_BT & inputs["outcomes"][:, :1]
            weights = (logps_BT.detach() - stored_BT)[is_teacher_BT].exp()
            is_clipped = (weights < 1 - self.epsilon_low) | (weights > 1 + self.epsilon_high)
            count = weights.new_tensor(weights.numel())
            self._teacher_weights = torch.stack([weights.sum(), is_clipped.sum(), count])
        return logps_BT, *others

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        folder = Path(output_dir or str(self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        self.adapter.save(folder / DELTA_FILE)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)  # type: ignore[no-untyped-call]
        # Each writes the state of its random numbers.
        self.processes.wait()
        if not self.processes.is_first:
            return
        folder = Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}"
        if self.axes is not None:
            self.axes.save(folder / AXES_FILE)
        write_atomic(folder / COMPLETE, json.dumps({"step": self.state.global_step}) + "\n")

    @override
    def create_model_card(self, *arguments: Any, **keywords: Any) -> None:
        """Write none: a checkpoint holds only δS."""

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        folder = Path(resume_from_checkpoint)
        self.adapter.load(folder / DELTA_FILE)
        self.use_axes(Basis.load(folder / AXES_FILE) if (folder / AXES_FILE).exists() else None)

    def use_axes(self, axes: Basis | None) -> None:
        """Continue with other axes."""
        self.axes = axes
        self.projected.use_basis(axes)


def _check(args: GRPOConfig, processes: Processes) -> None:
    """Refuse settings of TRL under which a run would not be what its log says."""
    if args.world_size != processes.count:
        raise UsageError(
            f"a trainer of {processes.count} process in {args.world_size}",
            wanted="one process",
            do="start several with assay vhack train, which takes tasks and a reward of one's own",
        )
    for name, value, reason in REQUIRED:
        chosen = getattr(args, name)
        if (chosen or False) != value:
            raise UsageError(
                f"GRPOConfig({name}={chosen})", wanted=f"{name}={value}: {reason}", do="set it"
            )


def trl_arguments(
    settings: TrainSettings,
    model: Model,
    folder: Path,
    trackers: tuple[str, ...],
    processes: Processes = Processes(),
) -> GRPOConfig:
    """Return the settings in the form that TRL takes.

    Raises:
        UsageError: The model is not on the device that TRL trains on, or a step cannot be shared by
            the processes.
    """
    rollouts = settings.prompts * settings.group
    at_once = settings.rollouts_per_backward * processes.count
    if rollouts % at_once:
        raise UsageError(
            f"{rollouts} rollouts a step, {settings.rollouts_per_backward} a backward pass, "
            f"{processes.count} processes",
            wanted="as many backward passes in every process",
            do=f"choose --prompts, --group and --micro-batch so that {at_once} divides the "
            f"rollouts",
        )
    on_gpu = model.device.type == "cuda"
    config = GRPOConfig(
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
        max_grad_norm=0.0,  # the optimizer clips, behind its gate
        logging_steps=1,
        shuffle_dataset=False,  # the prompts have their order already
        save_strategy="steps",
        save_steps=settings.save_every,
        save_total_limit=2,
        report_to=list(trackers) or "none",
        disable_tqdm=True,
        bf16=False,  # the model computes in its own dtype, and δS is float32
        dataloader_pin_memory=on_gpu,
        use_cpu=not on_gpu,
        ddp_find_unused_parameters=False,  # δS of every module takes part in every pass
        **_checkpointing(settings.checkpointing),
    )
    trained_on = (config.device.type, config.device.index or 0)
    if trained_on != (model.device.type, model.device.index or 0):
        raise UsageError(
            f"a model on {model.device}",
            wanted=f"{config.device}, where TRL trains",
            do="set CUDA_VISIBLE_DEVICES",
        )
    if not on_gpu:
        # In several processes accelerate says cpu:0, to which torch loads no checkpoint.
        vars(config)["_setup_devices"] = model.device
    # This run does not use other visible devices.
    config._n_gpu = 1
    return config


def _checkpointing(is_on: bool) -> dict[str, Any]:
    """Return TRL's settings of gradient checkpointing."""
    # transformers 5.24 renamed them.
    has_new_name = hasattr(GRPOConfig, "activation_checkpointing")
    name = "activation_checkpointing" if has_new_name else "gradient_checkpointing"
    return {name: is_on, f"{name}_kwargs": {"use_reentrant": False}}


def last_checkpoint(folder: Path) -> tuple[Path | None, int]:
    """Return the latest whole checkpoint and its number of steps; None and 0 without one."""
    folders = {
        path.parent.name.removeprefix("checkpoint-"): path.parent
        for path in folder.glob(f"checkpoint-*/{COMPLETE}")
    }
    checkpoints = {int(step): path for step, path in folders.items() if step.isdecimal()}
    last = max(checkpoints, default=0)
    return checkpoints.get(last), last
