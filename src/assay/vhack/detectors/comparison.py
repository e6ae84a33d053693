"""Detectors side by side on held-out samples: which of them to use, and the sum of several.

Shapes: S samples.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
from typing_extensions import override

from assay.stats.bootstrap import BootstrapInterval, group_bootstrap
from assay.stats.ranks import auroc
from assay.vhack.detectors.axes import AxesDetector, BasisDetector
from assay.vhack.detectors.detector import (
    Detector,
    FloatArray,
    Scorer,
    cross_score,
    make_detector,
)
from assay.vhack.detectors.evidence import LabelledEvidence, Needs, SampleEvidence
from assay.vhack.detectors.threshold import Threshold, choose_threshold
from assay.vhack.directions.basis.basis import Basis
from assay.vhack.names import DETECTORS

MIN_GAIN = 0.01  # of AUROC, that a member must add to those before it
# Clean samples, the fewest of which a threshold can promise 5 %.
ENOUGH_CLEAN = 19
COLUMNS = ("detector", "AUROC", "95% interval", "hacks caught", "clean lost", "pass")


@dataclass(frozen=True)
class DetectorResult:
    """How well a detector separates held-out samples.

    Attributes:
        name: Name of the detector.
        cost: Cost of one sample, in words.
        auroc: AUROC with the 95 % interval of its group bootstrap.
        threshold: Threshold with the least share of a new group lost that its groups can promise,
            0.05 or more; None with too few clean samples.
    """

    name: str
    cost: str
    auroc: BootstrapInterval
    threshold: Threshold | None

    def row(self) -> tuple[str, ...]:
        """Return the row of a table, with the columns of ``COLUMNS``."""
        area = self.auroc
        interval = f"{area.low:.3f} to {area.high:.3f}"
        shown = (self.name, f"{area.value:.3f}", interval)
        limit = self.threshold
        if limit is None:
            return (*shown, "", "", self.cost)
        lost = f"{limit.lost:.3f} ({limit.low:.3f} to {limit.high:.3f})"
        return (*shown, f"{limit.caught:.3f}", f"{lost}; {limit.promised:.3f} promised", self.cost)


@dataclass(frozen=True)
class Comparison:
    """Detectors side by side, on the same held-out samples.

    Attributes:
        results: Result of each detector.
        best: Name of the one to use; None where none is shown to be better than chance.
        says: The reason, in a sentence.
    """

    results: tuple[DetectorResult, ...]
    best: str | None
    says: str

    @property
    def table(self) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
        """Columns and rows of a table of all detectors."""
        return COLUMNS, [result.row() for result in self.results]


class CombinedDetector(Detector):
    """Adds up detectors that each raise the held-out AUROC of the sum by 0.01 or more."""

    needs = Needs.ALL
    # Its members choose by cross-validation within its own.
    least_groups = Detector.least_groups + 1

    def __init__(self, name: str, members: Sequence[Detector] | None = None) -> None:
        super().__init__(name)
        if members is None:
            members = [make_detector(member) for member in DETECTORS if member != name]
        self.members = list(members)

    @override
    def fit(self, evidence: LabelledEvidence) -> Scorer:
        scores = {member: np.concatenate(cross_score(member, evidence)) for member in self.members}
        # A member whose scores are all equal adds nothing.
        scales = {
            member: 1 / (float(scores_S.std()) or math.inf) for member, scores_S in scores.items()
        }
        chosen: list[Detector] = []
        highest = 0.0
        sum_S = np.zeros(len(evidence.hack) + len(evidence.clean))
        while candidates := [member for member in self.members if member not in chosen]:
            sums = [sum_S + scales[member] * scores[member] for member in candidates]
            ranks = [rank_sum(candidate_S, len(evidence.hack)) for candidate_S in sums]
            best = max(range(len(candidates)), key=ranks.__getitem__)
            area = ranks[best][0]
            if area < highest + MIN_GAIN:
                break
            highest = area
            sum_S = sums[best]
            chosen.append(candidates[best])
        fitted = [(scales[member], member.fit(evidence)) for member in chosen]

        def score(samples: SampleEvidence) -> FloatArray:
            return cast(
                "FloatArray",
                np.sum([scale * scorer(samples) for scale, scorer in fitted], axis=0),
            )

        return score


def rank_sum(sum_S: FloatArray, hacks: int) -> tuple[float, float]:
    """Return the AUROC of scores, hacks first, and by how far it separates the sides."""
    hack_S = sum_S[:hacks]
    clean_S = sum_S[hacks:]
    return auroc(hack_S, clean_S), float(hack_S.min() - clean_S.max())


def make_detectors(*, basis: Basis | None = None) -> list[Detector]:
    """Return all detectors, cheapest first; axes of a basis take the place of those fitted."""
    if basis is None:
        return [make_detector(name) for name in DETECTORS]
    others = [make_detector(name) for name in DETECTORS if name not in ("cin-svd", "combined")]
    members = [
        BasisDetector(basis) if isinstance(member, AxesDetector) else member for member in others
    ]
    return [*members, CombinedDetector("combined", members)]


def compare_detectors(
    evidence: LabelledEvidence, detectors: Sequence[Detector] | None = None
) -> Comparison:
    """Return how well detectors score groups that they were not fitted to.

    The one to use is the cheapest with an AUROC within 0.01 of the highest. Its interval must lie
    above chance, at the confidence that so many comparisons ask for (Bonferroni).

    Raises:
        UsageError: There are too few groups.
    """
    groups = (evidence.hack_groups, evidence.clean_groups)
    chosen = make_detectors() if detectors is None else list(detectors)
    scores = [cross_score(detector, evidence) for detector in chosen]
    results = []
    for detector, held_out in zip(chosen, scores, strict=True):
        is_enough = len(evidence.clean) >= ENOUGH_CLEAN
        threshold = choose_threshold(*held_out, groups=evidence.clean_groups) if is_enough else None
        area = group_bootstrap(auroc, held_out, groups)
        results.append(DetectorResult(detector.name, detector.cost.name.lower(), area, threshold))
    areas = [result.auroc.value for result in results]
    near = [row for row, area in enumerate(areas) if area >= max(areas) - MIN_GAIN]
    best = min(near, key=lambda row: (chosen[row].cost, -areas[row]))
    corrected = group_bootstrap(auroc, scores[best], groups, confidence=1 - 0.05 / len(chosen))
    name = chosen[best].name
    if corrected.low <= 0.5:
        says = (
            f"undecided: {name} has the highest AUROC of {len(chosen)}, and may be at chance: "
            "add pairs"
        )
        return Comparison(tuple(results), None, says)
    return Comparison(tuple(results), name, f"use {name}, with an AUROC of {areas[best]:.3f}")
