"""Audits that are drawn from responses."""

import math

import numpy as np
import pytest
from assay_research.responses.field import (
    ALPHA,
    GRID,
    MOST,
    Looks,
    caught_after,
    crossings,
    drawn_means,
    share_by,
    threshold,
)

RNG = np.random.default_rng(0)


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
        caught[factor] = caught_after((means > limit).mean(axis=0))
    assert caught[1.0] is None
    assert caught[3.0] < caught[1.5] < MOST


def test_a_crossing_is_the_first_look_over_the_bound():
    needed = -math.log(ALPHA)
    slow = Looks(np.array([[0.0], [needed / 2]]), np.array([32, 40]), 40)
    found = crossings([slow], lambda sums: sums[..., 0], 3, np.random.default_rng(0))
    assert found.tolist() == [80.0] * 3, "the second response brings it over the bound, at its end"
    quick = Looks(np.array([[needed], [0.0]]), np.array([32, 64]), 64)
    assert crossings([quick], lambda sums: sums[..., 0], 2, np.random.default_rng(0)).tolist() == [32.0] * 2
    never = Looks(np.zeros((1, 1)), np.array([64]), 64)
    shares = share_by(crossings([never], lambda sums: sums[..., 0], 2, np.random.default_rng(0)))
    assert caught_after(shares) is None
    assert shares[-1] == pytest.approx(0.0)
