"""A callback that writes down what every step did."""

import math
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from assay.errors import ModelError
from assay.files.jsonl import JsonObject
from assay.vhack.directions.delta.step_measures import StackedAxes, measure_shares
from assay.vhack.training.alarm import Alarm
from assay.vhack.training.log import TrainLog
from assay.vhack.training.outcomes import SOURCES, Outcomes
from assay.vhack.training.trl_internals import log_values

if TYPE_CHECKING:
    from assay.vhack.training.grpo import GRPO

SHORT_NAMES = {"student": "cin_s", "teacher": "cin_t"}
"""Names in a step line of the cin of two sources."""

SHOWN = (
    *("hack", "solve", "reward", "flagged", "missed", "alarm"),
    *("cin_s", "cin_t", "cin", "cout", "leak", "displacement", "seconds"),
)
"""Numbers of a step in the console, in their order."""


class StepLog(TrainerCallback):
    """Writes every step to log, console and trackers; add it after the trainer is made.

    Args:
        trainer: Trainer whose steps are written down.
        log: Log that gets the lines; None in all processes but the first.
        console: Takes one line of text per step.
        refresh: Called with the number of steps done; renews the axes of the trainer when it is
            time, and returns how much of the old ones stayed, or None if it is not time.

    Attributes:
        alarm: Alarm that sees what the detector misses; a run that goes on shows it the steps of
            before.
        has_begun: Whether a step has begun.
    """

    def __init__(
        self,
        trainer: "GRPO",
        log: TrainLog | None,
        *,
        console: Callable[[str], None] = lambda line: None,
        refresh: Callable[[int], float | None] = lambda step: None,
    ) -> None:
        self.trainer = trainer
        self.log = log
        self.console = console
        self.refresh = refresh
        self.alarm = Alarm()
        self.has_begun = False
        self._open = ExitStack()
        self._sources: dict[str, Tensor] = {}
        self._began = time.perf_counter()

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Keep the gradient of every kind of rollouts from here on."""
        self.has_begun = True
        self._began = time.perf_counter()
        trainer = self.trainer
        trainer.passes.clear()
        if trainer.projected.quarantine is not None:
            trainer.projected.quarantine.begin(state.global_step)
        trainer.gradients = self._open.enter_context(trainer.adapter.per_sample())

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        """Route the gradient of flagged rollouts, and measure each source's: they are complete."""
        self._open.close()
        trainer = self.trainer
        gradients = trainer.gradients
        trainer.gradients = None
        self._sources = {}
        quarantine = trainer.projected.quarantine
        frames = trainer.projected.frames
        if gradients is None or (quarantine is None and not frames):
            return
        sums = trainer.accelerator.reduce(gradients.sums())
        if quarantine is not None:
            count = trainer.processes.count
            # The kinds after the sources are flagged and doubtful rollouts.
            quarantine.route(
                [sum_GMR[-2] / count for sum_GMR in sums], [sum_GMR[-1] / count for sum_GMR in sums]
            )
        if frames:
            # Read at the end of the step: here it would keep the device waiting for the operations
            # of the optimizer.
            self._sources = measure_sources(sums, frames)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Write the step down; `state.global_step` is already that of the next one."""
        step = state.global_step - 1
        values, sources = self._measure_step()
        if "missed" in values:
            values["alarm"] = self.alarm.see(values["missed"])
        bad = [name for name, value in values.items() if not math.isfinite(value)]
        if bad:
            raise ModelError(
                f"step {step}: {', '.join(bad)} not finite",
                wanted="finite numbers",
                do="lower the learning rate; the last checkpoint is from before",
            )
        overlap = self.refresh(state.global_step)
        if self.log is not None:
            seconds = round(time.perf_counter() - self._began, 4)
            self.log.write("step", step=step, **values, seconds=seconds)
            for name, measures in sources.items():
                self.log.write("source", step=step, source=name, **measures)
            if overlap is not None:
                self.log.write("refresh", step=step, overlap=overlap)
        # TRL's own log call passes these on to the trackers that it was given.
        log_values(self.trainer, values)
        numbers = [f"{name} {values[name]:.3f}" for name in SHOWN if name in values]
        self.console(f"step {step + 1}/{state.max_steps}  {'  '.join(numbers)}")
        if "missed" in values and self.alarm.step == self.alarm.seen:
            self.console(self.alarm.says)

    def on_train_end(self, *_: Any, **__: Any) -> None:
        """Stop keeping gradients."""
        self._open.close()

    def _measure_step(self) -> tuple[JsonObject, dict[str, JsonObject]]:
        """Return the numbers of the step line, and those of each source line."""
        trainer = self.trainer
        device = trainer.args.device
        flags = torch.cat([part.outcomes.flags for part in trainer.passes]).to(device)
        paid = torch.cat([part.outcomes.paid for part in trainer.passes]).to(device)
        gathered_flags, gathered_paid = trainer.accelerator.gather((flags, paid))
        outcomes = Outcomes(gathered_flags.cpu(), gathered_paid.cpu())
        losses = torch.stack([part.loss for part in trainer.passes])
        weights = torch.stack([part.teacher_weights for part in trainer.passes]).to(device)
        loss, weights = trainer.accelerator.reduce((losses.sum(), weights.sum(dim=0)))
        values: JsonObject = {
            **outcomes.rates(trainer.reward.known_flags),
            "reward": float(outcomes.paid.double().mean()),
            "loss": float(loss) / trainer.processes.count,
        }
        total, clipped, count = weights.tolist()
        if count:
            values["ratio_teacher"] = total / count
            values["clipped_teacher"] = clipped / count
        values |= trainer.projected.measures.as_dict()
        if trainer.projected.quarantine is not None:
            values["quarantine"] = trainer.projected.quarantine.scale
        sources = self._source_lines(outcomes)
        values |= {
            SHORT_NAMES[name]: sources[name]["cin"] for name in SHORT_NAMES if name in sources
        }
        return values, sources

    def _source_lines(self, outcomes: Outcomes) -> dict[str, JsonObject]:
        """Return the numbers of the sources that have rollouts and a gradient."""
        counts = {name: int(rollouts.sum()) for name, rollouts in outcomes.kinds().items()}
        if not self._sources:
            return {}
        numbers = torch.stack(list(self._sources.values()), dim=1).tolist()
        lines: dict[str, JsonObject] = {}
        for name, row in zip(SOURCES, numbers, strict=True):
            measures = dict(zip(self._sources, row, strict=True))
            if measures.pop("length") > 0 and counts[name]:
                lines[name] = {**measures, "rollouts": counts[name]}
        return lines


def measure_sources(sums: Sequence[Tensor], frames: StackedAxes) -> dict[str, Tensor]:
    """Return ``cin``, ``cin_two_sided`` and ``length`` of the summed gradient of each source.

    Each is [S], in the order of ``SOURCES``, on the device; ``sums`` are of all kinds of
    :meth:`Outcomes.kinds`, [G, M, R] per group.
    """
    parts = [sum_GMR[: len(SOURCES)] for sum_GMR in sums]
    shares = measure_shares("cin", zip(parts, frames.axes, frames.has_axes, strict=True))
    squares_S = [part_SMR.double().square().sum(dim=(1, 2)) for part_SMR in parts]
    return {**shares, "length": torch.stack(squares_S).sum(dim=0).sqrt()}
