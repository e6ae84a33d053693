"""One run from settings to the last line of its log, and on from where it stopped."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from assay.errors import BackendUnavailable, DataError, ModelError, UsageError
from assay.models import Model, load_model
from assay.reports import JsonObject, provenance, storage_error
from assay.vhack._basis import Basis
from assay.vhack._extract import pair_gradients
from assay.vhack._svd_cache import weight_svd
from assay.vhack._types import Pair
from assay.vhack.environment import Episode, available_backend, episodes
from assay.vhack.pairs import find_pairs
from assay.vhack.trainer._log import TrainLog, read_steps
from assay.vhack.trainer._pool import Pool
from assay.vhack.trainer._rewards import EpisodeReward
from assay.vhack.trainer._settings import TrainSettings
from assay.vhack.training import Arm, DeltaS, ProjectedOptimizer, basis_of_kind
from assay.vhack.training._advantage import Shortcut

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from assay.vhack._svd_cache import SVDCache
    from assay.vhack.trainer._grpo import GRPO

__all__ = ["RunResult", "train"]

LOG, DELTA, BASIS = "log.jsonl", "delta.safetensors", "basis.safetensors"
_LAST = 10


@dataclass(frozen=True)
class RunResult:
    """Where a run ended.

    Attributes:
        folder: its directory.
        steps: how many it has.
        resumed_from: the step it was continued from; 0 from the start.
        last: means of the last ten step lines, by name.
    """

    folder: Path
    steps: int
    resumed_from: int
    last: JsonObject


def train(
    settings: TrainSettings,
    folder: str | Path,
    *,
    console: Callable[[str], None] | None = None,
    trackers: tuple[str, ...] = (),
    allow_unsandboxed: bool = False,
    model: Model | None = None,
    tasks: list[Episode] | None = None,
    pairs: list[Pair] | None = None,
) -> RunResult:
    """Train one arm. Called again with the same settings and directory it goes on after the last checkpoint.

    The directory gets ``log.jsonl`` (see :mod:`assay.vhack.trainer._log`), ``basis.safetensors`` (the true axes),
    ``checkpoint-N`` (the last two) and in the end ``delta.safetensors``.

    Args:
        settings: of the run.
        folder: its directory.
        console: takes a line of text per step.
        trackers: names of TRL's trackers, such as ``wandb``.
        allow_unsandboxed: see :func:`assay.vhack.environment.run`.
        model: the model, where it is loaded already; it is trained.
        tasks: other tasks than those the settings describe.
        pairs: other pairs than those the settings name.

    Raises:
        BackendUnavailable: TRL is not installed, or there is no sandbox.
        UsageError: the directory holds a run with other settings, the model has no tokenizer or is not on the device
            that TRL trains on, or there are several processes.
        DataError: basis, pairs, pool or log cannot be used.
        ModelError, ResourceError: as loading, decomposing and saving raise them.
    """
    folder = Path(folder)
    _require(allow_unsandboxed)
    _check_trackers(trackers)
    from assay.vhack.trainer._grpo import last_checkpoint

    checkpoint, done = last_checkpoint(folder)
    _check_earlier(folder, settings, done)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise storage_error(folder, error) from error
    if done >= settings.steps and (folder / DELTA).exists():
        return _result(folder, done)
    loaded = model or load_model(settings.model, dtype=settings.dtype, device=settings.device)
    run = _Run(settings, loaded, pairs if pairs is not None else find_pairs(settings.pairs))
    try:
        trainer = run.trainer(folder, tasks, trackers, allow_unsandboxed)
        (run.watched or run.axes).save(folder / BASIS)
        head = {"settings": settings.as_dict(), "arm": run.arm.says, "weights": loaded.digest, **provenance()}
        log = TrainLog(folder / LOG, head, step=done)
        trainer.add_callback(_step_log(trainer, log, console, run))
        with _diverging():
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        run.adapter.save(folder / DELTA)
        log.write("end", steps=settings.steps)
    finally:
        run.adapter.detach()
    return _result(folder, done)


@contextmanager
def _diverging() -> Iterator[None]:
    """What sampling says of a model whose logits are no numbers, in words."""
    try:
        yield
    except RuntimeError as error:
        if "probability tensor" not in str(error) and "device-side assert" not in str(error):
            raise
        raise ModelError(
            "a model whose next-token probabilities are not finite",
            wanted="training that does not diverge",
            do="lower the learning rate; the last checkpoint is from before",
        ) from error


def _require(allow_unsandboxed: bool) -> None:
    try:
        import trl  # noqa: F401
    except ImportError as error:
        raise BackendUnavailable(
            f"TRL cannot be imported: {error}", wanted="the extra train", do="pip install 'assay[train]'"
        ) from error
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UsageError(
            "a run in several processes", wanted="one process per run", do="start runs side by side, one on each GPU"
        )
    if available_backend() is None and not allow_unsandboxed:
        raise BackendUnavailable(
            "no sandbox for the programs of the model",
            wanted="bubblewrap, or user namespaces with util-linux",
            do="install bubblewrap, or accept the risk with --allow-unsandboxed",
        )


def _check_trackers(names: tuple[str, ...]) -> None:
    from transformers import integrations

    available: Any = integrations
    there: list[str] = available.get_available_reporting_integrations()
    missing = [name for name in names if name not in there]
    if missing:
        raise UsageError(
            f"tracker {', '.join(missing)}",
            wanted=f"one that is installed: {', '.join(there) or 'there is none'}",
            do="install it, or leave it out: log.jsonl has everything",
        )


def _check_earlier(folder: Path, settings: TrainSettings, done: int) -> None:
    if not (folder / LOG).exists():
        if done:
            raise DataError(f"checkpoints without {folder / LOG}", wanted="both", do="choose another directory")
        return
    head, _ = read_steps(folder / LOG)
    other = settings.differences(head["settings"])
    if other or settings.steps < done:
        raise UsageError(
            f"{folder} holds a run with {', '.join(other) or f'{done} steps already'}",
            wanted="the same settings, and no fewer steps",
            do="choose another directory, or the settings of that run",
        )


def _step_log(trainer: "GRPO", log: TrainLog, console: Callable[[str], None] | None, run: "_Run") -> Any:
    from assay.vhack.trainer._callback import StepLog

    return StepLog(trainer, log, console=console, refresh=lambda step: run.refresh(trainer, step))


def _result(folder: Path, resumed_from: int) -> RunResult:
    _, steps = read_steps(folder / LOG)
    last = steps[-_LAST:]
    names = [name for name in last[-1] if name not in ("kind", "step")] if last else []
    means = {name: sum(r[name] for r in last if name in r) / sum(name in r for r in last) for name in names}
    return RunResult(folder, len(steps), resumed_from, means)


class _Run:
    """What is made once for a run."""

    def __init__(self, settings: TrainSettings, model: Model, pairs: list[Pair]) -> None:
        if model.tokenizer is None:
            raise UsageError(f"{settings.model} has no tokenizer", wanted="a model with one", do="choose another")
        self.settings, self.model, self.pairs = settings, model, pairs
        self.arm: Arm = settings.chosen
        self.shortcut = Shortcut.fit(model, model.tokenizer, pairs) if self.arm.advantage else None
        self.svd: SVDCache = weight_svd(model)
        self.axes, self.watched = self._extracted(load=True)
        self.adapter = DeltaS(model, self.svd)
        self.optimizer = ProjectedOptimizer(
            _inner(settings, self.adapter),
            self.adapter,
            self.axes,
            gate=self.arm.gate,
            level=self.arm.level,
            box=self.arm.box,
            push=self.arm.push,
            watched=self.watched,
            max_norm=settings.max_norm or None,
        )

    def trainer(
        self, folder: Path, tasks: list[Episode] | None, trackers: tuple[str, ...], allow_unsandboxed: bool
    ) -> "GRPO":
        """The trainer."""
        from transformers import PrinterCallback

        from assay.vhack.trainer._grpo import GRPO

        settings, tokenizer = self.settings, self.model.tokenizer
        assert tokenizer is not None
        chosen = tasks if tasks is not None else _tasks(settings)
        pool = None
        if settings.teacher:
            pool = Pool.load(settings.teacher, tokenizer, max_new_tokens=settings.max_new_tokens)
            _check_pool(pool, chosen, settings.teacher)
        trainer = GRPO(
            self.adapter,
            self.optimizer,
            EpisodeReward(chosen, self.arm, workers=os.cpu_count() or 2, allow_unsandboxed=allow_unsandboxed),
            _arguments(settings, self.model, folder, trackers),
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
        """After this many steps: other axes if it is time, and how much of the true ones stayed."""
        if not self.settings.refresh or step % self.settings.refresh:
            return None
        before = trainer.axes[1] or trainer.axes[0]
        with _forward_of_its_class(self.model.module):
            axes, watched = self._extracted(load=False)
        trainer.use_axes(axes, watched)
        return _overlap(before, watched or axes) if before is not None else None

    def _extracted(self, *, load: bool) -> tuple[Basis, Basis | None]:
        """The arm's axes, and the true ones where these are others."""
        settings, kind = self.settings, self.arm.basis
        given = Basis.load(settings.basis, self.model, settings.k_use) if load and settings.basis else None
        if given is not None and kind == "true":
            return given, None
        gradients = pair_gradients(self.model, None, self.pairs, svd=self.svd)

        def made(kind: str) -> Basis:
            found = basis_of_kind(kind, gradients, top_k=settings.k_use, method=settings.method, seed=settings.seed)
            return found.slice(settings.k_use)

        true = given if given is not None else made("true")
        return (true, None) if kind == "true" else (made(kind), true)


@contextmanager
def _forward_of_its_class(module: "PreTrainedModel") -> Iterator[None]:
    """Without the forward function that TRL has put on the instance: it would run this model, and not a copy of it."""
    patched = vars(module).pop("forward", None)
    try:
        yield
    finally:
        if patched is not None:
            module.forward = patched


def _inner(settings: TrainSettings, adapter: DeltaS) -> torch.optim.Optimizer:
    if settings.optimizer == "sgd":
        return torch.optim.SGD(adapter.delta, lr=settings.lr, momentum=0.9)
    return torch.optim.AdamW(adapter.delta, lr=settings.lr, betas=(0.9, 0.99), weight_decay=0.0)


def _tasks(settings: TrainSettings) -> list[Episode]:
    return episodes(
        settings.tasks,
        seed=settings.seed,
        modes=settings.modes,
        share_none=settings.share_none,
        difficulty=settings.difficulty,
        families=settings.families or None,
    )


def _check_pool(pool: Pool, tasks: list[Episode], path: str) -> None:
    if not pool.prompts & {one.prompt for one in tasks}:
        raise DataError(
            f"{path}: no completion of any of the {len(tasks)} tasks",
            wanted="completions of the prompts of this run",
            do="sample the pool from the prompts of the same tasks, modes and seed",
        )


def _arguments(settings: TrainSettings, model: Model, folder: Path, trackers: tuple[str, ...]) -> Any:
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
    if made.device != model.device:
        raise UsageError(
            f"a model on {model.device}", wanted=f"{made.device}, where TRL trains", do="set CUDA_VISIBLE_DEVICES"
        )
    made._n_gpu = 1  # others that are visible are not for this run
    return made


def _overlap(before: Basis, after: Basis) -> float:
    """Mean squared cosine of the principal angles between two bases, over the modules that both have."""
    shares = []
    for name, axes_KR in before.axes.items():
        other_KR = after.axes.get(name)
        if other_KR is not None and axes_KR.any() and other_KR.any():
            rank = min(int(axes_KR.any(dim=1).sum()), int(other_KR.any(dim=1).sum()))
            shares.append(float((axes_KR.double() @ other_KR.double().T).square().sum()) / rank)
    # Rounded, for the sums depend on where in memory the axes are.
    return round(sum(shares) / len(shares), 9) if shares else 0.0
