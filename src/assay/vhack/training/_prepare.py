"""From settings to a trainer that is ready: axes, adapter, optimiser, tasks, pool."""

import os
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from assay.errors import DataError, UsageError
from assay.models import Model
from assay.vhack.basis import Basis, extract, pair_gradients
from assay.vhack.delta import Arm, DeltaS, ProjectedOptimizer, Shortcut, basis_of_kind
from assay.vhack.environment import Episode
from assay.vhack.gradients import MIN_COVERAGE, SVDCache, weight_svd
from assay.vhack.pairs import Pair
from assay.vhack.training._pool import RolloutPool
from assay.vhack.training._rewards import EpisodeReward
from assay.vhack.training._settings import TrainSettings

if TYPE_CHECKING:
    from trl.trainer.grpo_config import GRPOConfig

    from assay.vhack.training._grpo import GRPO


class Prepared:
    """What is made once for a run, before any step.

    Args:
        settings: Settings of the run.
        model: Model that gets an adapter.
        pairs: Pairs that axes come from.
        earlier: Basis file of the run that is continued: where it is there, its axes are not extracted again.

    Attributes:
        arm: Arm that the settings name.
        adapter: Adapter of the model.
        axes: Axes that the arm acts on.
        watched: True axes, where these are others.

    Raises:
        UsageError: The model has no tokenizer.
    """

    def __init__(self, settings: TrainSettings, model: Model, pairs: list[Pair], earlier: Path | None = None) -> None:
        if model.tokenizer is None:
            raise UsageError(f"{settings.model} has no tokenizer", wanted="a model with one", do="choose another")
        self.settings, self.model, self.pairs, self.earlier = settings, model, pairs, earlier
        self.arm: Arm = settings.chosen
        self.shortcut = Shortcut.fit(model, model.tokenizer, pairs) if self.arm.advantage else None
        self.svd: SVDCache = weight_svd(model, min_coverage=0.0 if settings.allow_partial else MIN_COVERAGE)
        self.axes, self.watched = self._extracted(load=True)
        self.adapter = DeltaS(model, self.svd)
        self.optimizer = ProjectedOptimizer(
            _inner(settings, self.adapter),
            self.adapter,
            self.axes,
            arm=self.arm,  # a start of its own is in the δS of every checkpoint
            watched=self.watched,
            max_norm=settings.max_norm or None,
        )

    def trainer(
        self, folder: Path, tasks: list[Episode] | None, trackers: tuple[str, ...], allow_unsandboxed: bool
    ) -> "GRPO":
        """Return the trainer of :func:`assay.vhack.training.train`, from which the arguments come."""
        from transformers import PrinterCallback

        from assay.vhack.training._grpo import GRPO

        settings, tokenizer = self.settings, self.model.tokenizer
        assert tokenizer is not None
        chosen = tasks if tasks is not None else settings.episodes(settings.tasks)
        pool = None
        if settings.teacher:
            pool = RolloutPool.load(settings.teacher, tokenizer, max_new_tokens=settings.max_new_tokens)
            if not pool.prompts & {one.prompt for one in chosen}:
                raise DataError(
                    f"{settings.teacher}: no completion of any of the {len(chosen)} tasks",
                    wanted="completions of the prompts of this run",
                    do="sample the pool from the prompts of the same tasks, modes and seed",
                )
        trainer = GRPO(
            self.adapter,
            self.optimizer,
            EpisodeReward(chosen, self.arm, workers=os.cpu_count() or 2, allow_unsandboxed=allow_unsandboxed),
            trl_arguments(settings, self.model, folder, trackers),
            prompts=settings.steps * settings.prompts,
            processing_class=tokenizer,
            pool=pool,
            teachers=settings.teachers,
            shortcut=self.shortcut,
            axes=(self.axes, self.watched),
        )
        trainer.remove_callback(PrinterCallback)  # it prints to stdout, which is for results
        return trainer

    def refresh(self, trainer: "GRPO", step: int) -> float | None:
        """Renew the axes if it is time after so many steps, and return how much of the true ones stayed."""
        if not self.settings.refresh or step % self.settings.refresh:
            return None
        before = trainer.axes[1] or trainer.axes[0]
        axes, watched = self._extracted(load=False)
        trainer.use_axes(axes, watched)
        return _overlap(before, watched or axes) if before is not None else None

    def _extracted(self, *, load: bool) -> tuple[Basis, Basis | None]:
        """Return the axes of the arm, and the true ones where these are others."""
        settings, kind = self.settings, self.arm.basis
        given = Basis.load(settings.basis, self.model).slice(settings.k_use) if load and settings.basis else None
        if kind == "true":
            true = given or extract(
                self.pairs,
                self.model,
                path=self.earlier if load else None,
                n_heldout=0,
                top_k=settings.k_use,
                method=settings.method,
                svd=self.svd,
            )
            return true, None
        gradients = pair_gradients(self.pairs, self.model, svd=self.svd)

        def made(kind: str) -> Basis:
            found = basis_of_kind(kind, gradients, top_k=settings.k_use, method=settings.method, seed=settings.seed)
            return found.slice(settings.k_use)

        return made(kind), given or made("true")


def _inner(settings: TrainSettings, adapter: DeltaS) -> torch.optim.Optimizer:
    if settings.optimizer == "sgd":
        return torch.optim.SGD(adapter.delta, lr=settings.lr, momentum=0.9)
    return torch.optim.AdamW(adapter.delta, lr=settings.lr, betas=(0.9, 0.99), weight_decay=0.0)


def trl_arguments(settings: TrainSettings, model: Model, folder: Path, trackers: tuple[str, ...]) -> "GRPOConfig":
    """Return the settings in the form that TRL takes.

    Raises:
        UsageError: The model is not on the device that TRL trains on.
    """
    from trl.trainer.grpo_config import GRPOConfig

    rollouts = settings.prompts * settings.group
    on_gpu = model.device.type == "cuda"
    made = GRPOConfig(
        output_dir=str(folder),
        seed=settings.seed,
        max_steps=settings.steps,
        per_device_train_batch_size=settings.rollouts_per_backward,
        gradient_accumulation_steps=rollouts // settings.rollouts_per_backward,
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
        gradient_checkpointing=settings.checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False} if settings.checkpointing else None,
        dataloader_pin_memory=on_gpu,
        use_cpu=not on_gpu,
    )
    if (made.device.type, made.device.index or 0) != (model.device.type, model.device.index or 0):
        raise UsageError(
            f"a model on {model.device}", wanted=f"{made.device}, where TRL trains", do="set CUDA_VISIBLE_DEVICES"
        )
    made._n_gpu = 1  # this run does not use other visible devices
    return made


def _overlap(before: Basis, after: Basis) -> float:
    """Return the mean squared cosine of the principal angles between two bases, over the modules that both have."""
    shares = []
    for name, axes_KR in before.axes.items():
        other_KR = after.axes.get(name)
        if other_KR is not None and axes_KR.any() and other_KR.any():
            rank = min(int(axes_KR.any(dim=1).sum()), int(other_KR.any(dim=1).sum()))
            shares.append(float((axes_KR.double() @ other_KR.double().T).square().sum()) / rank)
    # Rounded, because the sums depend on where in memory the axes are.
    return round(sum(shares) / len(shares), 9) if shares else 0.0
