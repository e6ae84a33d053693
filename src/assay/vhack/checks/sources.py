"""Check 4: during training, is the gradient of cheating samples further along the axes than that of the others?

cin here is that of a whole batch: the components and the length of the *summed* gradient of one source. Without a
training log, the two sides of a held-out group are two batches, as if from a teacher that cheats and a student that
does not. With a log, both are measured in the same step.

A log is JSON Lines. A line with a ``source`` field is one measurement, other lines are passed over::

    {"step": 12, "source": "teacher", "cin": 0.31, "modules": {"model.layers.0.mlp.up_proj": 0.28}}

``step`` is a whole number from 0, ``source`` a name, ``cin`` the mean over modules, a share; ``modules`` may be left
out.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from assay.errors import DataError, UsageError
from assay.files.jsonl import read_jsonl
from assay.vhack.checks.folds import Design, swaps
from assay.vhack.checks.judge import SWAPPED, Check, CheckSettings, FloatArray, judge, measure, swap_rule, undecided

_TITLE = "cin by source"
_FEWEST_BLOCKS = 6


@dataclass(frozen=True, slots=True)
class SourceCin:
    """Share along the axes of the gradient of one source in one step.

    Attributes:
        step: Number of the step, counted from 0.
        source: Name of the source, such as ``student`` or ``teacher``.
        cin: Mean of cin over modules, 0 to 1.
        modules: Values of cin by module name.
    """

    step: int
    source: str
    cin: float
    modules: dict[str, float] = field(default_factory=dict)


def read_source_log(path: str | Path) -> list[SourceCin]:
    """Return the measurements in a training log; lines without ``source`` are passed over.

    Raises:
        DataError: The file cannot be read, it has no measurement, or one is malformed or given twice; the message
            names the line.
    """
    found: dict[tuple[int, str], SourceCin] = {}
    for number, record in read_jsonl(path):
        if "source" not in record:
            continue
        try:
            modules = record.get("modules", {})
            entry = SourceCin(record["step"], record["source"], record["cin"], modules)
            if not (isinstance(modules, dict) and _well_formed(entry)):
                raise ValueError("step, source or cin is not what it should be")
            if (entry.step, entry.source) in found:
                raise ValueError(f"source {entry.source} twice in step {entry.step}")
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(
                f"{path}, line {number}: {f'no {error}' if isinstance(error, KeyError) else error}",
                wanted='{"step": 0, "source": "teacher", "cin": 0.2}, each source once a step, cin in [0, 1]',
                do="correct the line",
            ) from None
        found[entry.step, entry.source] = entry
    if not found:
        raise DataError(
            f"{path}: no line with a source",
            wanted="a log of `assay vhack train --teacher`, which measures cin of its sources",
            do="check the path, or leave --log out",
        )
    return list(found.values())


def _well_formed(entry: SourceCin) -> bool:
    counted = isinstance(entry.step, int) and not isinstance(entry.step, bool) and entry.step >= 0
    values = [entry.cin, *entry.modules.values()]
    numbers = all(isinstance(v, int | float) and not isinstance(v, bool) and 0 <= v <= 1.000001 for v in values)
    return counted and isinstance(entry.source, str) and bool(entry.source) and numbers


def check_sources(design: Design) -> Check:
    """Return check 4 with the sides of every held-out group as two batches."""
    geometry, settings = design.geometry, design.settings
    signs_BN = swaps(design.groups, settings.n_flips, np.random.default_rng([settings.seed, 4]))
    hack, clean = {}, {}
    for fold in design.folds:
        for group in dict.fromkeys(design.groups[index] for index in fold.test.tolist()):
            inside = [design.groups[index] == group for index in fold.test.tolist()]
            pairs = fold.test[torch.tensor(inside)]
            weights_S2 = torch.zeros(2 * geometry.n, 2, dtype=torch.float64)
            weights_S2[pairs, 0] = 1.0
            weights_S2[pairs + geometry.n, 1] = 1.0
            along_MK2, lengths_M2 = geometry.batch(fold.along, weights_S2)
            first_B, second_B = fold.cin(along_MK2, lengths_M2, signs_BN).unbind(dim=1)
            swapped_B = signs_BN[:, pairs[0]] < 0
            hack[group] = torch.where(swapped_B, second_B, first_B).numpy()
            clean[group] = torch.where(swapped_B, first_B, second_B).numpy()
    hack_BG, clean_BG = (np.column_stack(list(side.values())) for side in (hack, clean))
    differences_BG = hack_BG - clean_BG
    return judge(
        name="sources",
        title=_TITLE,
        statistic="cin of the summed hack gradient of a group minus that of its clean gradient, mean over groups",
        rule=swap_rule(settings, "the difference", 0.0),
        measured=measure(_mean, [differences_BG[0]], [list(hack)], settings),
        nulls={SWAPPED: differences_BG[1:].mean(axis=1).tolist()},
        above=0.0,
        settings=settings,
        smallest_p=design.smallest_p,
        details={
            "mean_cin_hack": float(hack_BG[0].mean()),
            "mean_cin_clean": float(clean_BG[0].mean()),
            "ratio": float(hack_BG[0].mean() / clean_BG[0].mean()) if clean_BG[0].any() else None,
            "groups": list(hack),
            "cin_hack": hack_BG[0].tolist(),
            "cin_clean": clean_BG[0].tolist(),
        },
    )


def _mean(values: FloatArray) -> float:
    return float(np.mean(values))


def check_source_log(
    entries: Sequence[SourceCin],
    settings: CheckSettings | None = None,
    *,
    hack: str = "teacher",
    clean: str = "student",
    steps: tuple[int, int] | None = None,
) -> Check:
    """Return check 4 of a training log: cin of ``hack`` minus cin of ``clean``, step by step.

    Neighbouring steps resemble each other, so blocks of steps take the place of groups: as many blocks as the square
    root of the number of steps, at least 6.

    Args:
        entries: Measurements from `read_source_log`.
        settings: Number of draws, and alpha.
        hack: Name of the source that cheats.
        clean: Name of the source that does not cheat (yet).
        steps: First and last step to use, by default all; the difference is expected early in training.

    Raises:
        UsageError: No step has both sources.
    """
    settings = settings or CheckSettings()
    cin = {(entry.step, entry.source): entry.cin for entry in entries}
    first, last = steps or (0, max((entry.step for entry in entries), default=0))
    both = sorted(s for s, source in cin if source == hack and (s, clean) in cin and first <= s <= last)
    if not both:
        raise UsageError(
            f"no step with both {hack} and {clean}",
            wanted="both sources in a step",
            do="name the sources, or pass another --log",
        )
    statistic = f"cin of {hack} minus cin of {clean}, mean over {len(both)} steps"
    rule = swap_rule(settings, "the difference", 0.0, "blocks of steps")
    if len(both) < _FEWEST_BLOCKS:
        reason = f"{len(both)} steps, and {_FEWEST_BLOCKS} are needed"
        return undecided("sources", _TITLE, statistic, rule, reason)
    count = max(_FEWEST_BLOCKS, round(len(both) ** 0.5))
    blocks = [str(index * count // len(both)) for index in range(len(both))]
    differences_T = np.array([cin[step, hack] - cin[step, clean] for step in both])
    signs_BT = swaps(blocks, settings.n_flips, np.random.default_rng([settings.seed, 5])).numpy()
    return judge(
        name="sources",
        title=_TITLE,
        statistic=statistic,
        rule=rule,
        measured=measure(_mean, [differences_T], [blocks], settings),
        nulls={SWAPPED: (signs_BT[1:] * differences_T).mean(axis=1).tolist()},
        above=0.0,
        settings=settings,
        smallest_p=0.5**count,
        details={"steps": both, "cin_hack": [cin[s, hack] for s in both], "cin_clean": [cin[s, clean] for s in both]},
    )
