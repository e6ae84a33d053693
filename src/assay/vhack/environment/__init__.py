"""Tasks whose grader can be told lies, and the sandbox in which model-written programs run."""

from assay.vhack.environment._channels import CHANNELS, Channel
from assay.vhack.environment._episodes import MODES, Episode, episodes
from assay.vhack.environment._grade import Grade, answers_match, grade, grade_many
from assay.vhack.environment._steps import FAMILIES
from assay.vhack.environment._tasks import Task, task_named, tasks
from assay.vhack.environment._types import Call, Case, Limits, Outcome, Result
from assay.vhack.environment.sandbox import available_backend, run

__all__ = [
    "CHANNELS",
    "FAMILIES",
    "MODES",
    "Call",
    "Case",
    "Channel",
    "Episode",
    "Grade",
    "Limits",
    "Outcome",
    "Result",
    "Task",
    "answers_match",
    "available_backend",
    "episodes",
    "grade",
    "grade_many",
    "run",
    "task_named",
    "tasks",
]
