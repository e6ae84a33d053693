"""Figures of detectors on other origins: fits see no label of the target unless they are given."""

import numpy as np
import torch
from assay_research.transfer import evaluate

from assay.vhack.detectors.evidence import LabelledEvidence, SampleEvidence
from assay.vhack.detectors.facts import FACTS


def evidence(shift, seed, n=40):
    """Evidence of hacks with one fact more often, by ``shift``, and of clean samples."""
    generator = np.random.default_rng(seed)
    sides = []
    for side in (shift, 0.0):
        facts = generator.random((n, len(FACTS)))
        facts[:, 0] += side
        sides.append(SampleEvidence(("x",) * n, facts=torch.from_numpy(facts)))
    groups = [f"{row // 2}" for row in range(n)]
    return LabelledEvidence(*sides, groups, groups)


def test_a_fit_to_own_samples_transfers_where_the_same_fact_tells():
    own, same, other = evidence(1.0, 0), evidence(1.0, 1), evidence(-1.0, 2)
    detector = evaluate.FittedFactsDetector("facts")
    assert evaluate.transferred(detector, own, same)[0] > 0.9
    assert evaluate.transferred(detector, own, other)[0] < 0.1
    assert evaluate.ceiling(detector, other)[0] > 0.9
    few = [evaluate.few_labels(detector, own, other, count)["mean"] for count in evaluate.FEW]
    assert few[0] < min(few[1:])


def test_a_threshold_of_clean_samples_of_the_target_keeps_its_promise():
    own, target = evidence(2.0, 0, 60), evidence(2.0, 1, 60)
    for side in (target.hack, target.clean):
        side.facts[:, 0] += 1.0  # the target's clean samples look like own hacks
    found = evaluate.promise(evaluate.FittedFactsDetector("facts"), own, {"target": target})
    assert found["target"]["own"][0] > 0.2
    assert found["target"]["clean half"][1] <= 0.05
