"""A ridge regression on hashed character n-grams of the completion."""

import zlib

import numpy as np
from typing_extensions import override

from assay.vhack.detectors.detector import FloatArray
from assay.vhack.detectors.evidence import Needs, SampleEvidence
from assay.vhack.detectors.linear import LinearDetector

BUCKETS = 4096  # of the hash
LENGTHS = (2, 3, 4)  # of an n-gram in characters


class NgramDetector(LinearDetector):
    """Reads the text alone, so it costs no pass of the model."""

    needs = Needs.TEXTS

    @override
    def features(self, evidence: SampleEvidence) -> list[FloatArray]:
        """Return square roots of n-gram counts, each row scaled to length 1."""
        counts_SD = np.zeros((len(evidence), BUCKETS))
        for row, text in enumerate(evidence.texts):
            for n in LENGTHS:
                grams = [text[start : start + n] for start in range(len(text) - n + 1)]
                hashes = [zlib.crc32(gram.encode()) % BUCKETS for gram in grams]
                counts_SD[row] += np.bincount(hashes, minlength=BUCKETS)
        # The root keeps a text that repeats one line from drowning all other n-grams.
        roots_SD = np.sqrt(counts_SD)
        return [roots_SD / np.linalg.norm(roots_SD, axis=1, keepdims=True).clip(1e-9)]
