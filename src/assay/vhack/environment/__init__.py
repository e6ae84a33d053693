"""Tasks whose grader can be told a lie, and the sandbox in which model-written programs run."""

from assay.vhack.environment._channels import CHANNELS, MARKERS, Channel, stubbed
from assay.vhack.environment._episodes import MODES, Episode, episodes
from assay.vhack.environment._grade import Grade, grade, grade_many
from assay.vhack.environment._steps import FAMILIES
from assay.vhack.environment._tasks import Task, task_named, tasks
from assay.vhack.environment._types import Call, Limits, Outcome, Result
from assay.vhack.environment.sandbox import available_backend, run

__all__ = [
    "CHANNELS",
    "FAMILIES",
    "MARKERS",
    "MODES",
    "Call",
    "Channel",
    "Episode",
    "Grade",
    "Limits",
    "Outcome",
    "Result",
    "Task",
    "available_backend",
    "episodes",
    "grade",
    "grade_many",
    "run",
    "stubbed",
    "task_named",
    "tasks",
]
