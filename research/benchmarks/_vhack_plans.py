"""Which runs are made: of the first experiment (``full``), of the pilot, and of the second experiment (``second``)."""

from dataclasses import replace

from assay.research.study import StudyRun
from assay.vhack.environment import CHANNELS

MAIN = (
    StudyRun("none", 0),
    StudyRun("no-loophole", 0),
    StudyRun("erase-gradient", 0),
    StudyRun("erase-update", 0),
    StudyRun("erase-gradient", 0, basis="random"),
    StudyRun("box", 0),
    StudyRun("advantage-modification", 0),
    StudyRun("erase-gradient-two-sided", 0),
    StudyRun("erase-update-two-sided", 0),
    *(StudyRun(arm, 0, "sgd") for arm in ("none", "no-loophole", "erase-gradient", "erase-update")),
)
CONTROLS = (
    StudyRun("constant-push", 0),
    StudyRun("ground-truth-penalty", 0),
    *(StudyRun("erase-gradient", 0, basis=kind) for kind in ("svd", "shuffled", "clean-clean", "generated")),
    *(StudyRun(arm, 0, teachers=1) for arm in ("none", "erase-gradient")),
)
SINGLE = tuple(
    StudyRun(arm, 0, basis=basis, modes=(mode,))
    for mode in CHANNELS
    for arm, basis in (("none", "true"), ("erase-gradient", "true"), ("erase-gradient", f"minimal:{mode}"))
)
PLAIN = tuple(StudyRun(arm, 0, kind) for kind in ("adam", "sgd") for arm in ("none", "no-loophole"))
HELD = "erase-update-two-sided"
BOUNDS = (
    StudyRun("erase-gradient", 0, basis="whole"),
    *(StudyRun(f"erase-gradient+away-{away}", 0, basis="whole") for away in (0.1, 0.2, 0.4)),
    StudyRun("box", 0, basis="whole"),
)
DISPLACED = (
    *(StudyRun(f"displaced-{far}+{HELD}", 0, basis="whole") for far in (0.1, 0.2, 0.4)),
    *(StudyRun(HELD, 0, basis=basis) for basis in ("whole", "whole:20")),
)
OTHERS = (
    StudyRun("erase-gradient+away-0.2", 0, "sgd", basis="whole"),
    StudyRun(f"displaced-0.2+{HELD}", 0, "sgd", basis="whole"),
    StudyRun("erase-gradient+away-0.2", 0),
    StudyRun("erase-gradient+away-0.2", 0, basis="whole:20"),
    StudyRun("advantage-modification", 0),
)
CANDIDATES = (
    *(StudyRun(f"displaced-{far}+{HELD}", 0, basis="whole") for far in (0.4, 0.5)),
    StudyRun(f"displaced-0.3+{HELD}", 0, basis="whole:10"),
    *(StudyRun(f"displaced-{far}+{HELD}", 0, basis="whole:20") for far in (0.15, 0.2)),
    StudyRun("erase-gradient+away-0.2", 0, basis="whole:20"),
)
DISPLACED_AND_HELD = f"displaced-0.4+{HELD}"
SECOND = (
    *MAIN[:7],
    StudyRun(DISPLACED_AND_HELD, 0, basis="whole"),
    StudyRun("erase-gradient+away-0.2", 0, basis="whole:20"),
)
SECOND_FEWER = (
    *MAIN[9:],
    StudyRun(DISPLACED_AND_HELD, 0, "sgd", basis="whole"),
    StudyRun(HELD, 0, basis="whole"),
    StudyRun("displaced-0.4+none", 0, basis="whole"),
    StudyRun(DISPLACED_AND_HELD, 0, basis="random"),
    StudyRun(DISPLACED_AND_HELD, 0),
    StudyRun("erase-gradient", 0, basis="whole"),
    *(StudyRun(DISPLACED_AND_HELD, 0, basis=f"whole:{mode}") for mode in CHANNELS),
    *(StudyRun("none", 0, basis=basis, teachers=1) for basis in ("true", "whole")),
)
"""Of the second experiment, with fewer seeds: the second optimiser, parts of the repair, the repair without one
mechanism, and stored rollouts."""
DRAWN = ("random", "shuffled", "clean-clean")
"""Axes that are drawn anew for every seed."""


def seeded(runs, seeds):
    """Repeat the runs for every seed, those of one seed in a row."""
    return [
        replace(run, seed=s, basis=f"{run.basis}@{s}" if run.basis in DRAWN else run.basis)
        for s in seeds
        for run in runs
    ]


def full(seeds, fewer):
    """The arms, controls, a second optimiser, stored rollouts, and one loophole at a time."""
    return seeded((*MAIN, *CONTROLS, *SINGLE), seeds[:fewer]) + seeded(MAIN, seeds[fewer:])


def second(seeds, fewer):
    """The second experiment; what is in it is said above."""
    return seeded((*SECOND, *SECOND_FEWER), seeds[:fewer]) + seeded(SECOND, seeds[fewer:])


PLANS = {
    "full": full,
    "second": second,
    "plain": lambda seeds, _: seeded(PLAIN, seeds),
    "bounds": lambda seeds, _: seeded(BOUNDS, seeds),
    "displaced": lambda seeds, _: seeded(DISPLACED, seeds),
    "candidates": lambda seeds, _: seeded(CANDIDATES, seeds),
    "others": lambda seeds, _: seeded(OTHERS, seeds),
}
