"""One run from settings to the last line of its log, and on from where it stopped."""

import os
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
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
from assay.models.model import Model
from assay.models.precision import wide_products
from assay.pages.provenance import provenance
from assay.vhack.detect import RolloutJudge, check_pairs, fit_judge
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
from assay.vhack.training.log import TrainLog, read_records, read_steps
from assay.vhack.training.page import training_page
from assay.vhack.training.pool import RolloutPool
from assay.vhack.training.processes import ALONE, Processes, join_processes
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


LOG = "log.jsonl"
DELTA = "delta.safetensors"
BASIS = "basis.safetensors"
PAGE = "page.html"


@dataclass(frozen=True)
class RunResult:
    """Where a run ended."""

    folder: Path  # directory of the run
    steps: int  # number of its steps
    arm: str  # name of its arm
    resumed_from: int  # step that it was continued from; 0 stands for the start
    last: JsonObject  # means of the last ten step lines, by name
    alarm: int | None = (
        None  # step in which the alarm was given that the detector misses an exploit
    )
    is_first: bool = True  # whether this is the process that wrote the files, of one or several


class Prepared:
    """What is made once for a run, before any step: pool, axes, adapter and optimizer.

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
        processes: Processes = ALONE,
        say: Callable[[str], None] | None = None,
    ) -> None:
        find_end_tokens(model)
        check_attachable(model)
        assert model.tokenizer is not None
        self.settings, self.model, self.tokenizer = settings, model, model.tokenizer
        self.pairs = pairs
        self.earlier = earlier
        self.processes = processes
        self.say = say
        self.pool = None
        self.arm = settings.chosen
        if settings.teacher:
            self.pool = RolloutPool.load(
                settings.teacher, self.tokenizer, max_new_tokens=settings.max_new_tokens
            )
        self.shortcut = self.arm.fit_activations(model, self.tokenizer, pairs)
        self.svd = weight_svd(
            model,
            cache=user_cache(model),
            min_coverage=0.0 if settings.allow_partial else MIN_COVERAGE,
            progress=_told(say, "matrices decomposed"),
        )
        processes.broadcast_factors(self.svd)
        self.judge = self._fit_judge(pairs, say)
        if say is not None:
            say(f"gradients of {len(pairs)} pairs for the axes")
        self.axes = processes.broadcast(self._extract_axes(load=True))
        self.adapter = DeltaS(model, self.svd)
        make: Callable[..., torch.optim.Optimizer] = (
            partial(torch.optim.SGD, lr=settings.lr, momentum=0.9)
            if settings.optimizer == "sgd"
            else partial(torch.optim.AdamW, lr=settings.lr, betas=(0.9, 0.99), weight_decay=0.0)
        )
        limit = settings.max_norm or None
        second = Quarantine(self.adapter, make, limit) if self.arm.flagged == "quarantine" else None
        # A start of its own is in the δS of every checkpoint.
        self.optimizer = ProjectedOptimizer(
            make(self.adapter.delta),
            self.adapter,
            self.axes,
            arm=self.arm,
            max_norm=limit,
            quarantine=second,
        )

    def _fit_judge(
        self, pairs: list[Pair], say: Callable[[str], None] | None
    ) -> RolloutJudge | None:
        """Return the detector of the arm, fitted with the model before training, and say what it
        loses and catches.
        """
        detector = self.settings.flags_by[0]
        if detector in (None, "labels"):
            return None
        how: dict[str, Any] = {
            "detector": detector,
            "promised": self.settings.clean_lost,
            "svd": self.svd,
        }
        judge = fit_judge(
            pairs, self.model, progress=_told(say, f"gradients for {detector}"), **how
        )
        if say is not None:
            held = judge.threshold
            lost = f"{held.lost:.3f} ({held.low:.3f} to {held.high:.3f}) of the clean sides"
            say(
                f"detector {detector}: flags {held.caught:.3f} of the hack sides held out, and "
                f"{lost}"
            )
        return judge

    def trainer(self, folder: Path, reward: Reward, trackers: tuple[str, ...]) -> "GRPO":
        """Return the trainer of :func:`assay.vhack.training.train`, from which the arguments
        come.
        """
        from transformers import PrinterCallback

        from assay.vhack.training.grpo import GRPO, judge_rollouts, trl_arguments

        settings = self.settings
        if self.pool is not None and not self.pool.prompts & set(reward.prompts):
            seen = f"{settings.teacher}: no completion of any of the {len(reward.prompts)} tasks"
            do = "sample the pool from the prompts of the same tasks, modes and seed"
            raise DataError(seen, wanted="completions of the prompts of this run", do=do)
        trainer = GRPO(
            self.adapter,
            self.optimizer,
            reward,
            trl_arguments(settings, self.model, folder, trackers, self.processes),
            prompts=settings.steps * settings.prompts,
            processing_class=self.tokenizer,
            pool=self.pool,
            teachers=settings.teachers,
            shortcut=self.shortcut,
            axes=self.axes,
            processes=self.processes,
        )
        trainer.remove_callback(PrinterCallback)  # it prints to stdout, which is for results
        detector, at_random, known = settings.flags_by
        if detector is not None:
            judge_rollouts(trainer, self.judge, self.arm, at_random=at_random, known=known)
        return trainer

    def refresh(self, trainer: "GRPO", step: int) -> float | None:
        """Renew axes and detector if it is time after so many steps, and return how much of the old
        axes stayed.

        Axes are those of the policy of now. The detector still looks through the model before
        training, in which an exploit has not become likely yet, and learns from the run's own
        rollouts beside the pairs.
        """
        from assay.vhack.training.grpo import pair_judged

        if not self.settings.refresh or step % self.settings.refresh:
            return None
        if self.judge is not None:
            groups = {pair.prompt: pair.group for pair in self.pairs}
            made = [
                replace(pair, group=groups.get(pair.prompt, pair.group))
                for pair in pair_judged(trainer.judged)
            ]
            own = self.processes.broadcast(made)
            with self.adapter.disabled():
                trainer.judge = self._fit_judge([*self.pairs, *own], self.say)
        before = trainer.axes
        axes = self.processes.broadcast(self._extract_axes(load=False))
        trainer.use_axes(axes)
        return _measure_overlap(before, axes) if before is not None else None

    def _extract_axes(self, *, load: bool) -> Basis:
        """Return the axes of the arm, from a file of an earlier part or of the settings where they
        may be loaded.
        """
        settings = self.settings
        how: dict[str, Any] = {"top_k": settings.k_use, "method": settings.method}
        if self.arm.basis != "true":
            gradients = pair_gradients(self.pairs, self.model, svd=self.svd)
            controls = self.arm.make_basis(gradients, seed=settings.seed, **how)
            return controls.slice(settings.k_use)
        if load and settings.basis:
            return Basis.load(settings.basis, self.model).slice(settings.k_use)
        path = self.earlier if load else None
        return extract(self.pairs, self.model, path=path, n_heldout=0, svd=self.svd, **how)


def _told(say: Callable[[str], None] | None, what: str) -> Progress | None:
    """Return a progress that says every tenth part of a stage in a line."""
    tenths: set[int] = set()

    def told(done: int, total: int) -> None:
        if say is not None and (tenth := 10 * done // total) not in tenths:
            tenths.add(tenth)
            say(f"{what}: {done} of {total}")

    return told if say is not None else None


def _measure_overlap(before: Basis, after: Basis) -> float:
    """Return the mean squared cosine of the principal angles between two bases, over the modules
    that both have.
    """
    shares = []
    for name, axes_KR in before.axes.items():
        other_KR = after.axes.get(name)
        if other_KR is not None and axes_KR.any() and other_KR.any():
            rank = min(int(axes_KR.any(dim=1).sum()), int(other_KR.any(dim=1).sum()))
            shares.append(float((axes_KR.double() @ other_KR.double().T).square().sum()) / rank)
    # Rounded, because the sums depend on where in memory the axes are.
    return round(sum(shares) / len(shares), 9) if shares else 0.0


def _check_installed(trackers: tuple[str, ...]) -> None:
    try:
        import_module("trl")
    except ImportError as error:
        raise BackendUnavailable(
            f"TRL cannot be imported: {error}", wanted="the extra train", do=how_to_install("train")
        ) from error
    from transformers import integrations

    check_trackers(trackers, cast(Any, integrations).get_available_reporting_integrations())


def train(
    settings: TrainSettings,
    folder: str | Path,
    *,
    console: Callable[[str], None] | None = None,
    trackers: tuple[str, ...] = (),
    allow_unsandboxed: bool = False,
    model: Model | None = None,
    tasks: Sequence[Task] | None = None,
    reward: RewardFunction | None = None,
    pairs: list[Pair] | None = None,
) -> RunResult:
    """Train one arm. Called again with the same settings and directory it goes on after the last
    checkpoint.

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
    from assay.vhack.training.log import StepLog

    processes = join_processes(settings.device)
    checkpoint, done = last_checkpoint(folder)
    settings = _continue_settings(folder, settings, done, processes)
    # δS of so many steps is there: a run that went on may have been interrupted beside its former.
    last = (
        read_records(folder / LOG)[-1]
        if done >= settings.steps and (folder / DELTA).exists()
        else {}
    )
    is_finished = last.get("kind") == "end" and last.get("steps") == done
    processes.wait()  # until every process has read what the first will write
    say = console if processes.is_first else None
    if say is not None:
        say(
            f"arm {settings.arm}: {settings.chosen.says} (docs/vhack-results.md has what was "
            f"measured)"
        )
    workers = max(1, (os.cpu_count() or 2) // processes.count)
    if reward is None and settings.reward is not None:
        reward = import_function(settings.reward, "--reward")
    work, source = load_tasks(
        settings, tasks, least=settings.prompts, why="those of a step", model=settings.model
    )
    paid = make_reward(
        work, reward, settings.chosen, source, workers=workers, allow_unsandboxed=allow_unsandboxed
    )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise storage_error(folder, error) from error
    if is_finished:
        return _result(folder, settings, done, processes)
    if pairs is None:  # those of the environment have the loopholes and families of the run
        modes = [mode for mode in settings.modes if mode in CHANNELS] or list(CHANNELS)
        pairs = find_pairs(settings.pairs, modes=modes, families=settings.families or None)
    _check_inputs(settings, pairs, work, model)
    loaded = model or load_model(
        settings.model, dtype=settings.dtype, device=processes.device or settings.device
    )
    run = Prepared(settings, loaded, pairs, folder / BASIS if done else None, processes, say)
    try:
        trainer = run.trainer(folder, paid, trackers)
        log = None
        if processes.is_first:
            run.axes.save(folder / BASIS)
            about = {
                "settings": settings.model_dump(mode="json"),
                "arm": run.arm.says,
                "weights": loaded.digest,
            }
            log = TrainLog(
                folder / LOG, {**about, "processes": processes.count, **provenance()}, step=done
            )
        steps = StepLog(trainer, log, console=say, refresh=partial(run.refresh, trainer))
        for line in read_steps(folder / LOG)[1] if done and processes.is_first else ():
            if "missed" in line:
                steps.alarm.see(line["missed"])
        trainer.add_callback(steps)
        # Layers that are computed again in the backward pass would be computed in another way
        # there.
        products = nullcontext() if settings.checkpointing else wide_products(loaded)
        with (
            finite_sampling("lower the learning rate; the last checkpoint is from before"),
            products,
        ):
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        if log is not None:
            run.adapter.save(folder / DELTA)
            log.write("end", steps=settings.steps)
            training_page(folder, command=f"assay vhack report {folder.name}").write(folder / PAGE)
    finally:
        run.adapter.detach()
    processes.wait()
    return _result(folder, settings, done, processes)


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
    if settings.flags_by[0] not in (None, "labels"):
        check_pairs(pairs, settings.clean_lost)


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
    begun = head.get("settings")
    if not isinstance(begun, dict):
        raise DataError(
            f"{folder / LOG} has no settings",
            wanted="the log of a run",
            do="choose another directory",
        )
    settings = settings.continuing(begun)
    other = settings.differences(begun)
    if (before := head.get("processes", 1)) != processes.count:
        other.append(f"{before} processes, now {processes.count}")
    if other or settings.steps < done:
        seen = f"{folder} holds a run with {', '.join(other) or f'{done} steps already'}"
        do = "choose another directory, or the settings of that run"
        raise UsageError(seen, wanted="the same settings, and no fewer steps", do=do)
    return settings


def _result(
    folder: Path, settings: TrainSettings, resumed_from: int, processes: Processes
) -> RunResult:
    _, steps = read_steps(folder / LOG)
    last = steps[-10:]
    names = [name for name in last[-1] if name not in ("kind", "step")] if last else []
    means = {name: fmean(record[name] for record in last if name in record) for name in names}
    alarm = next((record["step"] for record in steps if record.get("alarm", 0.0) >= 1), None)
    return RunResult(
        folder, len(steps), settings.arm, resumed_from, means, alarm, processes.is_first
    )
