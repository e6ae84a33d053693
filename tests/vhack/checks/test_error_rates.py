"""Two hundred seeds: noise passes no check more often than stated, and planted axes are found as
theory says.
"""

from dataclasses import replace
from math import sqrt

import numpy as np
import pytest
import torch
from scipy import integrate, stats

from assay.stats import auroc
from assay.vhack.directions.checks import CheckSettings, check_gradients
from assay.vhack.directions.checks.check_report import CHECKS
from assay.vhack.directions.checks.folds import cross_fit

SEEDS = 200


def passes(gradients, settings, seeds=range(SEEDS), **options):
    """Per check, how many of the seeds pass it."""
    counts = dict.fromkeys(CHECKS, 0)
    for seed in seeds:
        for check in check_gradients(gradients(seed, **options), settings=settings).checks:
            assert check.verdict != "undecided" or check.reason.endswith("add pairs")
            counts[check.name] += check.verdict == "pass"
    return counts


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [{"shared": 1.0, "ranks": (48, 40)}, {"own_axis": 2.0, "ranks": (48, 40)}],
    ids=["noise", "group effects"],
)
def test_noise_passes_no_check_more_often_than_stated(gradients, quick, options):
    most = stats.binom.ppf(0.999, SEEDS, quick.alpha)
    counts = passes(gradients, quick, **options)
    assert all(count <= most for count in counts.values()), counts


@pytest.mark.slow
@pytest.mark.parametrize(("strength", "low", "high"), [(1.0, 0.0, 0.5), (4.0, 0.95, 1.0)])
def test_planted_axes_pass_when_they_are_strong_enough(gradients, quick, strength, low, high):
    seeds = 40
    counts = passes(gradients, quick, range(1000, 1000 + seeds), strength=strength)
    assert all(low <= count / seeds <= high for count in counts.values()), counts


def expected_recovery(strength, n, r):
    """cos² between the first axis and the planted one (Benaych-Georges and Nadakuditi 2012, theorem
    2.9).

    ``D/(σ√R)`` with σ² = 2 is a rank-one matrix of size θ = √N·strength/(σ√R) plus noise of
    variance 1/R. Below the threshold θ⁴ = N/R nothing is found in the limit; R = 240 leaves a few
    hundredths.
    """
    theta_2 = n * strength**2 / (2 * r)
    c = n / r
    return max(0.0, 1 - (c + theta_2) / (theta_2 * (theta_2 + 1))) if theta_2**2 > c else 0.0


def expected_auroc(strength, cosine, r):
    """AUROC of ``relu(a + z)/s`` against ``relu(z)``, z normal: one axis, at an angle to the
    planted one.
    """
    a = strength * cosine
    s = sqrt(1 + strength**2 / r)
    above, _ = integrate.quad(lambda x: stats.norm.pdf(x - a) * stats.norm.cdf(x / s), 0, np.inf)
    both_zero = stats.norm.cdf(-a) * 0.5
    return above + both_zero / 2


@pytest.mark.slow
@pytest.mark.parametrize("strength", [1.5, 2.5, 4.0])
def test_recovery_and_auroc_of_a_planted_axis_follow_theory(gradients, strength):
    n_groups = 24
    r = 240
    folds = 4
    settings = CheckSettings(method="svd", k_use=1, n_folds=folds)
    trained = 3 * n_groups * (folds - 1) // folds
    recovered = []
    ranked = []
    expected = []
    for seed in range(SEEDS):
        pairs = gradients(seed, strength=strength, n_groups=n_groups, ranks=(r,))
        axis = np.random.default_rng(seed).standard_normal(r)
        axis /= np.linalg.norm(axis)
        design = cross_fit(pairs, settings)
        rows = design.folds[0].train.tolist()
        cosine = float(
            pairs.basis(top_k=1, method="svd", keep=rows).axes["layers.0.up_proj"][0].numpy() @ axis
        )
        hack, clean = (
            side[0, : len(design.folds[0].test)]
            for side in design.scores(torch.ones(1, len(pairs), dtype=torch.float64))
        )
        recovered.append(cosine**2)
        ranked.append(auroc(hack, clean))
        expected.append(expected_auroc(strength, cosine, r))
    assert np.mean(recovered) == pytest.approx(expected_recovery(strength, trained, r), abs=0.03)
    assert np.mean(ranked) == pytest.approx(np.mean(expected), abs=4 * np.std(ranked) / sqrt(SEEDS))


@pytest.mark.slow
def test_noise_passes_no_check_of_a_whitened_basis_more_often_than_stated(gradients, quick):
    """The default of extraction: one split, of which nine groups are scored."""
    settings = replace(quick, method="lda")
    seeds = 40
    counts = passes(
        gradients, settings, range(seeds), n_groups=27, per_group=2, shared=1.0, ranks=(48, 40)
    )
    assert all(
        count <= stats.binom.ppf(0.999, seeds, settings.alpha) for count in counts.values()
    ), counts
