"""The mean log-probability of a token of the completion."""

from typing_extensions import override

from assay.vhack.detectors.detector import FloatArray, NumberDetector
from assay.vhack.detectors.evidence import Needs, SampleEvidence, collected


class LikelihoodDetector(NumberDetector):
    """How likely the model finds the completion, per token."""

    needs = Needs.LOGPROBS

    @override
    def measure(self, evidence: SampleEvidence) -> FloatArray:
        logprobs_S: FloatArray = collected(evidence.logprobs).double().numpy()
        return logprobs_S
