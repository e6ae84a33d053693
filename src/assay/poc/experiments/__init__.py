"""Experiments: every table of the published documents measured again, with the noise that each number carries.

``assay poc experiment`` runs them; docs/experiments.md says what came out.
"""

from assay.poc.experiments._report import Section, build_report, section
from assay.poc.experiments._runs import Run, RunRecords, open_run, read_run, run_folder

__all__ = ["Run", "RunRecords", "Section", "build_report", "open_run", "read_run", "run_folder", "section"]
