"""The definition of sampling, step by step, and the parameters that it takes."""

import math
import pickle

import numpy as np
import pytest

from assay import streams
from assay.errors import UsageError
from assay.poc.responses import Sampling
from assay.poc.responses.sampling import counts_before, find_kept, mark_tokens, penalise, scores

LOGITS = np.array([[2.0, -1.0, 0.5, 2.0, -np.inf, 1.0]], dtype=np.float32)
SEEDS = np.array([7], dtype=np.uint32)


def kept_tokens(**parameters) -> list[int]:
    sampling = Sampling(**parameters)
    return np.flatnonzero(find_kept(LOGITS / np.float32(sampling.temperature), sampling)[0]).tolist()


def test_scores_are_logits_over_temperature_plus_noise():
    noise = np.asarray(streams.get_backend("numpy", "cpu").gumbels(SEEDS, 6))
    wanted = LOGITS / np.float32(0.7) + noise
    np.testing.assert_array_equal(scores(LOGITS, Sampling(temperature=0.7), SEEDS), wanted)
    assert scores(LOGITS[0], Sampling(), SEEDS).shape == (1, 6)


def test_top_k_keeps_equal_ones():
    assert kept_tokens(top_k=1) == [0, 3]
    assert kept_tokens(top_k=3) == [0, 3, 5]
    assert kept_tokens(top_k=5) == kept_tokens(top_k=100) == kept_tokens() == [0, 1, 2, 3, 5]


def test_min_p_is_relative_to_the_likeliest():
    assert kept_tokens(min_p=1.0) == [0, 3]
    assert kept_tokens(min_p=math.exp(-1.01)) == [0, 3, 5]
    assert kept_tokens(min_p=math.exp(-0.99)) == [0, 3]
    assert kept_tokens(min_p=math.exp(-0.99), temperature=2.0) == [0, 2, 3, 5]  # after the temperature


def test_top_p_keeps_the_shortest_beginning():
    weights = np.exp(LOGITS[0].astype(float))
    first = weights[0] / weights.sum()
    assert kept_tokens(top_p=1e-6) == [0]
    assert kept_tokens(top_p=first * 0.999) == [0]
    assert kept_tokens(top_p=first * 1.001) == [0, 3]
    assert kept_tokens(top_p=first * 2.001) == [0, 3, 5]
    assert kept_tokens(top_p=0.999999) == [0, 1, 2, 3, 5]


def test_filters_come_one_after_the_other():
    """Top-p counts what min-p and top-k have left: with three tokens left, two of them have more than 0.8 of it."""
    weights = np.exp(LOGITS[0].astype(float))
    of_all, of_three = weights[[0, 3]].sum() / weights.sum(), weights[[0, 3]].sum() / weights[[0, 3, 5]].sum()
    between = (of_all + of_three) / 2
    assert kept_tokens(top_p=between) == [0, 3, 5]
    assert kept_tokens(top_p=between, top_k=3) == kept_tokens(top_p=between, min_p=0.3) == [0, 3]


def test_penalties_and_bias():
    prompt_V = mark_tokens([1, 5], 6)
    counts_NV = np.array([[2, 0, 1, 0, 1, 0]])
    sampling = Sampling(
        repetition_penalty=2.0, frequency_penalty=0.5, presence_penalty=0.25, logit_bias={3: -4.0, 4: 100.0}
    )
    found = penalise(LOGITS, sampling, prompt_V=prompt_V, counts_NV=counts_NV)[0]
    #   2/2 - 1 - .25, -1·2, .5/2 - .5 - .25, 2 - 4 unseen, forbidden stays so, 1/2 of the prompt
    assert found.tolist() == [-0.25, -2.0, -0.5, -2.0, -math.inf, 0.5]


def test_the_bias_comes_before_the_penalty():
    sampling = Sampling(repetition_penalty=2.0, logit_bias={1: 3.0})
    assert penalise(LOGITS, sampling, prompt_V=mark_tokens([1], 6))[0, 1] == 1.0


def test_counts_are_of_the_tokens_before():
    output = [3, 3, 1, 3, 0]
    found = counts_before(output, 4, 1, 5)
    assert found.tolist() == [np.bincount(output[:t], minlength=4).tolist() for t in range(1, 5)]
    assert counts_before(output, 4, 0, 1).tolist() == [[0, 0, 0, 0]]
    assert counts_before([], 4, 0, 0).shape == (0, 4)


def test_forbidden_tokens_stay_forbidden():
    found = scores(LOGITS, Sampling(repetition_penalty=0.5, frequency_penalty=-2, logit_bias={4: 100}), SEEDS)
    assert found[0, 4] == -np.inf


def test_parameters_are_plain_numbers_in_one_form():
    sampling = Sampling(temperature=1, frequency_penalty=-0.0, logit_bias={7: 1, 3: -2})
    assert isinstance(sampling.temperature, float)
    assert str(sampling.frequency_penalty) == "0.0"
    assert list(sampling.as_dict()["logit_bias"].items()) == [("3", -2.0), ("7", 1.0)]
    assert sampling == Sampling(logit_bias={3: -2.0, 7: 1.0})
    assert hash(sampling) == hash(Sampling(logit_bias={3: -2.0, 7: 1.0}))
    assert pickle.loads(pickle.dumps(sampling)) == sampling


@pytest.mark.parametrize(
    "parameters",
    [
        {"temperature": -0.1},
        {"temperature": 0.005},
        {"temperature": math.nan},
        {"temperature": math.inf},
        {"temperature": "1"},
        {"temperature": True},
        {"temperature": 10**400},
        {"top_k": -1},
        {"top_k": 1.0},
        {"top_k": 2**24 + 1},
        {"top_p": 0.0},
        {"top_p": 1.01},
        {"min_p": -0.1},
        {"min_p": 1.1},
        {"repetition_penalty": 0.0},
        {"frequency_penalty": 2.1},
        {"presence_penalty": -2.1},
        {"logit_bias": {-1: 1.0}},
        {"logit_bias": {2**24: 1.0}},
        {"logit_bias": {"3": 1.0}},
        {"logit_bias": {3: 101.0}},
        {"logit_bias": {3: math.nan}},
        {"logit_bias": [(3, 1.0)]},
        {"logit_bias": dict.fromkeys(range(1025), 1.0)},
    ],
)
def test_parameters_out_of_range_are_refused(parameters: dict):
    with pytest.raises(UsageError, match=next(iter(parameters))):
        Sampling(**parameters)


def test_shapes_and_tokens_that_do_not_fit_are_refused():
    with pytest.raises(UsageError, match="2 seeds"):
        scores(LOGITS, Sampling(), np.array([1, 2], np.uint32))
    with pytest.raises(UsageError, match="token 6"):
        scores(LOGITS, Sampling(logit_bias={6: 1.0}), SEEDS)
