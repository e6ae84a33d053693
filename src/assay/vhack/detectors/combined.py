"""The sum of standardised scores of the detectors that raise the AUROC of the sum.

Shapes: S samples.
"""

import math
from collections.abc import Sequence
from typing import cast

import numpy as np
from typing_extensions import override

from assay.stats.ranks import auroc
from assay.vhack.detectors.detector import Detector, FloatArray, Scorer, cross_score, make_detector
from assay.vhack.detectors.evidence import LabelledEvidence, Needs, SampleEvidence
from assay.vhack.names import DETECTORS

MIN_GAIN = 0.01  # of AUROC, that a member must add to those before it


class CombinedDetector(Detector):
    """Adds up detectors that each raise the held-out AUROC of the sum by 0.01 or more."""

    needs = Needs.ALL

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
