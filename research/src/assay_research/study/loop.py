"""The study: all runs of a plan, to their end or until time is up, and later from there."""

import itertools
import math
import pickle
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from assay.errors import DataError, StorageError, UsageError
from assay.vhack.basis.basis import Basis
from assay.vhack.delta.advantage import Shortcut
from assay.vhack.environment.grading import CHANNELS, Episode
from assay.vhack.gradients.svd import SVDCache
from assay_research.study.cohort import Cohort, Rollouts
from assay_research.study.grading import Grader, StudyVerdict
from assay_research.study.log import RunLog
from assay_research.study.plan import StudyRun, StudySettings, TaskPool

if TYPE_CHECKING:
    from assay.models.load import Model


Progress = Callable[[int, Mapping[str, float]], None]

_MARKERS = {"training": 1, "evaluation": 2}
"""Markers to evaluate with, and the divisor that gives the part of the held-out tasks used with them."""


class Study:
    """All runs of a plan, trained side by side.

    Args:
        runs: Runs to make; no two may be the same.
        model: Model that all runs start from, in float32.
        svd: Factors of its weights.
        bases: Axes by name, at least those that the runs ask for.
        settings: Settings that all runs share.
        about: Further entries of every log's header: versions, device, digests.
        dtype: Dtype of weights and activations while running.
        shortcut: Direction of arms that modify advantages.
        most: Largest number of runs in one cohort.
        fewest: Smallest number of cohorts. With two, one uses the GPU while the rollouts of the other are graded.

    Attributes:
        logs: Log of every run, by name.
        step: Number of steps done.
        seconds: Seconds waited for grades (``grading``), spent on gradients and steps (``learning``) and on rollouts
            (``writing``).

    Raises:
        UsageError: Two runs are the same, or a basis or the shortcut is missing.

    Example::

        runs = [StudyRun(arm, seed) for arm in ("none", "no-loophole") for seed in range(3)]
        study = Study(runs, model, weight_svd(model), {"true": basis}, StudySettings(steps=40))
        with Grader() as grader:
            study.run(grader)
            study.evaluate(grader)
        results = summarise(study.logs.values())
    """

    def __init__(
        self,
        runs: Sequence[StudyRun],
        model: "Model",
        svd: SVDCache,
        bases: Mapping[str, Basis],
        settings: StudySettings,
        *,
        about: Mapping[str, Any] | None = None,
        dtype: torch.dtype = torch.float32,
        shortcut: Shortcut | None = None,
        most: int = 40,
        fewest: int = 2,
    ) -> None:
        _check(runs, bases, shortcut)
        assert model.tokenizer is not None, "bundled models have one"
        self.settings, self.step = settings, 0
        self.seconds = {"grading": 0.0, "learning": 0.0, "writing": 0.0}
        self.pool = TaskPool(settings, model.tokenizer)
        self.logs = {run.name: RunLog.begin(run, settings, about or {}) for run in runs}
        self.cohorts = [
            Cohort(part, model, svd, bases, self.pool, settings, dtype, shortcut)
            for part in _parted(runs, most, fewest)
        ]

    def run(
        self,
        grader: Grader,
        *,
        until: int | None = None,
        seconds: float | None = None,
        progress: Progress | None = None,
    ) -> bool:
        """Continue training, and return whether all steps are done.

        Args:
            grader: Grader of the programs.
            until: Step to stop after, by default the last.
            seconds: Seconds after which no further step begins.
            progress: Called after every step with its number and means over all runs.
        """
        last, begun = min(until or self.settings.steps, self.settings.steps), time.monotonic()
        waiting = [self._write(cohort, grader, self.step) for cohort in self.cohorts if self.step < last]
        while self.step < last:
            stop = seconds is not None and time.monotonic() - begun > seconds
            means: dict[str, float] = {}
            for index, cohort in enumerate(self.cohorts):
                with self._timed("grading"):
                    verdicts = grader.collect(waiting[index].pending)
                with self._timed("learning"):
                    self._log(cohort, cohort.learn(waiting[index], verdicts), means)
                if self.step + 1 < last and not stop:
                    with self._timed("writing"):
                        waiting[index] = self._write(cohort, grader, self.step + 1)
            self.step += 1
            if progress:
                progress(self.step, means)
            if stop:
                break
        return self.step >= self.settings.steps

    def evaluate(self, grader: Grader, kinds: Sequence[str] = tuple(_MARKERS)) -> None:
        """Let all runs work on the held-out tasks, with each kind of markers in turn, and log what they do.

        Beside the rates there are the mean log-probabilities of the exploit and of
        the honest program, which tell of a hack before it is sampled.
        """
        p = self.settings.prompts
        for markers in kinds:
            episodes = self.pool.held_out(markers)
            episodes = episodes[: -(-len(episodes) // _MARKERS[markers])]
            # Parts are all of one size, even where there are fewer episodes than the last part lacks.
            padded = list(itertools.islice(itertools.cycle(episodes), len(episodes) + -len(episodes) % p))
            for cohort in self.cohorts:
                written, likely = [], []
                for first in range(0, len(padded), p):
                    part = padded[first : first + p]
                    draw = f"evaluation {markers} {first}"
                    written.append(cohort.write(grader, [part] * len(cohort.runs), draw))
                    likely.append(cohort.likelihoods(part))
                texts = [cohort.texts(rollouts.batch) for rollouts in written]
                found = [grader.collect(rollouts.pending) for rollouts in written]
                for r, run in enumerate(cohort.runs):
                    each = p * self.settings.rollouts
                    own = slice(r * each, (r + 1) * each)
                    verdicts = [verdict for part in found for verdict in part[own]]
                    programs = [text for part in texts for text in part[own]]
                    values = self._rates(episodes, programs, verdicts) | {
                        name: round(float(torch.cat([part[name][r] for part in likely])[: len(episodes)].mean()), 3)
                        for name in likely[0]
                    }
                    self.logs[run.name].add_evaluation(self.step, markers, values)

    def save(self, path: Path) -> None:
        """Write everything a resumed study needs, δS in full precision, to one file.

        Raises:
            StorageError: The file cannot be written.
        """
        state = {
            "step": self.step,
            "cohorts": [cohort.state() for cohort in self.cohorts],
            "logs": {name: log.state() for name, log in self.logs.items()},
        }
        partial = path.with_suffix(".partial")
        try:
            torch.save(state, partial)
            partial.replace(path)
        except (OSError, RuntimeError) as error:
            raise StorageError(f"{path}: {error}", wanted="room and permission", do="try elsewhere") from error

    def load(self, path: Path) -> None:
        """Take up a saved study of the same runs.

        Raises:
            DataError: The file cannot be read, or was saved with other runs.
        """
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            stored = [cohort["runs"] for cohort in state["cohorts"]]
            logs = {name: RunLog.of_state(log) for name, log in state["logs"].items()}
        except (OSError, EOFError, KeyError, TypeError, RuntimeError, pickle.UnpicklingError) as error:
            raise DataError(f"{path}: {error}", wanted="a saved study", do="begin without it") from error
        if stored != [[run.name for run in cohort.runs] for cohort in self.cohorts]:
            raise DataError(f"{path} has other runs", wanted="those of this study", do="begin in a new directory")
        self.step, self.logs = state["step"], logs
        for cohort, part in zip(self.cohorts, state["cohorts"], strict=True):
            cohort.load(part)

    @contextmanager
    def _timed(self, what: str) -> Iterator[None]:
        begun = time.monotonic()
        yield
        self.seconds[what] += time.monotonic() - begun

    def _write(self, cohort: Cohort, grader: Grader, step: int) -> Rollouts:
        return cohort.write(grader, [self.pool.drawn(run, step) for run in cohort.runs], f"step {step}")

    def _log(self, cohort: Cohort, values: Mapping[str, torch.Tensor], means: dict[str, float]) -> None:
        table = torch.stack([value.double() for value in values.values()]).tolist()
        for r, run in enumerate(cohort.runs):
            row = {name: column[r] for name, column in zip(values, table, strict=True) if not math.isnan(column[r])}
            self.logs[run.name].add_step(self.step, row, self.settings.log_every)
            for name, value in row.items():
                means[name] = means.get(name, 0.0) + value / len(self.logs)

    def _rates(
        self, episodes: Sequence[Episode], programs: Sequence[str], verdicts: Sequence[StudyVerdict]
    ) -> dict[str, Any]:
        """Return the rates of one run; what follows the last episode in the other two is left out."""
        owners = [episode for episode in episodes for _ in range(self.settings.rollouts)]
        verdicts = verdicts[: len(owners)]
        hacks = Counter(owner.mode for owner, verdict in zip(owners, verdicts, strict=True) if verdict.exploited)
        whole = sum(
            verdict.exploited and program == owner.completion(owner.exploit())
            for owner, program, verdict in zip(owners, programs, verdicts, strict=False)
        )
        n, modes = len(verdicts), Counter(owner.mode for owner in owners)
        return {
            "rollouts": n,
            "hack": round(hacks.total() / n, 5),
            "hack_whole": round(whole / n, 5),
            "solve": round(sum(verdict.correct for verdict in verdicts) / n, 5),
            "vacuous": round(sum(verdict.vacuous for verdict in verdicts) / n, 5),
            "hack_by_mode": {mode: round(hacks[mode] / max(1, modes[mode]), 4) for mode in CHANNELS},
        }


def _check(runs: Sequence[StudyRun], bases: Mapping[str, Basis], shortcut: Shortcut | None) -> None:
    names = [run.name for run in runs]
    missing = sorted({run.basis for run in runs} - set(bases))
    if shortcut is None:
        missing += [f"the shortcut of {run.name}" for run in runs if run.how.advantage]
    if len(set(names)) < len(names) or missing or not runs:
        raise UsageError(
            f"axes {missing[0]!r}" if missing else f"{len(runs)} runs, {len(set(names))} of them different",
            wanted="axes for every run, and runs that differ",
            do="correct the plan",
        )


def _parted(runs: Sequence[StudyRun], most: int, fewest: int) -> list[list[StudyRun]]:
    """Return the runs in parts of nearly equal size, at most ``most``."""
    count = min(len(runs), max(fewest, -(-len(runs) // most)))
    bounds = [round(index * len(runs) / count) for index in range(count + 1)]
    return [list(runs[first:last]) for first, last in itertools.pairwise(bounds)]
