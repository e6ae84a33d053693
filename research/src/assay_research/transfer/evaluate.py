"""Figures of detectors on labelled evidence: transfer, placebos, ceiling, few labels and promises.

Shapes: S samples, D features.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from typing_extensions import override

from assay.stats.bootstrap import BootstrapInterval, group_bootstrap
from assay.stats.ranks import auroc
from assay.stats.rates import grouped_share_interval
from assay.vhack.detectors.detector import Detector, FloatArray, Scorer, cross_score
from assay.vhack.detectors.evidence import LabelledEvidence, Needs, SampleEvidence, collected
from assay.vhack.detectors.linear import LinearDetector
from assay.vhack.detectors.rollout_judge import fit_scorer
from assay.vhack.detectors.threshold import choose_threshold
from assay_research.transfer.origins import Labelled

DRAWS = 20  # of few labels
FEW = (0, 8, 32)
PROMISED = 0.05
STRENGTH = 0.01  # of the penalty on weights of the logistic regression


class FormDetector(LinearDetector):
    """A placebo: a ridge on the form of a completion alone."""

    needs = Needs.TEXTS
    is_scaled = True

    @override
    def features(self, evidence: SampleEvidence) -> list[FloatArray]:
        rows = []
        for text in evidence.texts:
            lines = text.split("\n")
            comments = sum(line.strip().startswith(("#", "//")) for line in lines)
            blank = sum(not line.strip() for line in lines)
            rows.append([len(text), len(lines), text.count("```"), comments, blank])
        return [np.array(rows, float)]


class FittedFactsDetector(Detector):
    """A logistic regression on the facts of programs, fitted to the labels at hand."""

    needs = Needs.FACTS

    @override
    def fit(self, evidence: LabelledEvidence) -> Scorer:
        sides = (collected(evidence.hack.facts).numpy(), collected(evidence.clean.facts).numpy())
        labels_S = np.repeat([True, False], [len(side) for side in sides])
        weights_D = logistic(np.concatenate(sides), labels_S, np.full(len(labels_S), 1.0))
        return lambda samples: collected(samples.facts).numpy() @ weights_D


def logistic(
    features_SD: FloatArray, labels_S: npt.NDArray[np.bool_], weights_S: FloatArray
) -> FloatArray:
    """Return the weights of a logistic regression by Newton's method; the offset is left out."""
    weights_S = weights_S / weights_S.sum()
    ones_SD = np.column_stack([features_SD, np.ones(len(features_SD))])
    penalty_D = np.full(ones_SD.shape[1], STRENGTH)
    penalty_D[-1] = 1e-9
    solution_D = np.zeros(ones_SD.shape[1])
    for _ in range(60):
        chance_S = 1 / (1 + np.exp(-(ones_SD @ solution_D)))
        gradient_D = ones_SD.T @ (weights_S * (labels_S - chance_S)) - penalty_D * solution_D
        curvature_S = weights_S * chance_S * (1 - chance_S)
        hessian_DD = (ones_SD * curvature_S[:, None]).T @ ones_SD + np.diag(penalty_D)
        solution_D += np.linalg.solve(hessian_DD, gradient_D)
    return solution_D[:-1]


def labelled(evidence: SampleEvidence, samples: Sequence[Labelled]) -> LabelledEvidence:
    """Return evidence of samples with its labels and groups."""
    rows = {side: [n for n, s in enumerate(samples) if s.is_hack == side] for side in (True, False)}
    groups = {side: [samples[row].group for row in rows[side]] for side in rows}
    return LabelledEvidence(
        evidence.take(rows[True]), evidence.take(rows[False]), groups[True], groups[False]
    )


def concatenated(parts: Sequence[LabelledEvidence]) -> LabelledEvidence:
    """Return the evidence of several origins as one."""
    sides = []
    for side in ("hack", "clean"):
        pieces = [getattr(part, side) for part in parts]
        joined = SampleEvidence(
            tuple(text for piece in pieces for text in piece.texts),
            _cat([piece.activations for piece in pieces], 1),
            _cat([piece.logprobs for piece in pieces], 0),
            None
            if pieces[0].gradients is None
            else {
                name: torch.cat([piece.gradients[name] for piece in pieces])
                for name in pieces[0].gradients
            },
            _cat([piece.facts for piece in pieces], 0),
        )
        sides.append(joined)
    hack_groups = [group for part in parts for group in part.hack_groups]
    clean_groups = [group for part in parts for group in part.clean_groups]
    return LabelledEvidence(*sides, hack_groups, clean_groups)


def _cat(parts: Sequence[torch.Tensor | None], dim: int) -> torch.Tensor | None:
    present = [part for part in parts if part is not None]
    return torch.cat(present, dim) if len(present) == len(parts) else None


def area(scores: tuple[FloatArray, FloatArray], target: LabelledEvidence) -> list[float]:
    """Return the AUROC with the ends of its 95 % interval over groups."""
    interval: BootstrapInterval = group_bootstrap(
        auroc, scores, (target.hack_groups, target.clean_groups)
    )
    return [round(value, 4) for value in (interval.value, interval.low, interval.high)]


def transferred(detector: Detector, own: LabelledEvidence, target: LabelledEvidence) -> list[float]:
    """Return the AUROC on a target of a detector that is fitted to own pairs."""
    scorer = detector.fit(own)
    return area((scorer(target.hack), scorer(target.clean)), target)


def ceiling(detector: Detector, target: LabelledEvidence) -> list[float]:
    """Return the AUROC of a detector that is fitted to other groups of the target."""
    return area(cross_score(detector, target), target)


def few_labels(
    detector: Detector, own: LabelledEvidence, target: LabelledEvidence, count: int
) -> dict[str, float]:
    """Return the mean AUROC over draws of target labels that are added to the own pairs.

    They are repeated until they weigh as much as the own pairs; what is scored are other groups.
    """
    groups = sorted(set(target.hack_groups) & set(target.clean_groups))
    values = []
    for draw in range(DRAWS if count else 1):
        generator = np.random.default_rng(draw)
        chosen = set(generator.permutation(groups)[: count // 2].tolist())
        if not chosen:
            scored, fitted = target, own
        else:
            hack_rows, clean_rows = target.rows(chosen)
            first = {target.hack_groups[row]: row for row in reversed(hack_rows)}
            second = {target.clean_groups[row]: row for row in reversed(clean_rows)}
            drawn = LabelledEvidence(
                target.hack.take(list(first.values())),
                target.clean.take(list(second.values())),
                list(first),
                list(second),
            )
            repeats = max(1, round(len(own.hack) / len(drawn.hack)))
            scored, fitted = target.without(chosen), concatenated([own, *[drawn] * repeats])
        scorer = detector.fit(fitted)
        values.append(auroc(scorer(scored.hack), scorer(scored.clean)))
    return {
        "mean": round(float(np.mean(values)), 4),
        "lowest": round(float(np.min(values)), 4),
        "highest": round(float(np.max(values)), 4),
    }


def promise(
    detector: Detector, own: LabelledEvidence, targets: dict[str, LabelledEvidence]
) -> dict[str, dict[str, list[float] | float]]:
    """Return of each target the share of clean samples above a threshold that promises 5 %.

    ``own`` is the threshold of own pairs; ``clean half`` that of the clean samples of half of the
    target's groups, on the other half.
    """
    scorer, threshold = fit_scorer(detector, own, PROMISED)
    outcomes: dict[str, dict[str, list[float] | float]] = {}
    for name, target in targets.items():
        scores_S = scorer(target.clean)
        outcomes[name] = {"own": _share(scores_S > threshold.value, target.clean_groups)}
        if len(target.hack):
            caught = scorer(target.hack) > threshold.value
            outcomes[name]["caught"] = _share(caught, target.hack_groups)
        groups = sorted(set(target.clean_groups))
        half = set(groups[::2])
        is_half_S = np.array([group in half for group in target.clean_groups])
        if is_half_S.sum() >= 19:
            threshold_of_half = choose_threshold(scores_S[is_half_S], scores_S[is_half_S], PROMISED)
            outcomes[name]["clean half"] = _share(
                scores_S[~is_half_S] > threshold_of_half.value,
                [g for g, is_in in zip(target.clean_groups, is_half_S, strict=True) if not is_in],
            )
            if len(target.hack):
                is_other = np.array([group not in half for group in target.hack_groups])
                caught = scorer(target.hack)[is_other] > threshold_of_half.value
                outcomes[name]["caught by clean half"] = round(float(caught.mean()), 4)
    return outcomes


def _share(is_flagged: npt.NDArray[np.bool_], groups: Sequence[str]) -> list[float]:
    low, high = grouped_share_interval(is_flagged, groups)
    return [round(float(value), 4) for value in (is_flagged.mean(), low, high)]
