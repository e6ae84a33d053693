"""The log of a run: JSON Lines, written as it goes, continued without repeating a line."""

import math
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from assay.errors import DataError, ModelError
from assay.files.jsonl import JsonObject, dumps, read_jsonl
from assay.files.storage import storage_error, write_jsonl
from assay.vhack.directions.delta.rollout_gradients import Rollouts
from assay.vhack.directions.delta.stacked_axes import StackedAxes
from assay.vhack.directions.delta.step_measures import measure_shares
from assay.vhack.names import LOG
from assay.vhack.training.alarm import Alarm
from assay.vhack.training.processes import ALONE, Processes
from assay.vhack.training.rewards import FLAGGED_KIND, NOTHING, SOURCES, Outcomes

if TYPE_CHECKING:
    from assay.vhack.training.grpo import GRPO


class TrainLog:
    """A log that is being written.

    The first line says what the run is; ``kind`` tells lines apart::

        {"kind": "run", "schema": "assay.vhack.train/1", "settings": {…}, "commit": …, …}
        {"kind": "step", "step": 0, "hack": 0.12, "solve": 0.55, "loss": …, "cin": …, "leak": …, "displacement": …, …}
        {"kind": "source", "step": 0, "source": "teacher", "cin": 0.31, "cin_two_sided": …, "rollouts": 4, …}
        {"kind": "refresh", "step": 40, "overlap": 0.8}
        {"kind": "end", "steps": 100}

    ``step`` counts from 0. A **step** line has

    - of the student's rollouts: ``hack`` (paid, and not correct), ``solve`` (correct), ``vacuous``
      (the channel would accept a wrong solution too, correct or not), ``rollouts``; those of the
      teacher's end in ``_teacher``;
    - ``reward`` (mean of all, as the arm pays it, before advantage modification), ``loss``,
      ``seconds``;
    - ``ratio_teacher``: mean importance weight of the teacher's tokens; ``clipped_teacher``: the
      share of them outside the clipping range;
    - ``cin``, ``cout``, ``leak`` (each also ``_two_sided``), ``displacement``,
      ``displacement_norm``, ``displacement_hackward`` along the axes, see
      :class:`assay.vhack.directions.delta.ProjectedOptimizer`;
    - ``flagged``, ``caught``, ``lost`` and ``missed`` of a detector, see :meth:`Outcomes.rates`,
      and ``alarm``, the evidence of :class:`Alarm` that it misses too many, as a share of what the
      alarm takes;
    - ``quarantine``, where there is one: 1 if the second δS wrote and learned with the first in
      this step, else 0;
    - ``cin_s`` and ``cin_t``: of the summed gradient of the student's rollouts and of the
      teacher's, along them.

    A **source** line is one measurement: cin of the summed gradient of some rollouts, along the
    axes, from the backward pass of all. Sources are ``student`` and ``teacher``, and among the
    student's ``exploited`` and ``correct``. A source without rollouts in a step, or whose gradient
    is zero because all rewards of its groups were equal, has no line. A **refresh** line says how
    much of the axes stayed: the mean squared cosine of the principal angles between old and new
    ones, over modules.

    Args:
        path: File to write.
        head: What the first line says besides kind and schema.
        step: Steps that the checkpoint has from which the run goes on. Lines of later steps are
            dropped; 0 starts a new file.

    Raises:
        DataError: The file should be continued and is not such a log.
        StorageError: The file cannot be written.
    """

    def __init__(self, path: Path, head: JsonObject, *, step: int = 0) -> None:
        self.path = path
        records: list[JsonObject] = [{"kind": "run", "schema": LOG, **head}]
        if step:
            records = [
                r for r in read_records(path) if r["kind"] != "end" and r.get("step", 0) < step
            ]
        write_jsonl(path, records)

    def write(self, kind: str, **values: Any) -> None:
        """Add a line.

        Raises:
            StorageError: The file cannot be written.
        """
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(dumps({"kind": kind, **values}) + "\n")
        except OSError as error:
            raise storage_error(self.path, error) from error


def read_steps(path: str | Path) -> tuple[JsonObject, list[JsonObject]]:
    """Return the first line of a log, and its step lines in order.

    Raises:
        DataError: The file is not such a log.
    """
    head, *others = read_records(Path(path))
    return head, [record for record in others if record["kind"] == "step"]


def read_records(path: Path) -> list[JsonObject]:
    """Return all lines of a log; a last one that was cut off in the middle is dropped.

    Raises:
        DataError: The file is not such a log.
    """
    found: list[JsonObject] = []
    try:
        found.extend(record for _, record in read_jsonl(path))
    except DataError:
        if not found or path.read_bytes().endswith(b"\n"):
            raise
    if not found or found[0].get("schema") != LOG or any("kind" not in record for record in found):
        raise DataError(
            f"{path} is not a training log", wanted=f"schema {LOG}", do="choose another directory"
        )
    check_steps((record for record in found if record["kind"] == "step"), str(path))
    return found


def check_steps(steps: Iterable[Mapping[str, Any]], source: str = "a log") -> None:
    """Refuse a step without its number, or with anything but finite numbers beside its kind."""
    for step in steps:
        for name, one in {"step": None, **step}.items():
            if name != "kind" and (
                isinstance(one, bool) or not (hasattr(one, "__float__") and -1e300 < one < 1e300)
            ):
                seen = f"{source}: a step with {name} {one!r:.60}"
                do = "repair or remove the line"
                raise DataError(seen, wanted="a finite number", do=do)


_SHORT = {"student": "cin_s", "teacher": "cin_t"}
_OF_AXES = ("cin_s", "cin_t", "cin", "cout", "leak", "displacement")
SHOWN = ("hack", "solve", "reward", "flagged", "missed", "alarm", *_OF_AXES, "seconds")


class StepLog(TrainerCallback):
    """Write what every step did to log, console and trackers; make it after the trainer, and add it
    as a callback.

    Args:
        trainer: Trainer whose steps are written down.
        log: Log that gets the lines; None in all processes but the first.
        console: Takes one line of text per step.
        refresh: Called with the number of steps done; renews the axes of the trainer when it is
            time, and returns how much of the old ones stayed, or None if it is not time.

    Attributes:
        alarm: Alarm that sees what the detector misses; a run that goes on shows it the steps of
            before.
    """

    def __init__(
        self,
        trainer: "GRPO",
        log: TrainLog | None,
        *,
        console: Callable[[str], None] | None = None,
        refresh: Callable[[int], float | None] = lambda step: None,
    ) -> None:
        self.trainer = trainer
        self.log = log
        self.console = console
        self.refresh = refresh
        self.alarm = Alarm()
        self._watching = ExitStack()
        self._sources: dict[str, Tensor] = {}
        self._began = time.perf_counter()

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Keep the gradient of every kind of rollouts from here on."""
        self._began = time.perf_counter()
        self.trainer.seen.clear()
        if self.trainer.projected.quarantine is not None:
            self.trainer.projected.quarantine.begin(state.global_step)
        self.trainer.watching = self._watching.enter_context(self.trainer.adapter.per_sample())

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        """Send the gradient of flagged rollouts where it belongs, and measure each source's; they
        are complete here.
        """
        self._watching.close()
        rollouts = self.trainer.watching
        self.trainer.watching = None
        frames = self.trainer.projected.frames
        quarantine = self.trainer.projected.quarantine
        self._sources = {}
        if rollouts is not None and quarantine is not None:
            half = len(NOTHING.kinds()) // 2
            parts = (
                rows_MNR.view(len(rows_MNR), -1, 2 * half, rows_MNR.shape[2])
                for rows_MNR in rollouts.rows
            )
            flagged = [rows_MBKR[:, :, half:].sum(dim=(1, 2)) for rows_MBKR in parts]
            self.trainer.processes.sum_over(flagged)
            quarantine.route([part_MR / self.trainer.processes.count for part_MR in flagged])
        if rollouts is not None and frames:
            # Read at the end of the step: here it would keep the device waiting for the operations
            # of the optimizer.
            self._sources = measure_sources(rollouts, frames, self.trainer.processes)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Write the step down; `state.global_step` is already that of the next one."""
        step = state.global_step - 1
        values, sources = self._record()
        if "missed" in values:
            values["alarm"] = self.alarm.see(values["missed"])
        bad = [name for name, value in values.items() if not math.isfinite(value)]
        if bad:
            wanted = "finite numbers"
            do = "lower the learning rate; the last checkpoint is from before"
            raise ModelError(f"step {step}: {', '.join(bad)} not finite", wanted=wanted, do=do)
        overlap = self.refresh(state.global_step)
        if self.log is not None:
            self.log.write(
                "step", step=step, **values, seconds=round(time.perf_counter() - self._began, 4)
            )
            for name, found in sources.items():
                self.log.write("source", step=step, source=name, **found)
            if overlap is not None:
                self.log.write("refresh", step=step, overlap=overlap)
        # TRL's own log call passes these on to the trackers that it was given.
        for name, value in values.items():
            self.trainer._metrics["train"][f"vhack/{name}"].append(value)
        if self.console is not None:
            shown = "  ".join(f"{name} {values[name]:.3f}" for name in SHOWN if name in values)
            self.console(f"step {step + 1}/{state.max_steps}  {shown}")
            if "missed" in values and self.alarm.step == self.alarm.seen:
                self.console(self.alarm.says)

    def on_train_end(self, *_: Any, **__: Any) -> None:
        """Stop keeping gradients."""
        self._watching.close()

    def _record(self) -> tuple[JsonObject, dict[str, JsonObject]]:
        trainer = self.trainer
        processes = trainer.processes
        device = trainer.args.device
        flags, paid = (
            processes.gather(torch.cat(parts).to(device)).cpu()
            for parts in zip(
                *((outcomes.flags, outcomes.paid) for outcomes, _, _ in trainer.seen), strict=True
            )
        )
        outcomes = Outcomes(flags, paid)
        reward = float(paid.double().mean())
        loss = torch.stack([loss for _, loss, _ in trainer.seen]).sum()
        weights = torch.stack([weights for _, _, weights in trainer.seen]).sum(dim=0).to(device)
        processes.sum_over([loss, weights])
        rates = outcomes.rates(trainer.reward.told)
        values: JsonObject = {**rates, "reward": reward, "loss": float(loss) / processes.count}
        total, outside, count = weights.tolist()
        if count:
            values |= {"ratio_teacher": total / count, "clipped_teacher": outside / count}
        sources = {}
        of_kind = {kind: int(chosen.sum()) for kind, chosen in outcomes.kinds().items()}
        for name, found in split_by_source(self._sources).items():
            count = sum(of_kind[kind] + of_kind[kind + FLAGGED_KIND] for kind in SOURCES[name])
            if found.pop("length") > 0 and count:
                sources[name] = {**found, "rollouts": count}
        values |= trainer.projected.measures.as_dict()
        if (quarantine := trainer.projected.quarantine) is not None:
            values["quarantine"] = quarantine.scale
        values |= {_SHORT[name]: found["cin"] for name, found in sources.items() if name in _SHORT}
        return values, sources


def measure_sources(
    rollouts: Rollouts, frames: StackedAxes, processes: Processes = ALONE
) -> dict[str, Tensor]:
    """Return ``cin`` and ``cin_two_sided`` of the summed gradient of each source, and its
    ``length``.

    Each is [G], in the order of ``SOURCES``, on the device; `split_by_source` reads them. Gradients
    are by the kinds of :meth:`Outcomes.kinds`, and are summed over the processes.
    """
    kinds = [kind.removesuffix(FLAGGED_KIND) for kind in NOTHING.kinds()]
    chosen_GK = torch.tensor([[float(kind in of) for kind in kinds] for of in SOURCES.values()])
    sums = []
    for rows_MNR in rollouts.rows:
        kinds_MKR = rows_MNR.view(len(rows_MNR), -1, len(kinds), rows_MNR.shape[2]).sum(dim=1)
        sums.append(torch.einsum("gk,mkr->gmr", chosen_GK.to(rows_MNR.device), kinds_MKR))
    processes.sum_over(sums)
    shares = measure_shares("cin", zip(sums, frames.axes, frames.has_axes, strict=True), 1)
    length_G = (
        torch.stack([sum_GMR.double().square().sum(dim=(1, 2)) for sum_GMR in sums])
        .sum(dim=0)
        .sqrt()
    )
    return {**shares, "length": length_G}


def split_by_source(found: dict[str, Tensor]) -> dict[str, dict[str, float]]:
    """Return the numbers of each source, read from the device at once; nothing where nothing was
    measured.
    """
    if not found:
        return {}
    numbers = torch.stack(list(found.values()), dim=1).tolist()
    return {
        source: dict(zip(found, row, strict=True))
        for source, row in zip(SOURCES, numbers, strict=True)
    }
