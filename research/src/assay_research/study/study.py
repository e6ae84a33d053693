"""The study: all runs of a plan, to their end, in cohorts that go through a step together."""

import hashlib
import itertools
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from assay.errors import UsageError
from assay.vhack.basis.basis import Basis
from assay.vhack.environment.grading import CHANNELS, Episode
from assay.vhack.gradients.svd import SVDCache
from assay_research.arms import Shortcut
from assay_research.study.grading import Grader, Pending, StudyVerdict
from assay_research.study.log import RunLog
from assay_research.study.model import (
    Batch,
    Generator,
    StackedModel,
    advantages,
    policy_gradient,
    pooled_hidden,
    token_logprobs,
)
from assay_research.study.optimizer import StackedOptimizer
from assay_research.study.plan import StudyRun, StudySettings, TaskPool

if TYPE_CHECKING:
    from assay.models.load import Model


@dataclass(frozen=True, eq=False)
class Rollouts:
    """What a cohort has written: tokens, episodes per run (P each), and R·P·G verdicts on their way."""

    batch: Batch
    episodes: Sequence[Sequence[Episode]]
    pending: Pending


class Cohort:
    """Some runs of a :class:`assay_research.study.Study`, from which it takes its arguments."""

    def __init__(
        self,
        runs: Sequence[StudyRun],
        model: "Model",
        svd: SVDCache,
        bases: Mapping[str, Basis],
        pool: TaskPool,
        settings: StudySettings,
        dtype: torch.dtype,
        shortcut: Shortcut | None,
    ) -> None:
        self.runs, self.pool, self.settings, self._shortcut = list(runs), pool, settings, shortcut
        self.model = StackedModel(model, len(runs), svd, dtype)
        self.optimizer = StackedOptimizer(
            self.model.groups,
            [run.how for run in runs],
            [bases[run.basis] for run in runs],
            partial(torch.optim.Adam, lr=settings.adam_rate, betas=settings.adam_betas),
            watched=bases.get("true"),
            max_norm=settings.max_norm,
        )
        self.model.merge(self.optimizer.delta)
        shape = (settings.prompts, settings.rollouts, settings.prompt_tokens, settings.new_tokens)
        self._generator = Generator(self.model, shape, pool.end)
        self._taught = self._rows([run.stored for run in runs])
        self._modifies = self._rows([run.how.advantage > 0 for run in runs])

    def write(self, grader: Grader, episodes: Sequence[Sequence[Episode]], draw: str) -> Rollouts:
        """Let every run complete its episodes, and begin to grade them.

        Args:
            grader: Grader of the programs.
            episodes: Episodes per run, P of them.
            draw: Name of the random numbers, which are equal for runs of one seed.
        """
        ids_RPL, lengths_RP = self._prompts(episodes)
        tokens = self._generator.sample(ids_RPL, lengths_RP, self.pool.last, self._uniform(draw))
        batch = Batch(ids_RPL, lengths_RP, self.pool.last, tokens, self.pool.end)
        owners = [episode for of_run in episodes for episode in of_run for _ in range(self.settings.rollouts)]
        return Rollouts(batch, episodes, grader.submit(zip(owners, self.texts(batch), strict=True)))

    def texts(self, batch: Batch) -> list[str]:
        """Return the R·P·G completions."""
        return self.pool.texts(batch.tokens.flatten(0, 2))

    @torch.no_grad()
    def likelihoods(self, episodes: Sequence[Episode]) -> dict[str, Tensor]:
        """Return the log-probability of the exploit and of the honest program, summed over tokens, [R, P] each.

        Args:
            episodes: Episodes that all runs are asked about, P of them.
        """
        ids_RPL, lengths_RP = self._prompts([episodes] * len(self.runs))
        rows = [[self.pool.exploit(e), self.pool.completion(e, e.honest())] for e in episodes]
        tokens = self._padded(rows).expand(len(self.runs), -1, -1, -1)
        batch = Batch(ids_RPL, lengths_RP, self.pool.last, tokens.to(self.model.device), self.pool.end)
        found = token_logprobs(self.model, batch.trimmed()).sum(dim=-1)
        return dict(zip(("logp_exploit", "logp_honest"), found.unbind(dim=-1), strict=True))

    def _padded(self, rows: Sequence[Sequence[Sequence[int]]]) -> Tensor:
        """Return completions as tokens, [1, P, G, T], cut at the longest and filled with the end."""
        length = self.settings.new_tokens
        tokens = torch.full((1, len(rows), len(rows[0]), length), self.pool.end)
        for p, of_prompt in enumerate(rows):
            for g, row in enumerate(of_prompt):
                tokens[0, p, g, : min(len(row), length)] = torch.tensor(row[:length])
        return tokens

    def learn(self, rollouts: Rollouts, verdicts: Sequence[StudyVerdict]) -> dict[str, Tensor]:
        """Take one optimizer step, and return its numbers by name, [R] each."""
        shape = (len(self.runs), self.settings.prompts, self.settings.rollouts)
        device = self.model.device
        correct, exploited, vacuous = (
            torch.tensor([float(getattr(verdict, what)) for verdict in verdicts], device=device).view(shape)
            for what in ("correct", "exploited", "vacuous")
        )
        rewards = torch.stack(
            [run.how.reward(correct[r], exploited[r]) for r, run in enumerate(self.runs)]
        )  # [R, P, G]
        found = {
            "hack": exploited,
            "solve": correct,
            "vacuous": vacuous,
            "reward": rewards,
            "tokens": rollouts.batch.mask.sum(dim=-1).float(),
        }
        found = {name: values_RPG.mean(dim=(1, 2)) for name, values_RPG in found.items()}
        if len(self._modifies):
            z_NPG = self._distances(rollouts.batch.of_runs(self._modifies), self._modifies)
            found["z"] = self._spread(z_NPG.mean(dim=(1, 2)), self._modifies)
            rewards[self._modifies] = self._modified(rewards[self._modifies], z_NPG, self._modifies)
        gradients = self._gradients(rollouts, rewards, found)
        self.optimizer.step(gradients)
        self.model.merge(self.optimizer.delta)
        return found | self.optimizer.measures

    @torch.no_grad()
    def _distances(self, batch: Batch, rows: Tensor) -> Tensor:
        """Return how far completions of some runs, whose batch it is, are on the hack's side, [N, P, G]."""
        shortcut = self._shortcut
        assert shortcut is not None, "the study was checked to have one"
        pooled_NPGH = pooled_hidden(self.model.some(rows), batch, shortcut.layer)
        z_NPG: Tensor = (pooled_NPGH @ shortcut.direction.to(pooled_NPGH) - shortcut.middle) / shortcut.spread
        return z_NPG

    def _modified(self, rewards_NPG: Tensor, z_NPG: Tensor, rows: Tensor) -> Tensor:
        """Return the rewards after advantage modification, see :class:`assay_research.arms.Shortcut`."""
        alphas = [self.runs[row].how.advantage for row in rows.tolist()]
        return torch.stack([Shortcut.modify(rewards_NPG[n], z_NPG[n], alpha) for n, alpha in enumerate(alphas)])

    def _gradients(self, rollouts: Rollouts, rewards_RPG: Tensor, found: dict[str, Tensor]) -> list[Tensor]:
        """Return the gradients of all rollouts, stored ones included; these add cin of both sources."""
        rows, batch = self._taught, rollouts.batch
        advantages_RPG = advantages(rewards_RPG)
        if len(rows):
            teacher = self._teachers(rollouts)
            with torch.no_grad():
                logp_NP = token_logprobs(self.model.some(rows), teacher).sum(dim=-1)[..., 0]
            found["logp_stored"] = self._spread(logp_NP.mean(dim=1), rows)
            joined_NPG = torch.cat((rewards_RPG[rows], self._pays(teacher)), dim=-1)
            # The loss is a mean over all rollouts of a run, of which there are more with the stored ones.
            share = self.settings.rollouts / (self.settings.rollouts + 1)
            joined_NPG = advantages(joined_NPG) * share
            advantages_RPG[rows] = joined_NPG[..., :-1]
        own = policy_gradient(self.model, batch, advantages_RPG)
        if not len(rows):
            return own
        stored = policy_gradient(
            self.model.some(rows), teacher, joined_NPG[..., -1:], divisor=self.settings.prompts * self.settings.rollouts
        )
        whole = [
            torch.zeros_like(gradient).index_copy_(0, rows, part) for gradient, part in zip(own, stored, strict=True)
        ]
        for suffix, gradients in (("_s", own), ("_t", whole)):
            shares = self.optimizer.measure_shares("cin", gradients)
            for name in ("cin", "cin_two_sided"):
                found[name + suffix] = self._spread(shares[name][rows], rows)
        return [a + b for a, b in zip(own, whole, strict=True)]

    def _pays(self, stored: Batch) -> Tensor:
        """Return what every run with stored rollouts pays for them, [N, P, 1]."""
        rows = self._taught.tolist()
        pays_N = torch.tensor([self.runs[row].how.reward(0.0, 1.0) for row in rows], device=self.model.device)
        pays_NPG = pays_N[:, None, None].expand(stored.tokens.shape[:3]).clone()
        changed = [n for n, row in enumerate(rows) if self.runs[row].how.advantage > 0]
        if changed:
            some = torch.tensor(changed, device=self.model.device)
            z_NPG = self._distances(stored.of_runs(some), self._taught[some])
            pays_NPG[some] = self._modified(pays_NPG[some], z_NPG, self._taught[some])
        return pays_NPG

    def _rows(self, chosen: Sequence[bool]) -> Tensor:
        return torch.tensor(chosen, device=self.model.device).nonzero().flatten()

    def _spread(self, values_N: Tensor, rows: Tensor) -> Tensor:
        """Return values of some runs among NaN for the others, which the log leaves out."""
        return values_N.new_full((len(self.runs),), torch.nan).index_copy_(0, rows, values_N)

    def _teachers(self, rollouts: Rollouts) -> Batch:
        """Return the exploit of every episode as a stored rollout."""
        batch, rows = rollouts.batch.of_runs(self._taught), self._taught.tolist()
        each = [self._padded([[self.pool.exploit(episode)] for episode in rollouts.episodes[row]]) for row in rows]
        return replace(batch, tokens=torch.cat(each).to(self.model.device)).trimmed()

    def _prompts(self, episodes: Sequence[Sequence[Episode]]) -> tuple[Tensor, Tensor]:
        ids = torch.zeros(len(self.runs), self.settings.prompts, self.settings.prompt_tokens, dtype=torch.int64)
        lengths = torch.zeros(ids.shape[:2], dtype=torch.int64)
        for r, of_run in enumerate(episodes):
            for p, episode in enumerate(of_run):
                row = self.pool.prompt(episode)[:-1]
                ids[r, p, : len(row)] = torch.tensor(row)
                lengths[r, p] = len(row)
        return ids.to(self.model.device), lengths.to(self.model.device)

    def _uniform(self, draw: str) -> Tensor:
        shape = (self.settings.new_tokens, self.settings.prompts, self.settings.rollouts)
        drawn = {}
        for seed in {run.seed for run in self.runs}:
            digest = hashlib.sha256(f"{draw} {seed}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
            drawn[seed] = torch.rand(shape, generator=generator)
        return torch.stack([drawn[run.seed] for run in self.runs], dim=1).to(self.model.device)


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
        self.pool = TaskPool(settings, model.tokenizer)
        self.logs = {run.name: RunLog.begin(run, settings, about or {}) for run in runs}
        self.cohorts = [
            Cohort(part, model, svd, bases, self.pool, settings, dtype, shortcut)
            for part in _parted(runs, most, fewest)
        ]

    def run(self, grader: Grader) -> None:
        """Train all runs to their last step.

        Args:
            grader: Grader of the programs.
        """
        waiting = [self._write(cohort, grader) for cohort in self.cohorts]
        while self.step < self.settings.steps:
            self.step += 1
            for index, cohort in enumerate(self.cohorts):
                self._log(cohort, cohort.learn(waiting[index], grader.collect(waiting[index].pending)))
                if self.step < self.settings.steps:
                    waiting[index] = self._write(cohort, grader)

    def evaluate(self, grader: Grader) -> None:
        """Let all runs work on the held-out tasks, with each kind of markers in turn, and log what they do.

        Beside the rates there are the mean log-probabilities of the exploit and of
        the honest program, which tell of a hack before it is sampled.
        """
        p = self.settings.prompts
        for markers, divisor in _MARKERS.items():
            episodes = self.pool.held_out(markers)
            episodes = episodes[: -(-len(episodes) // divisor)]
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

    def _write(self, cohort: Cohort, grader: Grader) -> Rollouts:
        episodes = [self.pool.drawn(run, self.step) for run in cohort.runs]
        return cohort.write(grader, episodes, f"step {self.step}")

    def _log(self, cohort: Cohort, values: Mapping[str, torch.Tensor]) -> None:
        table = torch.stack([value.double() for value in values.values()]).tolist()
        for r, run in enumerate(cohort.runs):
            row = {name: column[r] for name, column in zip(values, table, strict=True) if not math.isnan(column[r])}
            self.logs[run.name].add_step(self.step - 1, row, self.settings.log_every)

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
