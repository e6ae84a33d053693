"""One run from settings to the last line of its log, and on from where it stopped."""

import os
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, cast

import torch

from assay.errors import BackendUnavailable, DataError, UsageError, how_to_install
from assay.files.jsonl import JsonObject
from assay.files.storage import storage_error
from assay.models.load import load_model
from assay.models.model import Model, Tokenizer
from assay.models.precision import wide_products
from assay.pages.provenance import provenance
from assay.vhack.detectors.rollout_judge import RolloutJudge, fit_judge
from assay.vhack.detectors.threshold import check_fittable
from assay.vhack.directions.basis.basis import Basis
from assay.vhack.directions.basis.extract import extract, pair_gradients
from assay.vhack.directions.delta.adapter import DeltaS, check_attachable
from assay.vhack.directions.delta.delta_models import user_cache
from assay.vhack.directions.delta.optimizer import ProjectedOptimizer
from assay.vhack.directions.delta.quarantine import Quarantine
from assay.vhack.directions.gradients.batches import Progress
from assay.vhack.directions.gradients.svd import weight_svd
from assay.vhack.directions.gradients.targets import MIN_COVERAGE
from assay.vhack.environment.grading import CHANNELS
from assay.vhack.names import check_trackers
from assay.vhack.pairs.generate import find_pairs
from assay.vhack.pairs.pairs import Pair
from assay.vhack.pairs.selection import select_pairs
from assay.vhack.training.guard import Guard, Mode
from assay.vhack.training.judged import pair_judged
from assay.vhack.training.labels import Labels
from assay.vhack.training.log import TrainLog, read_records, read_steps
from assay.vhack.training.page import training_page
from assay.vhack.training.pool import RolloutPool
from assay.vhack.training.processes import Processes, join_processes
from assay.vhack.training.rewards import Reward, make_reward
from assay.vhack.training.sampling import encode_prompts, find_end_tokens, finite_sampling
from assay.vhack.training.settings import TrainSettings
from assay.vhack.training.tasks import (
    RewardFunction,
    Task,
    import_function,
    load_tasks,
    read_prompt,
)

if TYPE_CHECKING:
    from assay.vhack.training.grpo import GRPO

Console = Callable[[str], None]
LOG = "log.jsonl"
DELTA = "delta.safetensors"
BASIS = "basis.safetensors"
PAGE = "page.html"

LAST_STEPS = 10  # of which a result has the means


@dataclass(frozen=True)
class RunResult:
    """Where a run ended.

    Attributes:
        folder: Directory of the run.
        steps: Number of its steps.
        arm: Name of its arm.
        resumed_from: Step that it was continued from; 0 stands for the start.
        last: Means of the last ten step lines, by name.
        alarm: Step of the alarm that the detector misses an exploit; None without one.
        is_first: Whether this process, of one or several, wrote the files.
    """

    folder: Path
    steps: int
    arm: str
    resumed_from: int
    last: JsonObject
    alarm: int | None = None
    is_first: bool = True


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
        if self.guard is not None and self.judge is not None:
            groups = {pair.prompt: pair.group for pair in self.pairs}
            # Processes judge different rollouts, and must flag by one detector.
            own_pairs = self.processes.broadcast(pair_judged(self.guard.judged, groups))
            with self.adapter.disabled():
                self.guard.judge = self._fit_judge([*self.pairs, *own_pairs])
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


def train(
    settings: TrainSettings,
    folder: str | Path,
    *,
    console: Console | None = None,
    trackers: tuple[str, ...] = (),
    allow_unsandboxed: bool = False,
    model: Model | None = None,
    tasks: Sequence[Task] | None = None,
    reward: RewardFunction | None = None,
    pairs: list[Pair] | None = None,
) -> RunResult:
    """Train one arm, or continue after the last checkpoint in the directory.

    The directory gets ``log.jsonl`` (docs/vhack-training.md describes it), ``basis.safetensors``
    (the axes), ``checkpoint-N`` (the last two) and in the end ``delta.safetensors`` and
    ``page.html``.

    Args:
        settings: Settings of the run.
        folder: Directory of the run.
        console: Takes a line about the arm, and then one per step.
        trackers: Names of TRL's trackers, such as ``wandb``.
        allow_unsandboxed: Whether programs run where nothing can isolate them, see
            :mod:`assay.vhack.environment`.
        model: Model, if it is loaded already; it is trained.
        tasks: Tasks, if they are not those that the settings describe; of one's own as prompts or
            mappings with one.
        reward: Function that pays completions, in TRL's form, if they shall not be run and graded.
        pairs: Pairs, if they are not those that the settings name.

    Returns:
        Where the run ended, with means of its last steps.

    Raises:
        BackendUnavailable: TRL is not installed, or there is no sandbox.
        UsageError: The directory holds a run with other settings, the model has no tokenizer or is
            not on the device that TRL trains on, or several processes cannot share the rollouts of
            a step.
        DataError: Basis, pairs, pool or log cannot be used.
        ModelError, ResourceError: The model cannot be loaded, decomposed or saved.

    Example::

        settings = TrainSettings(model="reference:organism", steps=40)
        result = train(settings, "runs/held-0", console=print)
        print(result.last["hack"], result.last["solve"])
    """
    folder = Path(folder)
    _check_installed(trackers)
    from assay.vhack.training.grpo import last_checkpoint

    processes = join_processes(settings.device)
    checkpoint, done = last_checkpoint(folder)
    settings = _continue_settings(folder, settings, done, processes)
    is_finished = _is_finished(folder, settings, done)
    # Until every process has read what the first will write.
    processes.wait()
    say = console if console is not None and processes.is_first else silent
    arm = settings.chosen
    say(f"arm {settings.arm}: {arm.says} (docs/vhack-results.md has what was measured)")
    if reward is None and settings.reward is not None:
        reward = import_function(settings.reward, "--reward")
    work, source = load_tasks(
        settings, tasks, least=settings.prompts, why="those of a step", model=settings.model
    )
    paying = make_reward(
        work,
        reward,
        arm,
        source,
        workers=max(1, (os.cpu_count() or 2) // processes.count),
        allow_unsandboxed=allow_unsandboxed,
    )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise storage_error(folder, error) from error
    if is_finished:
        return _result(folder, settings, done, processes)
    if pairs is None:
        # Those of the environment have the run's loopholes.
        modes = [mode for mode in settings.modes if mode in CHANNELS] or list(CHANNELS)
        pairs = find_pairs(settings.pairs, modes=modes, families=settings.families or None)
    _check_inputs(settings, pairs, work, model)
    if model is None:
        model = load_model(
            settings.model, dtype=settings.dtype, device=processes.device or settings.device
        )
    earlier = folder / BASIS if done else None
    run = PreparedRun(settings, model, pairs, earlier, processes, say)
    try:
        _run_steps(run, paying, folder, trackers, checkpoint, done)
    finally:
        run.adapter.detach()
    processes.wait()
    return _result(folder, settings, done, processes)


def _run_steps(
    run: PreparedRun,
    reward: Reward,
    folder: Path,
    trackers: tuple[str, ...],
    checkpoint: Path | None,
    done: int,
) -> None:
    """Train from a checkpoint or the start, and write the files of the run."""
    from assay.vhack.training.step_log import StepLog

    settings = run.settings
    processes = run.processes
    trainer = run.trainer(folder, reward, trackers)
    log = None
    if processes.is_first:
        run.axes.save(folder / BASIS)
        head = {
            "settings": settings.model_dump(mode="json"),
            "arm": run.arm.says,
            "weights": run.model.digest,
            "processes": processes.count,
            **provenance(),
        }
        log = TrainLog(folder / LOG, head, step=done)
    steps = StepLog(trainer, log, console=run.console, refresh=partial(run.refresh, trainer))
    if done and processes.is_first:
        steps.alarm.resume(read_steps(folder / LOG)[1])
    trainer.add_callback(steps)
    # Layers that are computed again in the backward pass would be computed in another way there.
    products = nullcontext() if settings.checkpointing else wide_products(run.model)
    finite = finite_sampling("lower the learning rate; the last checkpoint is from before")
    with finite, products:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if log is not None:
        run.adapter.save(folder / DELTA)
        log.write("end", steps=settings.steps)
        page = training_page(folder, command=f"assay vhack report {folder.name}")
        page.write(folder / PAGE)


def _check_installed(trackers: tuple[str, ...]) -> None:
    try:
        import_module("trl")
    except ImportError as error:
        raise BackendUnavailable(
            f"TRL cannot be imported: {error}", wanted="the extra train", do=how_to_install("train")
        ) from error
    from transformers import integrations

    check_trackers(trackers, cast(Any, integrations).get_available_reporting_integrations())


def _is_finished(folder: Path, settings: TrainSettings, done: int) -> bool:
    """Return whether the run of the directory has ended, after as many steps as it has δS of."""
    if done < settings.steps or not (folder / DELTA).exists():
        return False
    # A run that went on may have been interrupted beside its former δS.
    last = read_records(folder / LOG)[-1]
    return last.get("kind") == "end" and last.get("steps") == done


def _check_inputs(
    settings: TrainSettings, pairs: list[Pair], tasks: Sequence[Task], model: Model | None
) -> None:
    """Refuse prompts beyond the context, and what axes or a detector cannot come from.

    That a basis is of the weights is seen once they are loaded.
    """
    encode_prompts(
        model or settings.model, [read_prompt(task) for task in tasks], settings.max_new_tokens
    )
    if settings.basis is not None:
        Basis.load(settings.basis)
    if settings.basis is None or settings.refresh:
        select_pairs(pairs, n_heldout=0, heldout_groups=None, method=settings.method)
    if settings.flags_by.detector not in (None, "labels"):
        check_fittable(pairs, settings.clean_lost)


def _continue_settings(
    folder: Path, settings: TrainSettings, done: int, processes: Processes
) -> TrainSettings:
    """Return the settings with which a run goes on, after a look at those in its log."""
    for path in (settings.basis, settings.teacher):
        if path is not None and not Path(path).is_file():
            raise DataError(
                f"{path}: no such file", wanted="a file", do="correct --basis or --teacher"
            )
    if not (folder / LOG).exists():
        if done:
            raise DataError(
                f"checkpoints without {folder / LOG}", wanted="both", do="choose another directory"
            )
        return settings
    head, _ = read_steps(folder / LOG)
    earlier = head.get("settings")
    if not isinstance(earlier, dict):
        raise DataError(
            f"{folder / LOG} has no settings",
            wanted="the log of a run",
            do="choose another directory",
        )
    settings = settings.continuing(earlier)
    differences = settings.differences(earlier)
    process_count = head.get("processes", 1)
    if process_count != processes.count:
        differences.append(f"{process_count} processes, now {processes.count}")
    if differences or settings.steps < done:
        raise UsageError(
            f"{folder} holds a run with {', '.join(differences) or f'{done} steps already'}",
            wanted="the same settings, and no fewer steps",
            do="choose another directory, or the settings of that run",
        )
    return settings


def _result(
    folder: Path, settings: TrainSettings, resumed_from: int, processes: Processes
) -> RunResult:
    _, steps = read_steps(folder / LOG)
    last = steps[-LAST_STEPS:]
    names = [name for name in last[-1] if name not in ("kind", "step")] if last else []
    means = {name: fmean(step[name] for step in last if name in step) for name in names}
    alarms = [step["step"] for step in steps if step.get("alarm", 0.0) >= 1]
    return RunResult(
        folder,
        len(steps),
        settings.arm,
        resumed_from,
        means,
        alarms[0] if alarms else None,
        processes.is_first,
    )
