"""A ridge regression on the gradients of δS."""

import torch
from torch.nn.functional import normalize
from typing_extensions import override

from assay.vhack.detectors.detector import FloatArray
from assay.vhack.detectors.evidence import Needs, SampleEvidence, collected
from assay.vhack.detectors.linear import LinearDetector


class GradientRidgeDetector(LinearDetector):
    """Reads the gradients of all modules, each scaled to length 1."""

    needs = Needs.GRADIENTS

    @override
    def features(self, evidence: SampleEvidence) -> list[FloatArray]:
        gradients = collected(evidence.gradients).values()
        units = [normalize(rows_SR.float(), dim=1) for rows_SR in gradients]
        return [torch.cat(units, dim=1).numpy()]
