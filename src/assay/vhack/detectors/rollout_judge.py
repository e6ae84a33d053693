"""A fitted detector with its threshold, which flags rollouts."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from assay.errors import DataError
from assay.models.model import AnyModel, AnyTokenizer
from assay.vhack.detectors.detector import Detector, Scorer, cross_score, make_detector
from assay.vhack.detectors.evidence import Cost, LabelledEvidence, collect_evidence
from assay.vhack.detectors.threshold import Threshold, check_fittable, choose_threshold
from assay.vhack.directions.gradients.batches import Progress
from assay.vhack.directions.gradients.division import division_of
from assay.vhack.directions.gradients.per_sample import encode_samples
from assay.vhack.directions.gradients.svd import SVDCache, weight_svd
from assay.vhack.directions.gradients.targets import module_of
from assay.vhack.pairs.pairs import Pair, Sample


@dataclass(frozen=True, eq=False)
class RolloutJudge:
    """Flags rollouts of the model that its detector was fitted with, or of one trained from it.

    Attributes:
        detector: The detector.
        scorer: The detector, fitted.
        threshold: Score above which a rollout is flagged.
        model: Model whose passes are looked at.
        tokenizer: Tokenizer, where the model has none of its own.
        svd: Factors of the weights as they were when the detector was fitted.
    """

    detector: Detector
    scorer: Scorer
    threshold: Threshold
    model: "AnyModel | None" = None
    tokenizer: AnyTokenizer = None
    svd: SVDCache | None = None

    def flags(self, samples: Sequence[Sample]) -> list[bool]:
        """Return which of the samples are flagged: those whose score is above the threshold."""
        return [score > self.threshold.value for score in self.scores(samples)]

    def scores(self, samples: Sequence[Sample]) -> list[float]:
        """Return the scores of samples.

        A sample without a prompt or a completion has −∞. A sample that cannot be read has ∞: a
        policy may write tokens whose text is longer than the context. Processes that share the
        weights of a model call this together, each with samples of its own.
        """
        division = None
        if self.model is not None and self.detector.cost >= Cost.FORWARD:
            division = division_of(module_of(self.model))
        if division is None or division.group is None:
            return self._scores(samples)
        parts = division.gather(list(samples))
        start = sum(map(len, parts[: division.rank]))
        scores = self._scores([sample for part in parts for sample in part])
        return scores[start : start + len(samples)]

    def _scores(self, samples: Sequence[Sample]) -> list[float]:
        scores = [-math.inf] * len(samples)
        rows = [row for row, sample in enumerate(samples) if sample.prompt and sample.completion]
        if not rows:
            return scores
        try:
            evidence = collect_evidence(
                [samples[row] for row in rows],
                self.model,  # type: ignore[arg-type]  # None for detectors of texts alone
                needs=self.detector.needs,
                tokenizer=self.tokenizer,
                svd=self.svd,
            )
        except DataError:
            # One unreadable sample refuses the batch, so each is judged alone.
            if len(samples) == 1:
                return [math.inf]
            return [self._scores([sample])[0] for sample in samples]
        for row, score in zip(rows, self.scorer(evidence), strict=True):
            scores[row] = float(score)
        return scores


def fit_judge(
    pairs: Sequence[Pair],
    model: AnyModel,
    *,
    detector: str = "cin-lda",
    promised: float | None = None,
    tokenizer: AnyTokenizer = None,
    svd: SVDCache | None = None,
    progress: Progress | None = None,
) -> RolloutJudge:
    """Return a detector fitted to pairs, with a threshold from their held-out scores.

    Args:
        pairs: Pairs of a hack and a clean completion, in three groups or more, for
            ``combined`` four.
        model: Model whose passes it looks at.
        detector: Name in ``DETECTORS``.
        promised: Share of the clean samples of a new group, of such as the clean sides are, that
            may be lost; None stands for 0.05, or 1/(G+1) with fewer than 19 groups.
        tokenizer: Tokenizer, as in :func:`assay.vhack.per_sample_gradients`, which also says what
            it raises.
        svd: Factors of all weights; None computes them.
        progress: Function called with the number of gradients done and of all.

    Raises:
        UsageError: There is no such detector, or there are too few pairs or groups.
        DataError: A prompt occurs in two groups, or a pair is too long for the model.
    """
    chosen = make_detector(detector)
    groups = check_fittable(pairs, chosen.least_groups, promised)
    samples = [pair.samples()[side] for side in (0, 1) for pair in pairs]
    if svd is None and chosen.cost == Cost.BACKWARD:
        # Refuses before the decomposition.
        encode_samples(samples, model, tokenizer=tokenizer)
        # Once: training moves the weights, and the axes belong to the weights of now.
        svd = weight_svd(model)
    evidence = collect_evidence(
        samples, model, needs=chosen.needs, tokenizer=tokenizer, svd=svd, progress=progress
    )
    hack = evidence.take(range(len(pairs)))
    clean = evidence.take(range(len(pairs), len(samples)))
    labelled = LabelledEvidence(hack, clean, groups, groups)
    scorer, threshold = fit_scorer(chosen, labelled, promised)
    return RolloutJudge(chosen, scorer, threshold, model, tokenizer, svd)


def fit_scorer(
    detector: Detector, evidence: LabelledEvidence, promised: float | None = None
) -> tuple[Scorer, Threshold]:
    """Return a detector fitted to all samples, and the threshold of held-out scores."""
    hack_scores, clean_scores = cross_score(detector, evidence)
    threshold = choose_threshold(hack_scores, clean_scores, promised, evidence.clean_groups)
    return detector.fit(evidence), threshold
