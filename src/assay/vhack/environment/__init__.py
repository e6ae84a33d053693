"""Tasks with loopholes in their graders, and the sandbox for programs that models write."""

from assay.vhack.environment.grading import Channel, Episode, Grade, episodes, grade
from assay.vhack.environment.runs import Call, Limits, Outcome, Result
from assay.vhack.environment.sandbox import run
from assay.vhack.environment.tasks import Task, tasks

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
