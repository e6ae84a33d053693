"""The one callback: what a step did, from the one backward pass of all its rollouts, to log, console and trackers.

Shapes: M modules of a group, N rows, one per kind and backward pass, R coordinates of δS, G sources.
"""

import math
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from assay.errors import ModelError
from assay.files.jsonl import JsonObject
from assay.vhack.delta.frames import Frames, share
from assay.vhack.delta.rollouts import Rollouts
from assay.vhack.training.log import TrainLog
from assay.vhack.training.processes import ALONE, Processes
from assay.vhack.training.rewards import NOTHING, SOURCES, Outcomes

if TYPE_CHECKING:
    from assay.vhack.training.grpo import GRPO


_SHORT = {"student": "cin_s", "teacher": "cin_t"}
_SHOWN = ("hack", "solve", "reward", "cin_s", "cin_t", "cin", "cout", "leak", "displacement")


class StepLog(TrainerCallback):
    """Write what every step did to log, console and trackers; make it after the trainer, and add it as a callback.

    Args:
        trainer: Trainer whose steps are written down.
        log: Log that gets the lines; None in all processes but the first.
        console: Takes one line of text per step.
        refresh: Called with the number of steps done; renews the axes of the trainer when it is time, and returns how
            much of the old ones stayed, or None if it is not time.
    """

    def __init__(
        self,
        trainer: "GRPO",
        log: TrainLog | None,
        *,
        console: Callable[[str], None] | None = None,
        refresh: Callable[[int], float | None] = lambda step: None,
    ) -> None:
        self.trainer, self.log, self.console, self.refresh = trainer, log, console, refresh
        self._watching = ExitStack()
        self._sources: dict[str, Tensor] = {}
        self._began = time.perf_counter()

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """Keep the gradient of every kind of rollouts from here on."""
        self._began = time.perf_counter()
        self.trainer.seen.clear()
        self.trainer.watching = self._watching.enter_context(self.trainer.adapter.per_sample())

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        """Measure how much of each source's gradient lies along the axes; gradients are complete here."""
        self._watching.close()
        rollouts, self.trainer.watching = self.trainer.watching, None
        frames = self.trainer.projected.watched or self.trainer.projected.frames
        self._sources = {}
        if rollouts is not None and frames:
            # Read at the end of the step: here it would keep the device waiting for the operations of the optimizer.
            self._sources = source_shares(rollouts, frames, self.trainer.processes)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Write the step down; `state.global_step` is already that of the next one."""
        step = state.global_step - 1
        values, sources = self._record()
        bad = [name for name, value in values.items() if not math.isfinite(value)]
        if bad:
            raise ModelError(
                f"step {step}: {', '.join(bad)} not finite",
                wanted="finite numbers",
                do="lower the learning rate; the last checkpoint is from before",
            )
        overlap = self.refresh(state.global_step)
        if self.log is not None:
            self.log.write("step", step=step, **values, seconds=round(time.perf_counter() - self._began, 4))
            for name, found in sources.items():
                self.log.write("source", step=step, source=name, **found)
            if overlap is not None:
                self.log.write("refresh", step=step, overlap=overlap)
        # TRL's own log call passes these on to the trackers that it was given.
        for name, value in values.items():
            self.trainer._metrics["train"][f"vhack/{name}"].append(value)
        if self.console is not None:
            shown = "  ".join(f"{name} {values[name]:.3f}" for name in _SHOWN if name in values)
            self.console(f"step {step + 1}/{state.max_steps}  {shown}")

    def on_train_end(self, *_: Any, **__: Any) -> None:
        """Stop keeping gradients."""
        self._watching.close()

    def _record(self) -> tuple[JsonObject, dict[str, JsonObject]]:
        trainer = self.trainer
        processes, device = trainer.processes, trainer.args.device
        flags, paid = (
            processes.together(torch.cat(parts).to(device)).cpu()
            for parts in zip(*((outcomes.flags, outcomes.paid) for outcomes, _, _ in trainer.seen), strict=True)
        )
        outcomes, reward = Outcomes(flags, paid), float(paid.double().mean())
        loss = torch.stack([loss for _, loss, _ in trainer.seen]).sum()
        weights = torch.stack([weights for _, _, weights in trainer.seen]).sum(dim=0).to(device)
        processes.add_up([loss, weights])
        rates = outcomes.rates(trainer.reward.told)
        values: JsonObject = {**rates, "reward": reward, "loss": float(loss) / processes.count}
        total, outside, count = weights.tolist()
        if count:
            values |= {"ratio_teacher": total / count, "clipped_teacher": outside / count}
        sources = {}
        of_kind = {kind: int(chosen.sum()) for kind, chosen in outcomes.kinds().items()}
        counts = {name: sum(of_kind[kind] for kind in kinds) for name, kinds in SOURCES.items()}
        for name, found in by_source(self._sources).items():
            if found.pop("length") > 0 and counts[name]:
                sources[name] = {**found, "rollouts": counts[name]}
        values |= trainer.projected.measures.as_dict()
        values |= {_SHORT[name]: found["cin"] for name, found in sources.items() if name in _SHORT}
        return values, sources


def source_shares(rollouts: Rollouts, frames: Frames, processes: Processes = ALONE) -> dict[str, Tensor]:
    """Return ``cin``, ``cin_two_sided`` and ``cin_energy`` of the summed gradient of each source, and its ``length``.

    Each is [G], in the order of ``SOURCES``, on the device; `by_source` reads them.

    Args:
        rollouts: Gradients of the passes of this step, by the kinds of :meth:`Outcomes.kinds`.
        frames: Axes to measure along.
        processes: Processes whose rollouts are summed over.
    """
    kinds = list(NOTHING.kinds())
    chosen_GK = torch.tensor([[float(kind in of) for kind in kinds] for of in SOURCES.values()])
    sums = []
    for rows_MNR in rollouts.rows:
        kinds_MKR = rows_MNR.view(len(rows_MNR), -1, len(kinds), rows_MNR.shape[2]).sum(dim=1)
        sums.append(torch.einsum("gk,mkr->gmr", chosen_GK.to(rows_MNR.device), kinds_MKR))
    processes.add_up(sums)
    shares = share("cin", zip(sums, frames.axes, frames.has_axes, strict=True), 1)
    length_G = torch.stack([sum_GMR.double().square().sum(dim=(1, 2)) for sum_GMR in sums]).sum(dim=0).sqrt()
    return {**shares, "length": length_G}


def by_source(found: dict[str, Tensor]) -> dict[str, dict[str, float]]:
    """Return the numbers of each source, read from the device at once; nothing where nothing was measured."""
    if not found:
        return {}
    numbers = torch.stack(list(found.values()), dim=1).tolist()
    return {source: dict(zip(found, row, strict=True)) for source, row in zip(SOURCES, numbers, strict=True)}
