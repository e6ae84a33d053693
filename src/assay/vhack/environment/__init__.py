"""Tasks whose grader can be told lies, and the sandbox in which model-written programs run."""

from assay.vhack.environment.channels import Channel
from assay.vhack.environment.episodes import Episode, episodes
from assay.vhack.environment.grade import Grade, grade
from assay.vhack.environment.sandbox import run
from assay.vhack.environment.tasks import Task, tasks
from assay.vhack.environment.types import Call, Limits, Outcome, Result

__all__ = [
    "Call",
    "Channel",
    "Episode",
    "Grade",
    "Limits",
    "Outcome",
    "Result",
    "Task",
    "episodes",
    "grade",
    "run",
    "tasks",
]
