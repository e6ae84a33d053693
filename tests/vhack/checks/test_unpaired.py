import numpy as np
import pytest

from assay.vhack.directions.checks import CheckSettings
from assay.vhack.directions.checks.pools import check_unpaired


def unpaired(seed, gap, mixed):
    generator = np.random.default_rng(seed)
    groups = [f"g{i}" for i in range(12)]
    hack_groups = groups * 3 if mixed else groups[:6] * 3
    clean_groups = groups * 2 if mixed else groups[6:] * 2
    effect = dict(zip(groups, generator.standard_normal(12), strict=True))

    def scores(names, shift):
        return np.array([effect[g] + shift + generator.standard_normal() for g in names])

    settings = CheckSettings(n_flips=99, n_null=39, n_resamples=200)
    return check_unpaired(
        scores(hack_groups, gap), scores(clean_groups, 0.0), hack_groups, clean_groups, settings
    )


@pytest.mark.slow
@pytest.mark.parametrize("mixed", [True, False], ids=["shared groups", "own groups"])
def test_two_pools_pass_with_a_gap_and_seldom_without(mixed):
    assert unpaired(0, 4.0, mixed).verdict == "pass"
    assert sum(unpaired(seed, 0.0, mixed).verdict == "pass" for seed in range(100)) <= 12
