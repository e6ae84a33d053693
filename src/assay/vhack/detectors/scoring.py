"""Held-out scores: each sample is scored by a fit to other groups."""

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from assay.vhack.detectors.evidence import LabelledEvidence
from assay.vhack.pairs.selection import split_groups

if TYPE_CHECKING:
    from assay.vhack.detectors.detector import Detector

ScoreArray = npt.NDArray[np.float64]


def cross_score(detector: "Detector", evidence: LabelledEvidence) -> tuple[ScoreArray, ScoreArray]:
    """Return held-out scores of the hack and of the clean samples.

    Raises:
        UsageError: There are too few groups.
    """
    hack_scores = np.zeros(len(evidence.hack))
    clean_scores = np.zeros(len(evidence.clean))
    for part in split_groups([*evidence.hack_groups, *evidence.clean_groups]):
        scorer = detector.fit(evidence.without(part))
        hack_rows, clean_rows = evidence.rows(part)
        if hack_rows:
            hack_scores[hack_rows] = scorer(evidence.hack.take(hack_rows))
        if clean_rows:
            clean_scores[clean_rows] = scorer(evidence.clean.take(clean_rows))
    return hack_scores, clean_scores
