r"""Detectors of rollouts that cheat, from the cheapest to the dearest, all with one face, and how
they are compared.

``length`` and ``ngrams``, a ridge on hashed character n-grams, look at the text alone.
``likelihood``, of a token, and ``probe``, a ridge on mean activations of one layer, take a forward
pass. ``norm`` of the δS gradient, ``cin-svd``, ``cin-lda`` and ``ridge``, signed, on unit gradients
of all modules, take a backward pass too. ``combined`` is the sum of those of the others that add
something, in units of their spread. Layers and strengths of a ridge are chosen by cross-validation
among the samples it is fitted to, and scores that are compared come from fits to other groups.

A threshold promises the share of clean samples that are lost, by their rank among clean scores
(split conformal prediction; Vovk, Gammerman and Shafer 2005). Any higher one keeps the promise too;
of these it is the one with the fewest mistakes, in the middle of the gap where the sides have one.
The promise holds for samples that come as those did: for those of new groups only where there are
many, such as 19 (with 8, in a simulation, .08 were lost where .05 was promised), and rollouts of a
policy may differ anyway: a run logs what it loses of them.

Shapes: S samples, L layers, H width of the hidden state, R coordinates of δS, D features.
"""

import math
import threading
import zlib
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from enum import IntEnum
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from assay.errors import DataError, UsageError
from assay.models.decoder import decoder_layers, head_of
from assay.models.model import Model
from assay.models.precision import wide_products
from assay.stats.bootstrap import BootstrapInterval, group_bootstrap
from assay.stats.ranks import auroc
from assay.stats.rates import grouped_share_interval
from assay.vhack.directions.basis.basis import Basis
from assay.vhack.directions.basis.cin import cin_over_modules
from assay.vhack.directions.basis.extract import PairGradients
from assay.vhack.directions.gradients.batches import (
    Encoded,
    Progress,
    SampleBatch,
    context_length,
    encode,
    plan_batches,
)
from assay.vhack.directions.gradients.per_sample import encode_samples, per_sample_gradients
from assay.vhack.directions.gradients.svd import SVDCache, weight_svd
from assay.vhack.directions.gradients.targets import module_of
from assay.vhack.names import DETECTORS
from assay.vhack.pairs.pairs import Pair, Sample, text_of
from assay.vhack.pairs.selection import check_prompts, split_groups

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

FloatArray = npt.NDArray[np.floating[Any]]
Groups = tuple[Sequence[str], Sequence[str]]
"""Group of every hack sample, and of every clean one."""

_HOOKED = threading.Lock()  # hooks sit in the model, and verl pays rollouts in threads
_TOKENS = {"cuda": 16384, "cpu": 1024}  # of a forward pass, padding included
_MOST_LAYERS = 8  # that a probe chooses from, evenly spaced
_STRENGTHS = (0.01, 0.1, 1.0, 10.0, 100.0)  # of a ridge, in mean eigenvalues of the Gram matrix
_HASHES = 4096
_NGRAM = (2, 3, 4)
_ENOUGH = 19  # clean samples, of which a threshold can promise 5 %
# AUROC that a detector must add to those that are combined already, or be ahead of a cheaper one
_GAIN = 0.01


class Cost(IntEnum):
    """What the score of one sample takes: its text alone, a forward pass, or a backward pass
    too.
    """

    TEXT, FORWARD, BACKWARD = range(3)


@dataclass(frozen=True, eq=False)
class Evidence:
    """What detectors look at in S samples; None is what none of them needs."""

    texts: tuple[str, ...]  # the completions
    activations: Tensor | None = (
        None  # after some layers, mean over the completion tokens, [L, S, H] float32
    )
    logprobs: Tensor | None = None  # mean log-probability of a completion token, [S] float32
    gradients: Mapping[str, Tensor] | None = None  # of δS, [S, R] by module

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, rows: Sequence[int]) -> "Evidence":
        """Return the evidence of some of the samples."""
        index = torch.as_tensor(rows, dtype=torch.long)
        return Evidence(
            tuple(self.texts[row] for row in rows),
            None if self.activations is None else self.activations[:, index],
            None if self.logprobs is None else self.logprobs[index],
            None
            if self.gradients is None
            else {name: rows_SR[index] for name, rows_SR in self.gradients.items()},
        )


def collect_evidence(
    samples: Sequence[Sample],
    model: "Model | PreTrainedModel",
    *,
    cost: Cost = Cost.BACKWARD,
    forward: bool = True,
    gradients: Mapping[str, Tensor] | None = None,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    svd: SVDCache | None = None,
    progress: Progress | None = None,
) -> Evidence:
    """Return what detectors of up to this cost look at; arguments and errors are
    :func:`per_sample_gradients`'s.

    Without ``forward``, activations and log-probabilities are left out. ``gradients`` are those of
    the samples, where they are at hand.
    """
    found = Evidence(tuple(text_of(sample.completion) for sample in samples), gradients=gradients)
    if tokenizer is None and isinstance(model, Model):
        tokenizer = model.tokenizer
    if forward and cost >= Cost.FORWARD:
        module = module_of(model)
        count = len(decoder_layers(module))
        layers = sorted(
            {math.ceil(count * part / _MOST_LAYERS) - 1 for part in range(1, _MOST_LAYERS + 1)}
        )
        encoded = encode(
            tokenizer,
            samples,
            [f"sample {row}" for row in range(len(samples))],
            context_length(module),
        )
        activations, logprobs = forward_samples(module, encoded, layers)
        found = replace(found, activations=activations.cpu(), logprobs=logprobs.cpu())
    if cost >= Cost.BACKWARD and gradients is None:
        made = per_sample_gradients(samples, model, tokenizer=tokenizer, svd=svd, progress=progress)
        found = replace(
            found, gradients={name.removesuffix(".base_layer"): of for name, of in made.items()}
        )
    return found


@torch.no_grad()
def forward_samples(
    module: "PreTrainedModel", encoded: Sequence[Encoded], layers: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Return means over the completion tokens: outputs of layers, [L, S, H], and log-probabilities,
    [S], float32.
    """
    states: dict[int, Tensor] = {}
    means: dict[int, Tensor] = {}
    logprobs: dict[int, Tensor] = {}
    training = module.training

    def keep(layer: int, output: Tensor | tuple[Tensor, ...]) -> None:
        states[layer] = output if isinstance(output, Tensor) else output[0]

    def completions(_: object, arguments: tuple[Tensor, ...]) -> tuple[Tensor]:
        # The head sees the rows that predict a completion token and no others; a large vocabulary
        # takes the memory.
        return (
            arguments[0]
            .flatten(0, 1)
            .index_select(0, batch.label_rows.to(arguments[0].device))[None],
        )

    with _HOOKED, ExitStack() as undo, wide_products(module):
        undo.callback(module.train, training)
        module.train(False)
        for layer in layers:
            hook = decoder_layers(module)[layer].register_forward_hook(
                lambda _, __, o, at=layer: keep(at, o)
            )
            undo.callback(hook.remove)
        undo.callback(head_of(module).register_forward_pre_hook(completions, prepend=True).remove)
        for part in plan_batches(encoded, _TOKENS.get(module.device.type, 1024), packed=False):
            batch = SampleBatch.build(
                part, module.device, packed=False
            )  # padding is to the right of what is looked at
            logits_MV = module(input_ids=batch.ids, use_cache=False).logits.flatten(0, 1)
            labels_M = batch.labels.to(logits_MV.device)
            of_tokens_M = -torch.nn.functional.cross_entropy(
                logits_MV.float(), labels_M, reduction="none"
            )
            for row, (one, (start, end)) in enumerate(
                zip(part, batch.label_segments.bounds, strict=True)
            ):
                of_layers = [
                    states[layer][row, slice(*one.completion)].float().mean(dim=0)
                    for layer in layers
                ]
                means[one.index] = torch.stack([mean_H.to(module.device) for mean_H in of_layers])
                logprobs[one.index] = of_tokens_M[start:end].mean()
    order = range(len(encoded))
    return torch.stack([means[i] for i in order], dim=1), torch.stack([logprobs[i] for i in order])


Scorer = Callable[[Evidence], FloatArray]
"""A fitted detector: takes evidence of S samples and returns their scores, [S]."""

Features = Callable[[Evidence], list[FloatArray]]  # candidates, [S, D] each


@dataclass(frozen=True)
class Detector:
    """What tells rollouts that cheat from others."""

    name: str
    cost: Cost
    # Takes hack samples, clean ones and their groups; for axes these are the sides of pairs, in one
    # order.
    fit: Callable[[Evidence, Evidence, Groups], Scorer]
    forward: bool = (
        True  # whether it looks at activations or log-probabilities, which take a pass of their own
    )


def _fit_sign(of: Scorer, hack: Evidence, clean: Evidence, _: Groups) -> Scorer:
    """Return a number of each sample, or its negative where the clean samples have the larger
    ones.
    """
    sign = 1.0 if auroc(of(hack), of(clean)) >= 0.5 else -1.0
    return lambda evidence: sign * of(evidence)


def _fit_axes(method: str, hack: Evidence, clean: Evidence, _: Groups) -> Scorer:
    """Return cin over modules along five axes of pairs."""
    pairs = PairGradients(_given(hack.gradients), _given(clean.gradients))
    return partial(_cin, pairs.basis(top_k=5, method=method))


def _cin(basis: Basis, evidence: Evidence) -> FloatArray:
    found: FloatArray = cin_over_modules(_given(evidence.gradients), basis).double().numpy()
    return found


def _fit_ridge(
    features: Features, hack: Evidence, clean: Evidence, groups: Groups, *, scaled: bool = False
) -> Scorer:
    """Return a linear read-out of one of several candidate features, each [S, D].

    Cross-validation chooses, of equal candidates the first and of equal strengths the largest.
    ``scaled`` divides coordinates by their spread, for activations, of which a few are huge.
    """
    candidates = [
        np.concatenate(both) for both in zip(features(hack), features(clean), strict=True)
    ]
    y_S = np.repeat([1.0, -1.0], [len(hack), len(clean)])
    labels = np.array([*groups[0], *groups[1]])
    best = (-1.0, 0, 0)
    for chosen, x_SD in enumerate(candidates):
        scores_KS = np.zeros((len(_STRENGTHS), len(y_S)))
        for part in split_groups(labels.tolist()):
            held = np.isin(labels, list(part))
            for row, (w_D, b) in enumerate(_solve(x_SD[~held], y_S[~held], scaled)):
                scores_KS[row, held] = x_SD[held] @ w_D + b
        for row, scores_S in enumerate(scores_KS):
            best = max(best, (auroc(scores_S[y_S > 0], scores_S[y_S < 0]), -chosen, row))
    _, chosen, row = best
    w_D, b = _solve(candidates[-chosen], y_S, scaled)[row]
    return lambda evidence: features(evidence)[-chosen] @ w_D + b


def _solve(x_SD: FloatArray, y_S: FloatArray, scaled: bool) -> list[tuple[FloatArray, float]]:
    """Return weights and offset of a ridge by strength, from the Gram matrix of the samples, of
    which there are few.
    """
    mean_D = x_SD.mean(axis=0)
    offset = y_S.mean()
    spread_D = x_SD.std(axis=0) if scaled else np.ones_like(mean_D)
    spread_D = np.where(spread_D > 0, spread_D, np.inf)
    centred_SD = (x_SD - mean_D) / spread_D
    values_S, vectors_SS = np.linalg.eigh((centred_SD @ centred_SD.T).astype(np.float64))
    values_S = values_S.clip(np.finfo(np.float64).tiny)
    found = []
    for strength in _STRENGTHS:
        dual_S = vectors_SS @ (
            vectors_SS.T @ (y_S - offset) / (values_S + strength * values_S.mean())
        )
        w_D = (dual_S.astype(x_SD.dtype) @ centred_SD) / spread_D
        found.append((w_D, float(offset - mean_D @ w_D)))
    return found


def _fit_combined(
    members: Sequence[Detector], hack: Evidence, clean: Evidence, groups: Groups
) -> Scorer:
    """Return the sum of members that each add something to those before them, by scores of groups
    held out.
    """
    scores = {
        member: np.concatenate(cross_score(member, hack, clean, groups)) for member in members
    }
    scales = {
        member: 1 / (float(scores_S.std()) or math.inf) for member, scores_S in scores.items()
    }
    chosen: list[Detector] = []
    reached = 0.0
    sum_S = np.zeros(len(hack) + len(clean))
    while left := [member for member in members if member not in chosen]:
        tried = [sum_S + scales[member] * scores[member] for member in left]
        values = [auroc(each_S[: len(hack)], each_S[len(hack) :]) for each_S in tried]
        # Of equal ones the member whose sides lie furthest apart.
        gaps = [float(each_S[: len(hack)].min() - each_S[len(hack) :].max()) for each_S in tried]
        best = max(range(len(left)), key=lambda at: (values[at], gaps[at]))
        if values[best] < reached + _GAIN:
            break
        reached = values[best]
        sum_S = tried[best]
        chosen.append(left[best])
    fitted = [(scales[member], member.fit(hack, clean, groups)) for member in chosen]
    return lambda evidence: np.sum([scale * of(evidence) for scale, of in fitted], axis=0)


def _given(part: Any) -> Any:
    """Return a part of evidence, which must have been collected."""
    if part is None:
        raise UsageError(
            "evidence of a cheaper pass", wanted="that of the detector's cost", do="collect it"
        )
    return part


def _count_ngrams(evidence: Evidence) -> list[FloatArray]:
    """Return roots of the numbers of hashed character n-grams, each row of length 1."""
    counts_SD = np.zeros((len(evidence), _HASHES))
    for row, text in enumerate(evidence.texts):
        for n in _NGRAM:
            hashes = [
                zlib.crc32(text[at : at + n].encode()) % _HASHES for at in range(len(text) - n + 1)
            ]
            counts_SD[row] += np.bincount(hashes, minlength=_HASHES)
    roots_SD = np.sqrt(counts_SD)
    return [roots_SD / np.linalg.norm(roots_SD, axis=1, keepdims=True).clip(1e-9)]


def _unit_gradients(evidence: Evidence) -> list[FloatArray]:
    """Return the gradients of all modules side by side, each of length 1."""
    parts = [
        torch.nn.functional.normalize(rows_SR.float(), dim=1)
        for rows_SR in _given(evidence.gradients).values()
    ]
    return [torch.cat(parts, dim=1).numpy()]


def _log_norms(evidence: Evidence) -> FloatArray:
    squares = [
        rows_SR.double().square().sum(dim=1) for rows_SR in _given(evidence.gradients).values()
    ]
    found: FloatArray = torch.stack(squares).sum(dim=0).clamp_min(1e-300).log().numpy()
    return found


def make_detectors(
    names: Collection[str] = DETECTORS, *, basis: Basis | None = None
) -> list[Detector]:
    """Return detectors by their names, cheapest first; axes are those of the basis where one is
    given.

    Raises:
        UsageError: There is no detector of a name.
    """
    if unknown := set(names) - set(DETECTORS):
        raise UsageError(
            f"detector {min(unknown)!r}", wanted=", ".join(DETECTORS), do="choose one of them"
        )
    axes: dict[str, Callable[[Evidence, Evidence, Groups], Scorer]] = {
        "cin-svd": partial(_fit_axes, "svd"),
        "cin-lda": partial(_fit_axes, "lda"),
    }
    if basis is not None:
        axes = {f"cin-{basis.origin.method}": lambda *_: partial(_cin, basis)}
    length: Scorer = lambda evidence: np.array([float(len(text)) for text in evidence.texts])  # noqa: E731
    likelihood: Scorer = lambda evidence: _given(evidence.logprobs).double().numpy()  # noqa: E731
    plain = [
        Detector("length", Cost.TEXT, partial(_fit_sign, length)),
        Detector("ngrams", Cost.TEXT, partial(_fit_ridge, _count_ngrams)),
        Detector("likelihood", Cost.FORWARD, partial(_fit_sign, likelihood)),
        Detector(
            "probe",
            Cost.FORWARD,
            partial(_fit_ridge, lambda of: [*_given(of.activations).numpy()], scaled=True),
        ),
        Detector("norm", Cost.BACKWARD, partial(_fit_sign, _log_norms), forward=False),
        *(Detector(name, Cost.BACKWARD, fit, forward=False) for name, fit in axes.items()),
        Detector("ridge", Cost.BACKWARD, partial(_fit_ridge, _unit_gradients), forward=False),
    ]
    every = [*plain, Detector("combined", Cost.BACKWARD, partial(_fit_combined, plain))]
    return [each for each in every if basis is not None or each.name in names]


def cross_score(
    detector: Detector, hack: Evidence, clean: Evidence, groups: Groups
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Return the scores of hack and of clean samples by fits to other groups; too few groups are a
    UsageError.
    """
    sides = (hack, clean)
    found = tuple(np.zeros(len(side)) for side in sides)
    for part in split_groups([*groups[0], *groups[1]]):
        held = [[row for row, group in enumerate(of) if group in part] for of in groups]
        kept = [[row for row, group in enumerate(of) if group not in part] for of in groups]
        if not all(kept):
            raise UsageError(
                "all samples of a kind in a few groups",
                wanted="more groups",
                do="add samples of others",
            )
        left = tuple([of[row] for row in rows] for of, rows in zip(groups, kept, strict=True))
        scorer = detector.fit(hack.take(kept[0]), clean.take(kept[1]), (left[0], left[1]))
        for side, rows, scores_S in zip(sides, held, found, strict=True):
            if rows:
                scores_S[rows] = scorer(side.take(rows))
    return found[0], found[1]


@dataclass(frozen=True, slots=True)
class Threshold:
    """Score above which a sample is flagged, and what that costs."""

    value: float
    lost: float  # share of the clean samples at hand that lie above it
    low: float  # 95 % interval of that share over groups (`assay.stats.grouped_share_interval`)
    high: float
    caught: float  # share of the hack samples at hand that lie above it


def check_promise(n: int, promised: float) -> int:
    """Return the rank among n clean scores that keeps a promise; too few samples for that are a
    UsageError.
    """
    if not 1e-9 < promised < 1:
        raise UsageError(
            f"promised={promised}", wanted="a share in (0, 1)", do="choose one, such as 0.05"
        )
    rank = math.ceil((n + 1) * (1 - promised))
    if rank > n:
        least = math.ceil(1 / promised) - 1
        do = "add pairs, or let clean_lost be larger"
        raise UsageError(
            f"{n} clean samples, of which {promised:g} may be lost",
            wanted=f"at least {least}",
            do=do,
        )
    return rank


def check_pairs(pairs: Sequence[Pair], promised: float) -> list[str]:
    """Return the groups of pairs, and refuse what no detector can be fitted to, or keeps no such
    promise.
    """
    check_promise(len(pairs), promised)
    check_prompts(pairs)
    groups = [pair.group for pair in pairs]
    if len(set(groups)) < 3:
        do = "add pairs of other groups"
        raise UsageError(
            f"pairs of {len(set(groups))} groups",
            wanted="three or more, for fits to the others",
            do=do,
        )
    return groups


def choose_threshold(
    hack: npt.ArrayLike,
    clean: npt.ArrayLike,
    promised: float = 0.05,
    groups: Sequence[object] | None = None,
) -> Threshold:
    """Return the threshold with the fewest mistakes among those that lose at most the promised
    share of clean samples.

    Mistakes are shares, of hacks that are missed and of clean samples that are lost; a threshold
    lies in the middle between two scores. ``groups`` of the clean samples widen the interval;
    without them each sample is one.
    """
    hack_N = np.sort(np.asarray(hack, float))
    clean_N = np.sort(np.asarray(clean, float))
    n = len(clean_N)
    least = float(clean_N[check_promise(n, promised) - 1])
    every = np.unique(np.concatenate([hack_N, clean_N]))
    values = np.append((every[:-1] + every[1:]) / 2, every[-1])[every >= least]
    caught = 1 - hack_N.searchsorted(values, side="right") / len(hack_N)
    lost = 1 - clean_N.searchsorted(values, side="right") / n
    best = int(np.argmax(caught - lost))
    over = np.asarray(clean) > values[best]
    ends = grouped_share_interval(over, range(n) if groups is None else groups)
    return Threshold(float(values[best]), float(over.mean()), *ends, float(caught[best]))


@dataclass(frozen=True)
class DetectorResult:
    """How well a detector tells held-out samples apart."""

    name: str
    cost: str  # of one sample, in words
    auroc: BootstrapInterval  # with the 95 % interval of its group bootstrap
    threshold: (
        Threshold | None
    )  # that promises 5 % of clean samples lost; None where there are too few for that


@dataclass(frozen=True)
class Comparison:
    """Detectors side by side, on the same held-out samples."""

    results: tuple[DetectorResult, ...]
    best: str | None  # name of the one to use; None where none is shown to be better than chance
    says: str  # why, in a sentence

    @property
    def table(self) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
        """Columns and rows of a table of all detectors."""
        rows: list[tuple[str, ...]] = []
        for one in self.results:
            value = one.auroc
            at = one.threshold
            shown = (
                ("", "")
                if at is None
                else (f"{at.caught:.3f}", f"{at.lost:.3f} ({at.low:.3f} to {at.high:.3f})")
            )
            rows.append(
                (
                    one.name,
                    f"{value.value:.3f}",
                    f"{value.low:.3f} to {value.high:.3f}",
                    *shown,
                    one.cost,
                )
            )
        return ("detector", "AUROC", "95% interval", "hacks caught", "clean lost", "pass"), rows


def compare_detectors(
    hack: Evidence, clean: Evidence, groups: Groups, detectors: Sequence[Detector] | None = None
) -> Comparison:
    """Return how detectors do, each fitted to other groups than those it is asked of.

    The one to use has the highest AUROC, or is a cheaper one within 0.01 of that. It must lie above
    chance with the confidence that so many looks ask for.

    Raises:
        UsageError: As :func:`cross_score`.
    """
    found = []
    ranked = []
    chosen = make_detectors() if detectors is None else list(detectors)
    for detector in chosen:
        scores = cross_score(detector, hack, clean, groups)
        measured = group_bootstrap(auroc, scores, groups)
        threshold = choose_threshold(*scores, groups=groups[1]) if len(clean) >= _ENOUGH else None
        found.append(DetectorResult(detector.name, detector.cost.name.lower(), measured, threshold))
        ranked.append((measured.value, detector, scores))
    highest = max(value for value, _, _ in ranked)
    near = [one for one in ranked if one[0] >= highest - _GAIN]
    value, best, scores = min(near, key=lambda one: (one[1].cost, -one[0]))
    if group_bootstrap(auroc, scores, groups, confidence=1 - 0.05 / len(chosen)).low <= 0.5:
        says = (
            f"undecided: {best.name} has the highest AUROC of {len(ranked)}, and may be at "
            f"chance: add pairs"
        )
        return Comparison(tuple(found), None, says)
    return Comparison(tuple(found), best.name, f"use {best.name}, with an AUROC of {value:.3f}")


@dataclass(frozen=True, eq=False)
class RolloutJudge:
    """A fitted detector with its threshold, for rollouts of the model that it was fitted with, or
    of one trained on.

    ``how`` are keywords of :func:`collect_evidence`.
    """

    detector: Detector
    scorer: Scorer
    threshold: Threshold
    model: "Model | PreTrainedModel"
    how: Mapping[str, Any] = field(default_factory=dict)

    def flags(self, samples: Sequence[Sample]) -> list[bool]:
        """Return which of the samples are flagged.

        One without a prompt or a completion never is. One that cannot be read is: a policy may
        write tokens whose text is longer than the context.
        """
        flags = [False] * len(samples)
        rows = [row for row, sample in enumerate(samples) if sample.prompt and sample.completion]
        if rows:
            chosen = [samples[row] for row in rows]
            try:
                found = collect_evidence(chosen, self.model, cost=self.detector.cost, **self.how)
            except DataError:
                return [True] if len(samples) == 1 else [self.flags([one])[0] for one in samples]
            for row, score in zip(rows, self.scorer(found), strict=True):
                flags[row] = bool(score > self.threshold.value)
        return flags


def fit_judge(
    pairs: Sequence[Pair],
    model: "Model | PreTrainedModel",
    *,
    detector: str = "cin-lda",
    promised: float = 0.05,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    svd: SVDCache | None = None,
    progress: Progress | None = None,
) -> RolloutJudge:
    """Return a detector fitted to pairs, with a threshold from their held-out scores.

    Args:
        pairs: Pairs of a hack and a clean completion, in three groups or more.
        model: Model whose passes it looks at.
        detector: Name in ``DETECTORS``.
        promised: Share of clean samples, of such as the clean sides are, that may be lost.
        tokenizer: Tokenizer, as in :func:`assay.vhack.per_sample_gradients`, which also says what
            it raises.
        svd: Factors of all weights; None computes them.
        progress: Function called with the number of gradients done and of all.

    Raises:
        UsageError: There is no such detector, or there are too few pairs or groups.
        DataError: A prompt occurs in two groups, or a pair is too long for the model.
    """
    (chosen,) = make_detectors([detector])
    groups = check_pairs(pairs, promised)
    samples = [pair.samples()[side] for side in (0, 1) for pair in pairs]
    if svd is None and chosen.cost == Cost.BACKWARD:
        names = [f"sample {row}" for row in range(len(samples))]
        encode_samples(samples, model, names, tokenizer)  # refuses before the first decomposition
        svd = weight_svd(model)  # once: training moves the weights, and the axes belong to these
    how: dict[str, Any] = {"tokenizer": tokenizer, "svd": svd, "forward": chosen.forward}
    found = collect_evidence(samples, model, cost=chosen.cost, progress=progress, **how)
    sides = found.take(range(len(pairs))), found.take(range(len(pairs), len(samples)))
    return RolloutJudge(chosen, *fit_scorer(chosen, *sides, (groups, groups), promised), model, how)


def fit_scorer(
    detector: Detector, hack: Evidence, clean: Evidence, groups: Groups, promised: float = 0.05
) -> tuple[Scorer, Threshold]:
    """Return a detector fitted to all samples, and the threshold of their scores by fits to other
    groups.
    """
    threshold = choose_threshold(*cross_score(detector, hack, clean, groups), promised, groups[1])
    return detector.fit(hack, clean, groups), threshold
