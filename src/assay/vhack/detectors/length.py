"""The number of characters of a completion."""

import numpy as np
from typing_extensions import override

from assay.vhack.detectors.detector import FloatArray, NumberDetector
from assay.vhack.detectors.evidence import Needs, SampleEvidence


class LengthDetector(NumberDetector):
    """Length of the completion: the control that a better detector has to beat."""

    needs = Needs.TEXTS

    @override
    def measure(self, evidence: SampleEvidence) -> FloatArray:
        return np.array([float(len(text)) for text in evidence.texts])
