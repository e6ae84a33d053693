"""Detectors that are a ridge regression, for few samples and many features.

Shapes: S samples, D features, K strengths, R coordinates of δS.
"""

import zlib
from abc import abstractmethod
from typing import ClassVar

import numpy as np
import torch
from torch.nn.functional import normalize
from typing_extensions import override

from assay.stats.ranks import auroc
from assay.vhack.detectors.detector import Detector, FloatArray, Scorer
from assay.vhack.detectors.evidence import LabelledEvidence, Needs, SampleEvidence, collected
from assay.vhack.pairs.selection import split_groups

STRENGTHS = (0.01, 0.1, 1.0, 10.0, 100.0)  # in mean eigenvalues of the Gram matrix
BUCKETS = 4096  # of the hash of an n-gram
LENGTHS = (2, 3, 4)  # of an n-gram in characters


class LinearDetector(Detector):
    """A ridge regression on features of the samples.

    Attributes:
        is_scaled: Whether features are divided by their spread.
    """

    is_scaled: ClassVar[bool] = False

    @abstractmethod
    def features(self, evidence: SampleEvidence) -> list[FloatArray]:
        """Return candidate features, [S, D] each, of which cross-validation chooses one."""

    @override
    def fit(self, evidence: LabelledEvidence) -> Scorer:
        """Return the regression on the candidate and with the strength of the highest AUROC.

        Cross-validation leaves out whole groups. Of equal candidates it takes the first, and of
        equal strengths the largest.
        """
        sides = zip(self.features(evidence.hack), self.features(evidence.clean), strict=True)
        candidates = [np.concatenate([hack_SD, clean_SD]) for hack_SD, clean_SD in sides]
        labels_S = np.repeat([1.0, -1.0], [len(evidence.hack), len(evidence.clean)])
        groups_S = np.array([*evidence.hack_groups, *evidence.clean_groups])
        best = (-1.0, 0, 0)
        for candidate, features_SD in enumerate(candidates):
            scores_KS = np.zeros((len(STRENGTHS), len(labels_S)))
            for part in split_groups(groups_S.tolist()):
                is_heldout_S = np.isin(groups_S, list(part))
                solutions = solve_ridge(
                    features_SD[~is_heldout_S], labels_S[~is_heldout_S], is_scaled=self.is_scaled
                )
                for row, (weights_D, offset) in enumerate(solutions):
                    scores_KS[row, is_heldout_S] = features_SD[is_heldout_S] @ weights_D + offset
            for row, scores_S in enumerate(scores_KS):
                area = auroc(scores_S[labels_S > 0], scores_S[labels_S < 0])
                best = max(best, (area, -candidate, row))
        chosen = -best[1]
        solutions = solve_ridge(candidates[chosen], labels_S, is_scaled=self.is_scaled)
        weights_D, offset = solutions[best[2]]
        return lambda samples: self.features(samples)[chosen] @ weights_D + offset


def solve_ridge(
    features_SD: FloatArray, labels_S: FloatArray, *, is_scaled: bool
) -> list[tuple[FloatArray, float]]:
    """Return weights and offset for each strength."""
    mean_D = features_SD.mean(axis=0)
    label_mean = labels_S.mean()
    spread_D = features_SD.std(axis=0) if is_scaled else np.ones_like(mean_D)
    spread_D = np.where(spread_D > 0, spread_D, np.inf)
    centred_SD = (features_SD - mean_D) / spread_D
    # The dual form: the Gram matrix is S × S, and there are far fewer samples than features.
    values_S, vectors_SS = np.linalg.eigh((centred_SD @ centred_SD.T).astype(np.float64))
    values_S = values_S.clip(np.finfo(np.float64).tiny)
    solutions = []
    for strength in STRENGTHS:
        damped_S = values_S + strength * values_S.mean()
        dual_S = vectors_SS @ (vectors_SS.T @ (labels_S - label_mean) / damped_S)
        weights_D = (dual_S.astype(features_SD.dtype) @ centred_SD) / spread_D
        solutions.append((weights_D, float(label_mean - mean_D @ weights_D)))
    return solutions


class NgramDetector(LinearDetector):
    """Reads hashed character n-grams of the text alone, so it costs no pass of the model."""

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


class ProbeDetector(LinearDetector):
    """Reads the mean hidden state of the completion; cross-validation chooses the layer."""

    needs = Needs.ACTIVATIONS
    # A few coordinates of a hidden state are a hundred times the others.
    is_scaled = True

    @override
    def features(self, evidence: SampleEvidence) -> list[FloatArray]:
        return [*collected(evidence.activations).numpy()]


class GradientRidgeDetector(LinearDetector):
    """Reads the gradients of δS of all modules, each scaled to length 1."""

    needs = Needs.GRADIENTS

    @override
    def features(self, evidence: SampleEvidence) -> list[FloatArray]:
        gradients = collected(evidence.gradients).values()
        units = [normalize(rows_SR.float(), dim=1) for rows_SR in gradients]
        return [torch.cat(units, dim=1).numpy()]
