"""Detectors of rollouts that cheat: what they look at, how they are compared, and what a threshold
promises.
"""

import copy
import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import peft
import pytest
import torch

from assay.errors import DataError, ModelError, UsageError
from assay.vhack import Basis, weight_svd
from assay.vhack.detectors import Detector, Needs, fit_judge
from assay.vhack.detectors import evidence as _evidence
from assay.vhack.detectors import rollout_judge as _rollout_judge
from assay.vhack.detectors.comparison import compare_detectors, make_detectors
from assay.vhack.detectors.detector import cross_score, make_detector
from assay.vhack.detectors.evidence import LabelledEvidence, SampleEvidence, collect_evidence
from assay.vhack.detectors.facts import FACTS
from assay.vhack.detectors.rollout_judge import fit_scorer
from assay.vhack.detectors.threshold import choose_threshold
from assay.vhack.directions.gradients import per_sample
from assay.vhack.names import DETECTORS
from tests.usual import usual


def evidence(n, told, shift=0.0, seed=0, texts=None):
    """Evidence in which one part tells the samples apart by ``shift``, and all others are noise."""
    generator = np.random.default_rng(seed)
    noise = lambda *shape: torch.from_numpy(generator.normal(size=shape)).float()  # noqa: E731
    parts = {"activations": noise(2, n, 6), "logprobs": noise(n), "gradients": noise(n, 8)}
    if told == "activations":
        parts[told][1, :, 0] += shift
    elif told == "logprobs":
        parts[told] += shift
    elif told == "gradients":
        parts[told][:, 0] += shift
    return SampleEvidence(
        tuple(texts or ("a b " * 5,) * n),
        parts["activations"],
        parts["logprobs"],
        {"module": parts["gradients"]},
        noise(n, len(FACTS)).double(),
    )


@pytest.mark.parametrize(
    ("told", "best"),
    [
        ("texts", "ngrams"),
        pytest.param("logprobs", "likelihood", marks=pytest.mark.slow),
        pytest.param("activations", "probe", marks=pytest.mark.slow),
        pytest.param("gradients", "cin-svd", marks=pytest.mark.slow),
    ],
)
def test_the_cheapest_detector_that_sees_a_difference_is_chosen(told, best):
    groups = [f"{n % 10}" for n in range(40)]
    texts = ["print x " * 3 if told == "texts" else "a b " * 6] * 40
    sides = evidence(40, told, 9.0, 1, texts), evidence(40, told, -9.0, 2, ["a b " * 6] * 40)
    compared = compare_detectors(LabelledEvidence(*sides, groups, groups))
    assert [one.name for one in compared.results] == list(DETECTORS)
    assert compared.best == best


@pytest.mark.slow
def test_labels_without_meaning_leave_it_undecided():
    groups = [f"{n % 10}" for n in range(40)]
    sides = evidence(40, "nothing", seed=3), evidence(40, "nothing", seed=4)
    compared = compare_detectors(LabelledEvidence(*sides, groups, groups))
    assert compared.best is None
    assert "undecided" in compared.says


def test_no_group_is_scored_by_a_fit_that_has_seen_it():
    """Each group has a text of its own on both sides, the other way round: only a fit to itself
    could tell them.
    """
    groups = [f"{n}" for n in range(12)]
    hack, clean = ([chr(97 + n + 12 * side) * 9 for n in range(12)] for side in (0, 1))
    sides = (evidence(12, "nothing", texts=hack), evidence(12, "nothing", texts=clean))
    ngrams = make_detector("ngrams")
    labelled = LabelledEvidence(*sides, groups, groups)
    scorer = ngrams.fit(labelled)
    assert scorer(sides[0]).min() > scorer(sides[1]).max()
    scores = np.concatenate(cross_score(ngrams, labelled))
    assert np.ptp(scores) < 0.5 * np.ptp(np.concatenate([scorer(side) for side in sides]))
    with pytest.raises(UsageError):
        cross_score(ngrams, LabelledEvidence(*sides, ["a"] * 12, ["a"] * 12))


@pytest.mark.parametrize("promised", usual([0.05, 0.2], 0.05))
def test_a_threshold_loses_no_more_clean_samples_than_it_promises(promised):
    generator = np.random.default_rng(0)
    lost = []
    for _ in range(400):
        threshold = choose_threshold(
            generator.normal(2, 1, 30), generator.normal(size=48), promised
        )
        lost.append(float((generator.normal(size=400) > threshold.value).mean()))
        assert threshold.low <= threshold.lost <= threshold.high
        assert threshold.lost <= promised
    assert np.mean(lost) < promised
    for clean, share in ((range(18), 0.05), (range(99), 0.0), (range(99), 1.0)):
        with pytest.raises(UsageError):
            choose_threshold([1.0], clean, share)


@pytest.mark.parametrize("promised", usual([None, 0.1, 0.3], None, 0.1))
@pytest.mark.parametrize("groups", usual([4, 8, 19, 64], 19))
def test_a_new_group_loses_no_more_than_promised_on_average(groups, promised):
    """Groups of unequal sizes, whose scores are alike: by the first versions, 0.08 of 8 groups."""
    if promised is not None and promised < 1 / (groups + 1):
        with pytest.raises(UsageError) as refused:
            choose_threshold([1.0], range(groups), promised, range(groups))
        assert all((refused.value.seen, refused.value.wanted, refused.value.do))
        return
    generator = np.random.default_rng(groups)
    lost = []
    for _ in range(200):
        sizes = generator.choice([1, 2, 6, 20], size=groups)
        names = np.repeat(np.arange(groups), sizes)
        clean = generator.normal(size=groups)[names] + 0.2 * generator.normal(size=len(names))
        hack = generator.normal(0.5, 1, 40)
        threshold = choose_threshold(hack, clean, promised, names.tolist())
        new = generator.normal(size=400) + 0.2 * generator.normal(size=400)
        lost.append(float((new > threshold.value).mean()))
    assert threshold.promised == (promised or max(0.05, 1 / (groups + 1)))
    standard_error = np.std(lost) / len(lost) ** 0.5
    assert np.mean(lost) <= threshold.promised + 3 * standard_error


def test_a_judge_says_what_few_groups_can_promise(small_pairs):
    count = len({pair.group for pair in small_pairs})
    judge = fit_judge(small_pairs, None, detector="ngrams")
    assert judge.threshold.promised == 1 / (count + 1)
    with pytest.raises(UsageError):
        fit_judge(small_pairs, None, detector="ngrams", promised=0.05)


def test_evidence_is_what_the_model_computes_for_each_sample_alone(
    small_model, byte_tokenizer, samples, small_svd
):
    found = collect_evidence(samples, small_model, tokenizer=byte_tokenizer, svd=small_svd)
    module = small_model.module
    layers = module.config.num_hidden_layers
    for row, sample in enumerate(samples):
        prompt, completion = (
            byte_tokenizer(text)["input_ids"] for text in (sample.prompt, sample.completion)
        )
        with torch.no_grad():
            out = module(torch.tensor([prompt + completion]), output_hidden_states=True)
        logprobs_TV = out.logits[0, len(prompt) - 1 : -1].float().log_softmax(dim=-1)
        wanted = logprobs_TV.gather(1, torch.tensor(completion)[:, None]).mean()
        assert found.logprobs[row] == pytest.approx(float(wanted), abs=1e-4)
        first_H = out.hidden_states[1][0, len(prompt) :].float().mean(dim=0)
        torch.testing.assert_close(found.activations[0, row], first_H, rtol=1e-3, atol=1e-4)
    assert found.activations.shape[0] == layers
    assert found.gradients.keys() == small_svd.keys()
    cheap = collect_evidence(samples, small_model, tokenizer=byte_tokenizer, needs=Needs.TEXTS)
    assert cheap.activations is None
    assert cheap.gradients is None


@pytest.mark.parametrize("detector", ["ngrams", "probe", "cin-lda"])
def test_a_judge_flags_hack_sides_and_leaves_clean_ones(
    small_model, byte_tokenizer, small_svd, small_pairs, detector
):
    how = {"tokenizer": byte_tokenizer, "svd": small_svd, "promised": 0.2}
    judge = fit_judge(small_pairs, small_model, detector=detector, **how)
    hack, clean = zip(*(pair.samples() for pair in small_pairs), strict=True)
    empty, long = (hack[0].__class__("prompt", text) for text in ("", "é" * 4096))
    assert sum(judge.flags(hack)) >= 7
    assert sum(judge.flags([*clean, empty])) <= 2
    with ThreadPoolExecutor(4) as threads:  # as verl pays rollouts
        assert [
            flag for (flag,) in threads.map(lambda one: judge.flags([one]), hack)
        ] == judge.flags(hack)
    assert detector == "ngrams" or judge.flags([empty, long, *hack]) == [
        False,
        True,
        *judge.flags(hack),
    ]
    # A text that UTF-8 cannot write is flagged, and no neighbour for it.
    unwritable = replace(clean[0], completion=clean[0].completion + "\ud800")
    assert judge.flags([unwritable, *clean]) == [True, *judge.flags(clean)]


@pytest.mark.parametrize("detector", ["probe", "likelihood"])
def test_a_rollout_with_states_that_are_not_finite_is_flagged_and_no_neighbour(
    small_model, byte_tokenizer, small_pairs, detector
):
    module = copy.deepcopy(small_model.module)
    judge = fit_judge(
        small_pairs, module, detector=detector, tokenizer=byte_tokenizer, promised=0.2
    )
    samples = [pair.samples()[1] for pair in small_pairs]
    scores = judge.scores(samples)
    (token,) = byte_tokenizer("\x7f")["input_ids"]
    # Apart from the head, which every sample needs.
    embeddings = copy.deepcopy(module.get_input_embeddings())
    embeddings.weight.data[token] = torch.nan
    module.set_input_embeddings(embeddings)
    broken = replace(samples[0], completion=samples[0].completion + "\x7f")
    assert judge.scores([broken, *samples]) == pytest.approx([math.inf, *scores])


def test_a_judge_by_axes_judges_the_same_after_peft_has_wrapped_the_model(
    small_model, byte_tokenizer, small_svd, small_pairs
):
    module = copy.deepcopy(small_model.module)
    judge = fit_judge(small_pairs, module, tokenizer=byte_tokenizer, svd=small_svd, promised=0.2)
    hack = [pair.samples()[0] for pair in small_pairs]
    before = judge.flags(hack)
    wrapped = peft.get_peft_model(module, peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    assert judge.flags(hack) == before
    wrapped.base_model.model.model.layers[0].mlp.up_proj.weight = torch.nn.Parameter(
        torch.ones(2, 2).byte(), False
    )
    with pytest.raises(ModelError):
        judge.flags(hack)


@pytest.mark.parametrize(("detector", "count"), [("ngrams", 2), ("combined", 3)])
def test_pairs_of_too_few_groups_are_refused_before_any_pass(small_pairs, detector, count):
    pairs = [replace(pair, group=f"{row % count}") for row, pair in enumerate(small_pairs)]
    with pytest.raises(UsageError) as refused:
        fit_judge(pairs, None, detector=detector)
    assert refused.value.seen == f"pairs of {count} groups"


def test_a_judge_is_not_fitted_to_a_prompt_of_two_groups(small_pairs):
    again = replace(small_pairs[0], hack="another", group="other")
    with pytest.raises(DataError):
        fit_judge([*small_pairs, again], None, detector="ngrams", promised=0.2)
    with pytest.raises(UsageError):
        fit_judge(
            [one for one in small_pairs if one.group < "group 2"],
            None,
            detector="ngrams",
            promised=0.3,
        )


def test_a_judge_by_axes_decomposes_the_weights_once_and_takes_no_pass_for_activations(
    small_model, byte_tokenizer, small_pairs, monkeypatch
):
    decompositions = []

    def decompose(model):
        decompositions.append(weight_svd(model))
        return decompositions[-1]

    monkeypatch.setattr(_rollout_judge, "weight_svd", decompose)
    monkeypatch.setattr(_evidence, "forward_samples", None)
    judge = fit_judge(
        small_pairs, small_model, detector="cin-lda", tokenizer=byte_tokenizer, promised=0.2
    )
    monkeypatch.setattr(per_sample, "weight_svd", None)
    judge.flags([pair.samples()[0] for pair in small_pairs])
    assert len(decompositions) == 1


def test_a_given_basis_takes_the_place_of_fitted_axes(small_pairs):
    basis = Basis(
        {"module": torch.eye(1, 8)}, {"module": torch.ones(1)}, {"module": torch.tensor([[1, 0]])}
    )
    detectors = make_detectors(basis=basis)
    assert [one.name for one in detectors if one.name.startswith("cin")] == [
        f"cin-{basis.origin.method}"
    ]
    scorer = next(one for one in detectors if one.name.startswith("cin")).fit(None)
    along = SampleEvidence(("a", "b"), gradients={"module": torch.eye(2, 8)})
    assert scorer(along).tolist() == [1.0, 0.0]


def test_a_threshold_lies_in_the_middle_of_a_gap_and_with_none_where_the_fewest_mistakes_are():
    clean = np.linspace(0, 1, 40)
    hack = np.linspace(2, 3, 40)
    held = choose_threshold(hack, clean, 0.2)
    assert (held.value, held.lost, held.caught) == (1.5, 0.0, 1.0)
    grouped = choose_threshold(hack, clean, 0.2, [n // 10 for n in range(40)])
    assert (grouped.value, grouped.high > 3 * held.high) == (
        1.5,
        True,
    )  # of four groups, not of forty samples
    # A fifth may be lost: one clean sample among the hacks costs less than every hack below it.
    mixed = choose_threshold(hack, [*clean[:-1], 2.5], 0.2)
    assert mixed.value == pytest.approx((clean[-2] + 2) / 2)
    assert (mixed.lost, mixed.caught) == (1 / 40, 1.0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("told", "shift"), [("nothing", 0.0), ("activations", 1.0), ("gradients", 1.0)]
)
def test_fitted_detectors_lose_no_more_of_fresh_clean_samples_than_promised(told, shift):
    """Also where hack and clean are names without meaning, and whatever the fit makes of them."""
    groups = [f"{n % 12}" for n in range(48)]
    lost = []
    for seed in range(0, 30, 3):
        sides = [
            evidence(n, told, sign * shift, seed + n % 5)
            for n, sign in ((48, 1), (48, -1), (301, -1))
        ]
        sides[0] = evidence(48, told, shift, 100 + seed)
        for detector in map(make_detector, ["probe", "norm", "cin-lda", "ridge"]):
            scorer, threshold = fit_scorer(
                detector, LabelledEvidence(*sides[:2], groups, groups), 0.1
            )
            lost.append(float((scorer(sides[2]) > threshold.value).mean()))
    # The standard error of the mean is about 0.012.
    assert np.mean(lost) < 0.1 + 0.02


@pytest.mark.slow
def test_a_combination_takes_what_adds_something():
    groups = [f"{n % 10}" for n in range(40)]
    texts = ["print x " * 3] * 20 + [
        "a b " * 6
    ] * 20  # half of the hacks are seen in their texts, the others elsewhere
    hack = evidence(40, "nothing", 0.0, 1, texts)
    clean = evidence(40, "nothing", 0.0, 2, ["a b " * 6] * 40)
    hack.gradients["module"][20:, 0] += 9.0
    found = {
        one.name: one.auroc.value
        for one in compare_detectors(LabelledEvidence(hack, clean, groups, groups)).results
    }
    assert (
        found["combined"] > max(value for name, value in found.items() if name != "combined") - 0.01
    )
    assert found["combined"] > 0.95


class CapitalsDetector(Detector):
    """A detector of one's own: hacks are written in capitals."""

    needs = Needs.TEXTS

    def fit(self, evidence):
        return lambda samples: np.array([float(text.isupper()) for text in samples.texts])


def test_a_detector_is_added_by_a_class_and_one_line(monkeypatch, small_pairs):
    monkeypatch.setitem(DETECTORS, "capitals", f"{__name__}:CapitalsDetector")
    shouting = [replace(pair, hack=pair.hack.upper()) for pair in small_pairs]
    judge = fit_judge(shouting, None, detector="capitals", promised=0.2)
    assert judge.flags([pair.samples()[0] for pair in shouting]) == [True] * len(shouting)
    assert not any(judge.flags([pair.samples()[1] for pair in shouting]))


def test_a_detector_that_is_not_registered_is_refused():
    with pytest.raises(UsageError):
        make_detector("capitals")
