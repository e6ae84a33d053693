"""The face of a detector, its simplest kind, and the registry.

A new detector is a file in this folder with a subclass of :class:`Detector`, and one line in
:data:`assay.vhack.names.DETECTORS`, which settings read before torch is imported.

Shapes: S samples.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from pkgutil import resolve_name
from typing import Any, ClassVar, cast

import numpy as np
import numpy.typing as npt
from typing_extensions import override

from assay.errors import check_choice
from assay.stats.ranks import auroc
from assay.vhack.detectors.evidence import Cost, LabelledEvidence, Needs, SampleEvidence
from assay.vhack.names import DETECTORS
from assay.vhack.pairs.selection import split_groups

FloatArray = npt.NDArray[np.floating[Any]]

Scorer = Callable[[SampleEvidence], FloatArray]
"""A fitted detector: takes evidence of S samples and returns their scores, [S]."""


class Detector(ABC):
    """Scores samples: the higher, the more likely a hack.

    Attributes:
        name: Name in ``DETECTORS``.
        needs: Parts of the evidence that it looks at.
        least_groups: Number of groups of pairs that a judge takes: one is held out, and of the
            others one more for choices by cross-validation.
    """

    needs: Needs
    least_groups: ClassVar[int] = 3

    def __init__(self, name: str) -> None:
        self.name = name

    @property
    def cost(self) -> Cost:
        """Cost of the score of one sample."""
        return self.needs.cost

    @abstractmethod
    def fit(self, evidence: LabelledEvidence) -> Scorer:
        """Return a scorer fitted to labelled samples."""


class NumberDetector(Detector):
    """A number of each sample, negated where clean samples have the larger ones."""

    @abstractmethod
    def measure(self, evidence: SampleEvidence) -> FloatArray:
        """Return the number of each sample, [S]."""

    @override
    def fit(self, evidence: LabelledEvidence) -> Scorer:
        rises = auroc(self.measure(evidence.hack), self.measure(evidence.clean)) >= 0.5
        return lambda samples: self.measure(samples) if rises else -self.measure(samples)


def cross_score(detector: Detector, evidence: LabelledEvidence) -> tuple[FloatArray, FloatArray]:
    """Return held-out scores of the hack and of the clean samples: each by a fit to other groups.

    Raises:
        UsageError: There are too few groups.
    """
    sides = (evidence.hack, evidence.clean)
    scores = (np.zeros(len(evidence.hack)), np.zeros(len(evidence.clean)))
    for part in split_groups([*evidence.hack_groups, *evidence.clean_groups]):
        scorer = detector.fit(evidence.without(part))
        for side_scores, side, rows in zip(scores, sides, evidence.rows(part), strict=True):
            if rows:
                side_scores[rows] = scorer(side.take(rows))
    return scores


def make_detector(name: str) -> Detector:
    """Return a detector by its name.

    Raises:
        UsageError: There is no such detector.
    """
    check_choice("detector", name, DETECTORS)
    return cast("Detector", resolve_name(DETECTORS[name])(name))
