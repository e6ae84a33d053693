"""Objects made once before a run: pool, detector, axes, adapter, optimizer, trainer."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch

from assay.errors import DataError
from assay.models.model import Model, Tokenizer
from assay.vhack.detectors.rollout_judge import RolloutJudge, fit_judge
from assay.vhack.directions.basis.basis import Basis
from assay.vhack.directions.basis.extract import extract, pair_gradients
from assay.vhack.directions.delta.adapter import DeltaS, check_attachable
from assay.vhack.directions.delta.delta_models import user_cache
from assay.vhack.directions.delta.optimizer import ProjectedOptimizer
from assay.vhack.directions.delta.quarantine import Quarantine
from assay.vhack.directions.gradients.batches import Progress
from assay.vhack.directions.gradients.svd import weight_svd
from assay.vhack.directions.gradients.targets import MIN_COVERAGE
from assay.vhack.pairs.pairs import Pair
from assay.vhack.training.guard import Guard, Mode
from assay.vhack.training.judged import pair_judged
from assay.vhack.training.labels import Labels, break_even
from assay.vhack.training.pool import RolloutPool
from assay.vhack.training.processes import Processes
from assay.vhack.training.rewards import Reward
from assay.vhack.training.sampling import find_end_tokens
from assay.vhack.training.settings import TrainSettings

if TYPE_CHECKING:
    from assay.vhack.training.grpo import GRPO

Console = Callable[[str], None]


def silent(line: str) -> None:
    """Write a line nowhere."""


class PreparedRun:
    """What is made once for a run, before any step.

    Axes in the basis file of an ``earlier`` part of the run are not extracted again.

    Raises:
        UsageError: The model has no tokenizer, or its tokenizer has no token that ends a text.
        ModelError: The model can have no δS.
        DataError: The teacher's pool cannot be used.
    """

    def __init__(
        self,
        settings: TrainSettings,
        model: Model,
        pairs: list[Pair],
        earlier: Path | None = None,
        processes: Processes = Processes(),
        console: Console = silent,
    ) -> None:
        find_end_tokens(model)
        check_attachable(model)
        self.settings = settings
        self.model = model
        self.pairs = pairs
        self.earlier = earlier
        self.processes = processes
        self.console = console
        self.arm = settings.chosen
        self.guard: Guard | None = None
        self.pool = (
            RolloutPool.load(
                settings.teacher, model.tokenizer, max_new_tokens=settings.max_new_tokens
            )
            if settings.teacher
            else None
        )
        self.svd = weight_svd(
            model,
            cache=user_cache(model),
            min_coverage=0.0 if settings.allow_partial else MIN_COVERAGE,
            progress=tenths(console, "matrices decomposed"),
        )
        processes.broadcast_factors(self.svd)
        self.judge = self._fit_judge(pairs)
        console(f"gradients of {len(pairs)} pairs for the axes")
        self.axes = processes.broadcast(self._extract_axes(may_load=True))
        self.adapter = DeltaS(model, self.svd)
        self.optimizer = self._make_optimizer()

    def trainer(self, folder: Path, reward: Reward, trackers: tuple[str, ...]) -> "GRPO":
        """Return the trainer of :func:`assay.vhack.training.train`, guarded by the detector."""
        from transformers import PrinterCallback

        from assay.vhack.training.grpo import GRPO, trl_arguments

        settings = self.settings
        if self.pool is not None and not self.pool.prompts & set(reward.prompts):
            raise DataError(
                f"{settings.teacher}: no completion of any of the {len(reward.prompts)} tasks",
                wanted="completions of the prompts of this run",
                do="sample the pool from the prompts of the same tasks, modes and seed",
            )
        trainer = GRPO(
            self.adapter,
            self.optimizer,
            reward,
            trl_arguments(settings, self.model, folder, trackers, self.processes),
            prompts=settings.steps * settings.prompts,
            processing_class=cast("Tokenizer", self.model.tokenizer),
            pool=self.pool,
            teachers=settings.teachers,
            axes=self.axes,
            processes=self.processes,
        )
        # It prints to stdout, which is for results.
        trainer.remove_callback(PrinterCallback)
        self.arm.attach(trainer, self.model, self.pairs)
        source = settings.flags_by
        if source.detector is not None:
            guard = Guard(
                self.judge,
                cast(Mode, self.arm.flagged or "watch"),
                penalty=self.arm.penalty,
                at_random=source.at_random,
                labels=Labels(source.mechanisms, source.recall, settings.false_alarms),
            )
            self.guard = guard.attach(trainer)
        return trainer

    def refresh(self, trainer: "GRPO", step: int) -> float | None:
        """Renew axes and detector if it is time, and return how much of the old axes stayed.

        Axes are those of the policy of now. The detector still looks through the model before
        training, in which an exploit has not become likely yet, and learns from the run's own
        rollouts beside the pairs.
        """
        if not self.settings.refresh or step % self.settings.refresh:
            return None
        guard = self.guard
        if guard is not None and self.judge is not None:
            groups = {pair.prompt: pair.group for pair in self.pairs}
            # Processes judge different rollouts, and must flag by one detector.
            own_pairs = self.processes.broadcast(pair_judged(guard.judged, groups))
            with self.adapter.disabled():
                judge = self._fit_judge([*self.pairs, *own_pairs])
            guard.judge = judge
            if judge is not None and guard.mode == "penalty" and self.arm.penalty is None:
                guard.penalty = break_even(judge.threshold)
                trainer.reward_weights[-1] = -guard.penalty
        before = trainer.axes
        axes = self.processes.broadcast(self._extract_axes(may_load=False))
        trainer.use_axes(axes)
        return measure_overlap(before, axes) if before is not None else None

    def _fit_judge(self, pairs: list[Pair]) -> RolloutJudge | None:
        """Return the detector of the arm, fitted, and say what it loses and catches."""
        detector = self.settings.flags_by.detector
        if detector in (None, "labels"):
            return None
        judge = fit_judge(
            pairs,
            self.model,
            detector=detector,
            promised=self.settings.clean_lost,
            svd=self.svd,
            progress=tenths(self.console, f"gradients for {detector}"),
        )
        limit = judge.threshold
        self.console(
            f"detector {detector}: flags {limit.caught:.3f} of the hack sides held out, and "
            f"{limit.lost:.3f} ({limit.low:.3f} to {limit.high:.3f}) of the clean sides; at most "
            f"{limit.promised:.3f} of a new group, on average"
        )
        return judge

    def _extract_axes(self, *, may_load: bool) -> Basis:
        """Return the axes of the arm: control axes, those of a file, or those of the pairs."""
        settings = self.settings
        top_k = settings.k_use
        if self.arm.basis != "true":
            gradients = pair_gradients(self.pairs, self.model, svd=self.svd)
            controls: Basis = self.arm.make_basis(
                gradients, seed=settings.seed, top_k=top_k, method=settings.method
            )
            return controls.slice(top_k)
        if may_load and settings.basis:
            return Basis.load(settings.basis, self.model).slice(top_k)
        return extract(
            self.pairs,
            self.model,
            path=self.earlier if may_load else None,
            n_heldout=0,
            svd=self.svd,
            top_k=top_k,
            method=settings.method,
        )

    def _make_optimizer(self) -> ProjectedOptimizer:
        """Return the optimizer of the settings inside the gates of the arm."""
        settings = self.settings
        makers: dict[str, Callable[..., torch.optim.Optimizer]] = {
            "adamw": partial(torch.optim.AdamW, betas=(0.9, 0.99), weight_decay=0.0),
            "sgd": partial(torch.optim.SGD, momentum=0.9),
        }
        make = partial(makers[settings.optimizer], lr=settings.lr)
        max_norm = settings.max_norm or None
        has_second = self.arm.flagged in ("quarantine", "absorb")
        return ProjectedOptimizer(
            make(self.adapter.delta),
            self.adapter,
            self.axes,
            arm=self.arm,
            max_norm=max_norm,
            quarantine=Quarantine(self.adapter, make, max_norm) if has_second else None,
        )


def tenths(console: Console, stage: str) -> Progress:
    """Return a progress that writes every tenth part of a stage in a line."""
    written: set[int] = set()

    def progress(done: int, total: int) -> None:
        tenth = 10 * done // total
        if tenth not in written:
            written.add(tenth)
            console(f"{stage}: {done} of {total}")

    return progress


def measure_overlap(before: Basis, after: Basis) -> float:
    """Return the mean squared cosine of the principal angles, over modules that both bases have."""
    shares = []
    for name, axes_KR in before.axes.items():
        other_KR = after.axes.get(name)
        if other_KR is None or not axes_KR.any() or not other_KR.any():
            continue
        rank = min(int(axes_KR.any(dim=1).sum()), int(other_KR.any(dim=1).sum()))
        cosines_KK = axes_KR.double() @ other_KR.double().T
        shares.append(float(cosines_KK.square().sum()) / rank)
    # Rounded, because the sums depend on where in memory the axes are.
    return round(sum(shares) / len(shares), 9) if shares else 0.0
