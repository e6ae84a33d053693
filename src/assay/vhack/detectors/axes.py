"""The share of the gradient along hack directions (cin), by axes of pairs or of a basis file."""

from functools import partial
from typing import cast

from typing_extensions import override

from assay.vhack.detectors.detector import Detector, FloatArray, Scorer
from assay.vhack.detectors.evidence import LabelledEvidence, Needs, SampleEvidence, collected
from assay.vhack.directions.basis.basis import Basis, cin_over_modules
from assay.vhack.directions.basis.extract import PairGradients

TOP_K = 5  # axes per module


class AxesDetector(Detector):
    """cin along axes that are extracted from the sides of the pairs, by ``lda`` or ``svd``."""

    needs = Needs.GRADIENTS

    @override
    def fit(self, evidence: LabelledEvidence) -> Scorer:
        gradients = PairGradients(
            collected(evidence.hack.gradients), collected(evidence.clean.gradients)
        )
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
    return cast("FloatArray", cin_S.double().numpy())
