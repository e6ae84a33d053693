"""Many training runs at once: arms, seeds and optimisers compared on a small model."""

from assay.research.study._grading import Grader, StudyVerdict
from assay.research.study._log import RunLog, read_logs
from assay.research.study._loop import Study
from assay.research.study._page import source_checks, study_page
from assay.research.study._plan import StudyRun, StudySettings, TaskPool
from assay.research.study._summary import ArmResult, summarise

__all__ = [
    "ArmResult",
    "Grader",
    "RunLog",
    "Study",
    "StudyRun",
    "StudySettings",
    "StudyVerdict",
    "TaskPool",
    "read_logs",
    "source_checks",
    "study_page",
    "summarise",
]
