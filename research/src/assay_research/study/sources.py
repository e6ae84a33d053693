"""Whether stored rollouts have gradients further along the axes than the policy's own, by the log
of a run.

It is check 4 of :mod:`assay.vhack.directions.checks` with both sources measured in the same step,
as the original proposal has it.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from assay.errors import UsageError
from assay.vhack.directions.checks import CheckSettings
from assay.vhack.directions.checks.check_report import (
    SWAPPED,
    Check,
    bootstrap,
    judge,
    rule_of,
    undecided_check,
)
from assay.vhack.directions.checks.folds import draw_swaps

_FEWEST_BLOCKS = 6


def check_source_log(
    lines: Iterable[Mapping[str, Any]],
    settings: CheckSettings | None = None,
    *,
    steps: tuple[int, int] | None = None,
) -> Check:
    """Return check 4 of the source lines of a log: cin of the teacher minus cin of the student,
    step by step.

    Neighbouring steps resemble each other, so blocks of steps take the place of groups: as many
    blocks as the square root of the number of steps, at least 6. The difference is expected early
    in training, so ``steps`` may be the first and the last one to use.

    Raises:
        UsageError: No step has both sources.
    """
    settings = settings or CheckSettings()
    cin = {(line["source"], line["step"]): line["cin"] for line in lines}
    hack, clean = (
        {step: value for (of, step), value in cin.items() if of == name}
        for name in ("teacher", "student")
    )
    first, last = steps or (0, max(hack, default=0))
    steps_of_both = sorted(step for step in hack.keys() & clean.keys() if first <= step <= last)
    if not steps_of_both:
        raise UsageError(
            "no step with both teacher and student",
            wanted="both sources in a step",
            do="take another log",
        )
    statistic = f"cin of teacher minus cin of student, mean over {len(steps_of_both)} steps"
    rule = rule_of("sources", [SWAPPED], settings).replace("whole groups", "blocks of steps")
    if len(steps_of_both) < _FEWEST_BLOCKS:
        return undecided_check(
            "sources",
            statistic,
            rule,
            f"{len(steps_of_both)} steps, and {_FEWEST_BLOCKS} are needed",
        )
    count = max(_FEWEST_BLOCKS, round(len(steps_of_both) ** 0.5))
    blocks = [str(index * count // len(steps_of_both)) for index in range(len(steps_of_both))]
    differences_T = np.array([hack[step] - clean[step] for step in steps_of_both])
    signs_BT = draw_swaps(
        blocks, settings.n_flips, np.random.default_rng([settings.seed, 5])
    ).numpy()
    check = judge(
        "sources",
        statistic,
        bootstrap(np.mean, [differences_T], [blocks], settings),
        {SWAPPED: (signs_BT[1:] * differences_T).mean(axis=1).tolist()},
        settings,
        0.5**count,
        details={"steps": steps_of_both},
    )
    return replace(check, rule=rule)
