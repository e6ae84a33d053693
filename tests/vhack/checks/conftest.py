"""Gradients made to order: noise, and noise with a planted axis."""

from collections.abc import Callable

import numpy as np
import pytest
import torch

from assay.vhack import PairGradients
from assay.vhack.directions.checks import CheckSettings


def make_gradients(
    seed: int,
    *,
    strength: float = 0.0,
    n_groups: int = 8,
    per_group: int = 3,
    ranks: tuple[int, ...] = (64, 64, 48),
    shared: float = 0.0,
    own_axis: float = 0.0,
) -> PairGradients:
    """Unit normal gradients of both sides, in every module with ``strength`` times one unit axis on
    the hack side.

    ``shared`` is the spread of what both sides of a group have in common, ``own_axis`` that of a
    difference between the sides that every group has for itself: an effect of groups, but no common
    hack direction.
    """
    generator = np.random.default_rng(seed)
    group = np.repeat(np.arange(n_groups), per_group)
    hack = {}
    clean = {}
    for index, r in enumerate(ranks):
        axis = generator.standard_normal(r)
        common = shared * generator.standard_normal((n_groups, r))[group]
        apart = own_axis * generator.standard_normal((n_groups, r))[group]
        noise = generator.standard_normal((2, len(group), r))
        hack[f"layers.{index}.up_proj"] = (
            common + apart / 2 + noise[0] + strength * axis / np.linalg.norm(axis)
        )
        clean[f"layers.{index}.up_proj"] = common - apart / 2 + noise[1]
    sides = (
        {name: torch.from_numpy(rows).float() for name, rows in side.items()}
        for side in (hack, clean)
    )
    return PairGradients(
        *sides, groups=[f"g{g}" for g in group], keys=[f"s{seed}p{i}" for i in range(len(group))]
    )


@pytest.fixture(scope="session")
def gradients() -> Callable[..., PairGradients]:
    return make_gradients


@pytest.fixture(scope="session")
def quick() -> CheckSettings:
    """Few draws, enough for alpha 0.05."""
    return CheckSettings(
        method="svd", k_use=3, n_folds=3, n_flips=39, n_null=19, n_splits=4, n_resamples=60
    )
