"""A linear probe on the mean hidden state of the completion."""

from typing_extensions import override

from assay.vhack.detectors.detector import FloatArray
from assay.vhack.detectors.evidence import Needs, SampleEvidence, collected
from assay.vhack.detectors.linear import LinearDetector


class ProbeDetector(LinearDetector):
    """A ridge regression on activations; cross-validation chooses the layer."""

    needs = Needs.ACTIVATIONS
    # A few coordinates of a hidden state are a hundred times the others.
    is_scaled = True

    @override
    def features(self, evidence: SampleEvidence) -> list[FloatArray]:
        return [*collected(evidence.activations).numpy()]
