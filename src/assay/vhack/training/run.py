"""One run from settings to the last line of its log, and on from where it stopped."""

import os
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from pickle import UnpicklingError
from statistics import fmean
from typing import Any, cast

import torch

from assay.errors import BackendUnavailable, DataError, UsageError, how_to_install, reason_of
from assay.files.jsonl import JsonObject
from assay.files.storage import one_writer
from assay.models.load import load_model
from assay.models.model import Model
from assay.models.precision import wide_products
from assay.pages.provenance import provenance
from assay.vhack.detectors.detector import make_detector
from assay.vhack.detectors.threshold import check_fittable
from assay.vhack.directions.basis.basis import Basis
from assay.vhack.environment.grading import CHANNELS
from assay.vhack.names import check_trackers
from assay.vhack.pairs.generate import find_pairs
from assay.vhack.pairs.pairs import Pair
from assay.vhack.pairs.selection import select_pairs
from assay.vhack.training.log import TrainLog, read_records, read_steps
from assay.vhack.training.page import training_page
from assay.vhack.training.prepared import Console, PreparedRun, silent
from assay.vhack.training.processes import Processes, join_processes
from assay.vhack.training.rewards import Reward, make_reward
from assay.vhack.training.sampling import encode_prompts, finite_sampling
from assay.vhack.training.settings import TrainSettings
from assay.vhack.training.tasks import (
    RewardFunction,
    Task,
    import_function,
    load_tasks,
    mechanism_of,
    read_prompt,
)

LOG = "log.jsonl"
DELTA = "delta.safetensors"
BASIS = "basis.safetensors"
PAGE = "page.html"

LAST_STEPS = 10  # of which a result has the means
_DAMAGE = (
    OSError,
    EOFError,
    UnpicklingError,
    RuntimeError,
    ValueError,
    TypeError,
    KeyError,
    DataError,
)
"""What reading a damaged checkpoint raises."""


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
    with one_writer(folder) if processes.is_first else nullcontext():
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
        _check_mechanisms(settings.flags_by.mechanisms, work)
        paying = make_reward(
            work,
            reward,
            arm,
            source,
            workers=max(1, (os.cpu_count() or 2) // processes.count),
            allow_unsandboxed=allow_unsandboxed,
        )
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
        try:
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        except _DAMAGE as error:
            if checkpoint is None or steps.has_begun or isinstance(error, torch.OutOfMemoryError):
                raise
            raise DataError(
                f"{checkpoint} is damaged: {reason_of(error)}",
                wanted="a whole checkpoint",
                do=f"remove {checkpoint}: the run goes on from the one before",
            ) from error
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


def _check_mechanisms(named: Sequence[str], tasks: Sequence[Task]) -> None:
    """Refuse labels of mechanisms that no task has: they would never flag anything."""
    known = {mechanism_of(task) for task in tasks} - {""}
    if unknown := [name for name in named if name not in known]:
        raise UsageError(
            f"labels of {', '.join(unknown)}, which no task has",
            wanted=f"some of {', '.join(sorted(known)) or 'the mechanisms of tasks'}",
            do="correct --detector, or give tasks a 'mechanism'",
        )


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
    detector = settings.flags_by.detector
    if detector is not None and detector != "labels":
        check_fittable(pairs, make_detector(detector).least_groups, settings.clean_lost)


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
