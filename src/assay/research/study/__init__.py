"""Many training runs at once: arms, seeds and optimisers compared on a small model."""

from assay.research.study._grading import Grader, Verdict
from assay.research.study._log import RunLog, read_logs
from assay.research.study._loop import Study
from assay.research.study._page import source_checks, study_page
from assay.research.study._plan import Run, Settings, TaskPool
from assay.research.study._summary import ArmResult, summarise

__all__ = [
    "ArmResult",
    "Grader",
    "Run",
    "RunLog",
    "Settings",
    "Study",
    "TaskPool",
    "Verdict",
    "read_logs",
    "source_checks",
    "study_page",
    "summarise",
]
