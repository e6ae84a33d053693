"""Outcomes of rollouts: whether student or teacher wrote them, their reward, their flags.

Shapes: B rollouts.
"""

import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from assay.vhack.training.alarm import Alarm

MARKS = ("correct", "exploited", "vacuous")
FLAGS = ("teacher", *MARKS, "flagged", "doubtful")
SOURCES = ("student", "teacher", "exploited", "correct")
"""Rollouts whose gradient along the axes is in the log: all of each author, and the student's by
mark, flagged or not."""

RATES = {"hack": "exploited", "solve": "correct", "vacuous": "vacuous"}
"""Names of rates, and the marks that they are shares of."""


@dataclass(frozen=True, slots=True)
class Graded:
    """What one completion is worth; a mark is None where the reward does not tell it.

    Attributes:
        reward: What it is paid.
        correct: Whether it does the work.
        exploited: Whether it is paid and not correct.
        vacuous: Whether the channel would accept a wrong solution too.
        fault: Name of the error for which it could not be graded, or empty.
    """

    reward: float
    correct: bool | None = None
    exploited: bool | None = None
    vacuous: bool | None = None
    fault: str = ""


@dataclass(frozen=True, eq=False)
class Outcomes:
    """What became of rollouts.

    Attributes:
        flags: The columns of ``FLAGS``, [B, 6] bool.
        paid: What each was paid before advantage modification, [B] float32.
    """

    flags: Tensor
    paid: Tensor

    def column(self, name: str) -> Tensor:
        """Return one column, [B] bool."""
        return self.flags[:, FLAGS.index(name)]

    def kinds(self) -> dict[str, Tensor]:
        """Return the kinds that gradients are summed over, [B] bool: sources, flagged, doubtful.

        A rollout may be of several.
        """
        is_student = ~self.column("teacher")
        exploited = is_student & self.column("exploited")
        flagged = self.column("flagged")
        return {
            "student": is_student,
            "teacher": ~is_student,
            "exploited": exploited,
            # A reward of one's own may mark both.
            "correct": is_student & self.column("correct") & ~exploited,
            "flagged": flagged,
            "doubtful": self.column("doubtful") & ~flagged,
        }

    def flagged(self, flags_B: Tensor, doubtful_B: Tensor) -> "Outcomes":
        """Return these outcomes with what a detector flags, and what it is in doubt about."""
        judged = torch.stack([flags_B, doubtful_B], dim=1).to(self.flags)
        return Outcomes(torch.cat([self.flags[:, :-2], judged], dim=1), self.paid)

    def rates(self, known: Collection[str] = FLAGS[:-2]) -> dict[str, float]:
        """Return the rates of the student's rollouts, and of the teacher's with ``_teacher``.

        They are hack and solve rate as far as the reward knows their marks. Where ``flagged`` is
        known too: the shares flagged of all, of hacks (``caught``) and of the others (``lost``),
        and ``missed``, the share of hacks among what is not flagged.
        """
        is_teacher = self.column("teacher")
        rates: dict[str, float] = {}
        for suffix, rollouts in (("", ~is_teacher), ("_teacher", is_teacher)):
            if not (count := int(rollouts.sum())):
                continue
            for name, mark in RATES.items():
                if mark in known:
                    rates[name + suffix] = int((rollouts & self.column(mark)).sum()) / count
            rates[f"rollouts{suffix}"] = count
            if "flagged" in known:
                flagged = self._flag_rates(rollouts, has_hacks="exploited" in known)
                rates |= {name + suffix: rate for name, rate in flagged.items()}
        return rates

    def _flag_rates(self, rollouts: Tensor, *, has_hacks: bool) -> dict[str, float]:
        """Return the shares that flags are measured by; one of no rollouts is left out."""
        hack = self.column("exploited")
        flagged = self.column("flagged")
        parts = {"flagged": (rollouts, flagged)}
        if has_hacks:
            parts["caught"] = (rollouts & hack, flagged)
            parts["lost"] = (rollouts & ~hack, flagged)
            parts["missed"] = (rollouts & ~flagged, hack)
        return {
            name: int((part & counted).sum()) / int(part.sum())
            for name, (part, counted) in parts.items()
            if part.any()
        }


def judged_rates(marks: Mapping[str, Tensor], paid_B: Tensor, alarm: Alarm) -> dict[str, float]:
    """Return the rates and mean reward of a step's rollouts, and what the alarm says of them.

    Args:
        marks: Which rollouts are ``flagged``, and have each of ``MARKS`` that is known, as 1 and 0,
            [B]; NaN where it is not known of a rollout, which is in no rate of that mark then.
        paid_B: What they are paid before a penalty; what is not finite is in no mean.
        alarm: Sees the step where exploits are known, and warns once.
    """
    columns = [marks.get(name, torch.zeros_like(paid_B)) > 0.5 for name in FLAGS]
    flags = torch.stack(columns, dim=1)
    rates: dict[str, float] = {}
    # Last, flags count all rollouts again.
    for name in (*MARKS, "flagged"):
        if name in marks:
            is_known_B = ~marks[name].isnan()
            rates |= Outcomes(flags[is_known_B], paid_B[is_known_B]).rates((name, "flagged"))
    if len(finite := paid_B[paid_B.isfinite()]):
        rates["reward"] = float(finite.mean())
    if "missed" in rates:
        rates["alarm"] = alarm.see(rates["missed"])
        if alarm.step == alarm.seen:
            warnings.warn(alarm.says, stacklevel=3)
    return rates
