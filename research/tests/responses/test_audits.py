"""Audits that are drawn from responses, and the formulas of the rivals, on numbers that are checked
by hand.
"""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from assay_research.responses import rivals
from assay_research.responses.field import (
    ALPHA,
    GRID,
    MOST,
    POWER,
    Looks,
    crossings,
    drawn_means,
    share_by,
    threshold,
)
from assay_research.responses.rivals import RIVALS, Reply
from assay_research.runs.spread import first_reached

RNG = np.random.default_rng(0)
N = 64
D = 96
K = 5
STATES = torch.randn(N, D, generator=torch.Generator().manual_seed(0))
LOGPROBS = -torch.rand(N, K, generator=torch.Generator().manual_seed(1)) - 0.1
EXACT = Reply(
    margins=np.zeros(N),
    logprobs=LOGPROBS,
    own_logprobs=LOGPROBS.double(),
    states=STATES,
    own_states=STATES,
    sigma=0.1,
)


def test_means_are_of_the_first_tokens():
    counting = np.arange(64.0)  # two chunks, of which an audit may begin with either
    means = drawn_means({"a": [counting] * 3}, 20, np.random.default_rng(1))["a"]
    assert means.shape == (20, len(GRID))
    first = {tuple(row[[GRID.index(n) for n in (1, 2, 32)]]) for row in means}
    assert first == {(0.0, 0.5, 15.5), (32.0, 32.5, 47.5)}


def test_a_shift_of_the_mean_is_caught_after_as_many_tokens_as_it_needs():
    honest = [RNG.exponential(size=256) for _ in range(200)]
    limit = threshold(drawn_means({"a": honest}, 4000, RNG)["a"])
    again = (drawn_means({"a": honest}, 4000, RNG)["a"] > limit).mean(axis=0)
    assert (again <= 4 * ALPHA).all()
    caught = {}
    for factor in (1.0, 1.5, 3.0):
        means = drawn_means({"a": [factor * one for one in honest]}, 500, RNG)["a"]
        caught[factor] = first_reached(GRID, (means > limit).mean(axis=0), POWER)
    assert caught[1.0] is None
    assert caught[3.0] < caught[1.5] < MOST


def test_a_crossing_is_the_first_look_over_the_bound():
    needed = -math.log(ALPHA)
    slow = Looks(np.array([[0.0], [needed / 2]]), np.array([32, 40]), 40)
    found = crossings([slow], lambda sums: sums[..., 0], 3, np.random.default_rng(0))
    assert found.tolist() == [80.0] * 3, "the second response brings it over the bound, at its end"
    quick = Looks(np.array([[needed], [0.0]]), np.array([32, 64]), 64)
    assert (
        crossings([quick], lambda sums: sums[..., 0], 2, np.random.default_rng(0)).tolist()
        == [32.0] * 2
    )
    never = Looks(np.zeros((1, 1)), np.array([64]), 64)
    shares = share_by(crossings([never], lambda sums: sums[..., 0], 2, np.random.default_rng(0)))
    assert first_reached(GRID, shares, POWER) is None
    assert shares[-1] == pytest.approx(0.0)


def test_an_exact_reply_scores_nothing():
    for rival in RIVALS:
        scores_n = rival.score(EXACT)
        assert scores_n.shape == (N,)
        least = math.log(2) if rival.name == "GLS" else 0.0
        np.testing.assert_allclose(
            scores_n[~np.isnan(scores_n)], least, atol=5e-3, err_msg=rival.name
        )


def test_the_gumbel_likelihood_is_a_tail_of_the_normal():
    reply = replace(EXACT, margins=np.array([0.1 * math.sqrt(2), np.inf]))
    found = rivals.gumbel_likelihood(reply)
    assert found[0] == pytest.approx(-math.log(0.15865525), rel=1e-6)  # one standard deviation
    assert np.isfinite(found[1])
    assert found[1] > 20


def test_the_distance_of_log_probabilities_is_relative():
    reply = replace(EXACT, own_logprobs=3 * LOGPROBS.double())
    np.testing.assert_allclose(rivals.logprob_distance(reply), 0.5)
    assert rivals.logit_spread(
        [replace(EXACT, own_logprobs=LOGPROBS.double() + 0.25)]
    ) == pytest.approx(0.25)


def test_projections_keep_distances_on_average():
    reply = replace(
        EXACT, states=STATES + 0.1 * torch.randn(N, D, generator=torch.Generator().manual_seed(2))
    )
    found = np.square(rivals.activation_difr(reply, 12)).mean()
    assert found == pytest.approx(0.01 * D, rel=0.25)


def test_toploc_counts_exponents_and_mantissas():
    assert rivals.toploc(replace(EXACT, states=2 * STATES)).tolist() == [[128.0, 128.0, 128.0]] * 2
    # Multiplied by 1 + 1/64, mantissas of seven bits move by two to four where the exponent stays.
    moved = rivals.toploc(replace(EXACT, states=STATES * (1 + 1 / 64)))
    assert (moved[:, 0] < 20).all()
    assert ((moved[:, 1] > 1) & (moved[:, 1] < 5)).all()
    # Places that were not published give random numbers: their exponents agree by chance alone.
    other = torch.randn(N, D, generator=torch.Generator().manual_seed(3))
    assert (rivals.toploc(replace(EXACT, states=other))[:, 0] > 64).all()


def test_toploc_scores_a_chunk_at_its_last_token():
    scores_n = rivals.toploc_score(replace(EXACT, states=2 * STATES), rivals.TOPLOC_TOP)
    assert np.flatnonzero(~np.isnan(scores_n)).tolist() == [31, 63]
    assert scores_n[31] == 128 / 8  # the median has the narrowest limit
