"""The length of the gradient of δS."""

import torch
from typing_extensions import override

from assay.vhack.detectors.detector import FloatArray, NumberDetector
from assay.vhack.detectors.evidence import Needs, SampleEvidence, collected


class GradientNormDetector(NumberDetector):
    """Logarithm of the norm of the gradient over all modules."""

    needs = Needs.GRADIENTS

    @override
    def measure(self, evidence: SampleEvidence) -> FloatArray:
        gradients = collected(evidence.gradients).values()
        squares = [rows_SR.double().square().sum(dim=1) for rows_SR in gradients]
        squared_S = torch.stack(squares).sum(dim=0)
        # A gradient of zero has no logarithm.
        logs_S: FloatArray = squared_S.clamp_min(1e-300).log().numpy()
        return logs_S
