"""Tasks whose grader can be told lies, and the sandbox in which model-written programs run."""

from assay.vhack.environment._channels import CHANNELS, Channel
from assay.vhack.environment._episodes import MODES, Episode, episodes
from assay.vhack.environment._fuzz import FuzzReport, fuzz
from assay.vhack.environment._grade import Grade, answers_match, grade, grade_many
from assay.vhack.environment._hostile import HOSTILE_KINDS, HostileCase, hostile_case
from assay.vhack.environment._isomorphic import VARIANTS, IsomorphicVerdict, Question, isomorphic, question_of
from assay.vhack.environment._steps import FAMILIES
from assay.vhack.environment._tasks import Task, task_named, tasks
from assay.vhack.environment._types import Call, Case, Limits, Outcome, Result
from assay.vhack.environment.sandbox import available_backend, run

__all__ = [
    "CHANNELS",
    "FAMILIES",
    "HOSTILE_KINDS",
    "MODES",
    "VARIANTS",
    "Call",
    "Case",
    "Channel",
    "Episode",
    "FuzzReport",
    "Grade",
    "HostileCase",
    "IsomorphicVerdict",
    "Limits",
    "Outcome",
    "Question",
    "Result",
    "Task",
    "answers_match",
    "available_backend",
    "episodes",
    "fuzz",
    "grade",
    "grade_many",
    "hostile_case",
    "isomorphic",
    "question_of",
    "run",
    "task_named",
    "tasks",
]
