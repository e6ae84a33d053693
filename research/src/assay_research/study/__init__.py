"""Many training runs at once: arms, seeds and optimisers compared on a small model."""

from assay.research.study._claims import Claim, complete, judged, lasts
from assay.research.study._grading import Grader, StudyVerdict
from assay.research.study._log import RunLog, read_logs
from assay.research.study._loop import Study
from assay.research.study._page import source_checks, study_page
from assay.research.study._plan import StudyRun, StudySettings, TaskPool
from assay.research.study._rival import RIVALS, supervised_start
from assay.research.study._sampled import sampled_pairs
from assay.research.study._summary import ArmResult, summarise

__all__ = [
    "RIVALS",
    "ArmResult",
    "Claim",
    "Grader",
    "RunLog",
    "Study",
    "StudyRun",
    "StudySettings",
    "StudyVerdict",
    "TaskPool",
    "complete",
    "judged",
    "lasts",
    "read_logs",
    "sampled_pairs",
    "source_checks",
    "study_page",
    "summarise",
    "supervised_start",
]
