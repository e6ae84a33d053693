"""The third experiment: its parts, in the order of their importance. The plan is research/notes/experiment-3.md.

A part is an organism, settings and conditions; a *cell* is a part with one seed. Runs of one seed stay together,
because arms are compared seed by seed.
"""

from dataclasses import dataclass, replace

from assay_research.study.plan import StudyRun, StudySettings

from assay.vhack.environment.grading import CHANNELS

SHORT = ("arithmetic", "branches", "digits", "counts")
MORE = (*SHORT, "lists", "totals", "strings")
"""Families of the larger organisms, whose prompts are longer."""

FIRST_SEED = 300
DISTANCE, BOUND = 0.4, 0.2
AWAY = f"erase-gradient+away-{BOUND}"
DISPLACED = f"displaced-{DISTANCE}+none"
HELD = f"displaced-{DISTANCE}+erase-update-two-sided"
GATED = f"displaced-{DISTANCE}+erase-gradient+away-{DISTANCE + BOUND:g}"
"""Displaced, then the one-sided gate, which may go no farther away than the bound beyond where it began."""

REFERENCES = (StudyRun("none", 0, basis="whole"), StudyRun("no-loophole", 0, basis="whole"))
MAIN = (
    *REFERENCES,
    StudyRun(DISPLACED, 0, basis="whole"),
    StudyRun(HELD, 0, basis="whole"),
    StudyRun(GATED, 0, basis="whole"),
    StudyRun("none", 0, basis="whole", start="dpo"),
)
"""In every size and regime: what the hypotheses are about."""
OTHERS = (
    StudyRun("none", 0, basis="whole", start="unlikelihood"),
    StudyRun(AWAY, 0, basis="whole:20"),
    StudyRun("erase-update-two-sided", 0, basis="whole"),
    StudyRun("advantage-modification", 0, basis="whole"),
    StudyRun("ground-truth-penalty", 0, basis="whole"),
    StudyRun(HELD, 0, basis="random"),
    StudyRun(HELD, 0, basis="shuffled"),
)
ORIGINS = tuple(StudyRun(HELD, 0, basis=kind) for kind in ("written", "generated", "sampled"))
MECHANISMS = tuple(StudyRun(HELD, 0, basis=f"whole:{mode}") for mode in CHANNELS)
DRAWN = ("random", "shuffled")
"""Axes that are drawn anew for every seed."""


def kept_sampled(runs, **how):
    """Return the same runs with the exploit brought back by some means."""
    return tuple(replace(run, **how) for run in runs)


@dataclass(frozen=True)
class Part:
    """One part of the plan.

    Attributes:
        size: Name of the organism's size.
        runs: Conditions, as runs of seed 0.
        seeds: Number of seeds.
        settings: Settings of the study.
        most: Largest number of runs side by side on one GPU.
        late, apart: Evaluations whose mean the rates at the end are, and the steps between them.
        between: Evaluations before those, at equal distances.
        pairs: Number of whole pairs.
    """

    size: str
    runs: tuple[StudyRun, ...]
    seeds: int
    settings: StudySettings
    most: int = 60
    late: int = 5
    apart: int = 10
    between: int = 4
    pairs: int = 48

    @property
    def evaluations(self):
        """Steps after which the runs are evaluated; 0 is before the first."""
        steps = self.settings.steps
        late = {steps - index * self.apart for index in range(self.late)}
        return sorted({0, *late, *(round(steps * (i + 1) / (self.between + 1)) for i in range(self.between))})

    def cell(self, seed, which="all"):
        """The runs of one seed: all of them, the arms of the hypotheses (``main``), or the others."""
        main = {(run.arm, run.basis, run.start) for run in MAIN}
        return [
            replace(run, seed=seed, basis=f"{run.basis}@{seed}" if run.basis in DRAWN else run.basis)
            for run in self.runs
            if which == "all" or ((run.arm, run.basis, run.start) in main) == (which == "main")
        ]


SMALL = StudySettings(
    steps=250, adam_rate=0.015, prompt_tokens=176, families=SHORT, difficulty=(2, 4), log_every=5, evaluation=8
)
MIDDLE = replace(SMALL, steps=160, adam_rate=0.01, prompt_tokens=224, new_tokens=144, families=MORE, difficulty=(2, 5))
LARGE = replace(MIDDLE, steps=125, adam_rate=0.0075, prompts=8)
ON_CPU = replace(SMALL, steps=24, prompts=2, rollouts=6, new_tokens=96, pool=1024, evaluation=2, log_every=1)
TINY = replace(SMALL, steps=6, prompts=1, rollouts=2, new_tokens=16, pool=16, evaluation=1, log_every=1)

STORED = {"stored": "whole"}
PARTS = {
    "stored": Part("7m", kept_sampled((*MAIN, *OTHERS), **STORED), 8, SMALL),
    "stored-30m": Part("30m", kept_sampled(MAIN, **STORED), 5, MIDDLE, 30, between=3),
    "stored-120m": Part("120m", kept_sampled(MAIN, **STORED), 5, LARGE, 15, between=2),
    "unsampled": Part("7m", MAIN, 5, SMALL),
    "hot": Part("7m", kept_sampled(MAIN, temperature=1.3), 5, SMALL),
    "partial": Part("7m", kept_sampled(MAIN, stored="partial"), 5, SMALL),
    "unsampled-30m": Part("30m", MAIN, 5, MIDDLE, 30, between=3),
    "unsampled-120m": Part("120m", MAIN, 5, LARGE, 15, between=2),
    "entropy": Part("7m", kept_sampled(MAIN, entropy=0.01), 5, SMALL),
    "origins": Part("7m", kept_sampled(ORIGINS, **STORED), 5, SMALL),
    "mechanisms": Part("7m", kept_sampled(MECHANISMS, **STORED), 5, SMALL),
    "cpu": Part("7m", kept_sampled((*REFERENCES, *MAIN[2:4], MAIN[5]), **STORED), 5, ON_CPU, 5, 2, 4, 0),
    "check": Part("7m", kept_sampled((*REFERENCES, *MAIN[3:4], MAIN[5]), **STORED), 2, TINY, 8, 2, 2, 0, 12),
}
"""All parts; ``cpu`` is made on two cores, and ``check`` only tries the pipe."""
