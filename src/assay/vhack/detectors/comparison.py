"""Detectors side by side on held-out samples, and which of them to use."""

from collections.abc import Sequence
from dataclasses import dataclass

from assay.stats.bootstrap import BootstrapInterval, group_bootstrap
from assay.stats.ranks import auroc
from assay.vhack.detectors.all_detectors import make_detectors
from assay.vhack.detectors.combined import MIN_GAIN
from assay.vhack.detectors.detector import Detector
from assay.vhack.detectors.evidence import LabelledEvidence
from assay.vhack.detectors.scoring import ScoreArray, cross_score
from assay.vhack.detectors.threshold import Threshold, choose_threshold

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
        caught = ""
        lost = ""
        if self.threshold is not None:
            limit = self.threshold
            caught = f"{limit.caught:.3f}"
            interval = f"{limit.low:.3f} to {limit.high:.3f}"
            lost = f"{limit.lost:.3f} ({interval}); {limit.promised:.3f} promised"
        interval = f"{area.low:.3f} to {area.high:.3f}"
        return (self.name, f"{area.value:.3f}", interval, caught, lost, self.cost)


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


@dataclass(frozen=True)
class _Candidate:
    detector: Detector
    area: float
    scores: tuple[ScoreArray, ScoreArray]


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
    results = []
    candidates = []
    for detector in chosen:
        scores = cross_score(detector, evidence)
        area = group_bootstrap(auroc, scores, groups)
        threshold = None
        if len(evidence.clean) >= ENOUGH_CLEAN:
            threshold = choose_threshold(*scores, groups=evidence.clean_groups)
        cost = detector.cost.name.lower()
        results.append(DetectorResult(detector.name, cost, area, threshold))
        candidates.append(_Candidate(detector, area.value, scores))
    highest = max(candidate.area for candidate in candidates)
    near = [candidate for candidate in candidates if candidate.area >= highest - MIN_GAIN]
    best = min(near, key=lambda candidate: (candidate.detector.cost, -candidate.area))
    corrected = group_bootstrap(auroc, best.scores, groups, confidence=1 - 0.05 / len(chosen))
    name = best.detector.name
    if corrected.low <= 0.5:
        says = (
            f"undecided: {name} has the highest AUROC of {len(candidates)}, and may be at chance: "
            "add pairs"
        )
        return Comparison(tuple(results), None, says)
    return Comparison(tuple(results), name, f"use {name}, with an AUROC of {best.area:.3f}")
