"""The share of the gradient along hack directions (cin), by axes of pairs or of a basis file."""

from collections.abc import Sequence
from functools import partial

from typing_extensions import override

from assay.vhack.detectors.combined import CombinedDetector
from assay.vhack.detectors.detector import Detector, FloatArray, Scorer
from assay.vhack.detectors.evidence import LabelledEvidence, Needs, SampleEvidence, collected
from assay.vhack.directions.basis.basis import Basis
from assay.vhack.directions.basis.cin import cin_over_modules
from assay.vhack.directions.basis.extract import PairGradients

TOP_K = 5  # axes per module


class AxesDetector(Detector):
    """cin along axes that are extracted from the sides of the pairs, by ``lda`` or ``svd``."""

    needs = Needs.GRADIENTS

    @override
    def fit(self, evidence: LabelledEvidence) -> Scorer:
        hack = collected(evidence.hack.gradients)
        gradients = PairGradients(hack, collected(evidence.clean.gradients))
        return partial(
            score_cin, gradients.basis(top_k=TOP_K, method=self.name.removeprefix("cin-"))
        )


class BasisDetector(Detector):
    """cin along the axes of a basis that was extracted before; nothing is fitted."""

    needs = Needs.GRADIENTS

    def __init__(self, basis: Basis) -> None:
        super().__init__(f"cin-{basis.origin.method}")
        self.basis = basis

    @override
    def fit(self, evidence: LabelledEvidence) -> Scorer:
        return partial(score_cin, self.basis)


def score_cin(basis: Basis, evidence: SampleEvidence) -> FloatArray:
    """Return cin over modules of each sample, [S]."""
    cin_S = cin_over_modules(collected(evidence.gradients), basis)
    scores_S: FloatArray = cin_S.double().numpy()
    return scores_S


def replace_axes(detectors: Sequence[Detector], basis: Basis) -> list[Detector]:
    """Return detectors with the axes of a basis in place of those fitted to pairs."""
    members: list[Detector] = []
    for detector in detectors:
        if isinstance(detector, AxesDetector):
            is_first = not any(isinstance(member, BasisDetector) for member in members)
            if is_first:
                members.append(BasisDetector(basis))
        elif not isinstance(detector, CombinedDetector):
            members.append(detector)
    return [*members, CombinedDetector("combined", members)]
