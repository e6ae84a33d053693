"""Arms of a study: those of :data:`assay.vhack.training.ARMS`, from another start or with a bound.

``displaced-A+ARM`` moves δS by A along every axis, away from the hack, before the first step, and goes on as the arm.
With ``erase-update-two-sided`` it stays there: all learning is orthogonal to the axes. ``ARM+away-B`` bounds how far
the arm may move away from the hack along each axis, counted from the weights of the model: a counter-force with an end.
"""

from dataclasses import replace

from assay.errors import UsageError
from assay.vhack.training._arms import Arm, arm_named
from assay.vhack.training._gates import Box

__all__ = ["displaced", "study_arm"]

_START, _AWAY = "displaced-", "+away-"


def study_arm(name: str) -> Arm:
    """The arm of this name.

    Raises:
        UsageError: there is no such arm, or a distance is no positive number.
    """
    displaced(name)
    rest = name.partition("+")[2] if name.startswith(_START) else name
    base, bounded, away = rest.partition(_AWAY)
    box = Box(hackward=0.0, away=_distance(name, away)) if bounded else arm_named(base).box
    return replace(arm_named(base), name=name, box=box)


def displaced(name: str) -> float:
    """How far along its axes an arm of this name starts, 0 for most.

    Raises:
        UsageError: the distance is no positive number.
    """
    if not name.startswith(_START):
        return 0.0
    return _distance(name, name.removeprefix(_START).partition("+")[0])


def _distance(name: str, text: str) -> float:
    try:
        found = float(text)
    except ValueError:
        found = 0.0
    if not 0 < found < float("inf"):
        raise UsageError(f"arm {name!r}", wanted="a distance such as 0.3", do="give a positive number")
    return found
