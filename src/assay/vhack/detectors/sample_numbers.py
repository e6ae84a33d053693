"""Detectors that are one number of a sample: a control that a better detector has to beat."""

from typing import cast

import numpy as np
import torch
from typing_extensions import override

from assay.vhack.detectors.detector import FloatArray, NumberDetector
from assay.vhack.detectors.evidence import Needs, SampleEvidence, collected


class LengthDetector(NumberDetector):
    """Length of the completion: the control that a better detector has to beat."""

    needs = Needs.TEXTS

    @override
    def measure(self, evidence: SampleEvidence) -> FloatArray:
        return np.array([float(len(text)) for text in evidence.texts])


class LikelihoodDetector(NumberDetector):
    """How likely the model finds the completion, per token."""

    needs = Needs.LOGPROBS

    @override
    def measure(self, evidence: SampleEvidence) -> FloatArray:
        return cast("FloatArray", collected(evidence.logprobs).double().numpy())


class GradientNormDetector(NumberDetector):
    """Logarithm of the norm of the gradient over all modules."""

    needs = Needs.GRADIENTS

    @override
    def measure(self, evidence: SampleEvidence) -> FloatArray:
        gradients = collected(evidence.gradients).values()
        squares = [rows_SR.double().square().sum(dim=1) for rows_SR in gradients]
        squared_S = torch.stack(squares).sum(dim=0)
        # A gradient of zero has no logarithm.
        return cast("FloatArray", squared_S.clamp_min(1e-300).log().numpy())
