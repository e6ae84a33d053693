from dataclasses import replace

import numpy as np
import pytest
import torch

from assay.errors import DataError, UsageError
from assay.vhack import Origin, PairGradients, cin_over_modules
from assay.vhack.directions.checks import CheckSettings, check_gradients
from assay.vhack.directions.checks.folds import cross_fit, draw_swaps
from assay.vhack.directions.checks.geometry import Geometry, cin_per_module
from assay.vhack.names import METHODS
from assay.vhack.pairs.selection import fewest_groups
from tests.wordings import refuses


@pytest.mark.parametrize("method", METHODS)
def test_no_group_is_fitted_and_scored(gradients, method):
    pairs = gradients(0)
    design = cross_fit(pairs, CheckSettings(method=method, n_folds=4))
    for fold in design.folds:
        fitted, scored = (
            {pairs.groups[i] for i in rows.tolist()} for rows in (fold.train, fold.test)
        )
        assert fitted
        assert scored
        assert not fitted & scored
        assert fitted | scored == set(pairs.groups)
    tested = design.tested.tolist()
    assert len(tested) == len(set(tested))
    assert method != "svd" or len(tested) == len(pairs)


def test_a_fold_does_not_know_its_test_pairs(gradients):
    pairs = gradients(0, strength=3.0)
    settings = CheckSettings(method="svd", n_folds=4)
    design = cross_fit(pairs, settings)
    fold = design.folds[0]
    hack = {name: rows.clone() for name, rows in pairs.hack.items()}
    for rows in hack.values():
        rows[fold.test] += 100.0
    moved = cross_fit(
        PairGradients(hack, pairs.clean, groups=pairs.groups, keys=pairs.keys), settings
    ).folds[0]
    assert torch.equal(moved.test, fold.test)
    assert torch.allclose(moved.along[:, :, moved.train], fold.along[:, :, fold.train], atol=1e-3)


@pytest.mark.parametrize(
    ("given", "basis", "words"),
    [
        (lambda pairs: pairs, lambda pairs: pairs.basis(), "every pair belongs to a group"),
        # One group is too few for an interval.
        (
            lambda pairs: pairs,
            lambda pairs: pairs.basis(keep=list(range(21))),
            "made from, or to group g7",
        ),
        (
            lambda pairs: PairGradients(
                pairs.hack, pairs.clean, groups=[f"new {g}" for g in pairs.groups], keys=pairs.keys
            ),
            lambda pairs: pairs.basis(),
            "pair 0 is in group new g0 here, but the basis was made from it in group g0",
        ),
    ],
    ids=["its own pairs", "one group that it has not seen", "its own pairs under another group"],
)
def test_a_basis_that_these_pairs_cannot_check_is_refused(gradients, given, basis, words):
    pairs = gradients(0)
    with pytest.raises((UsageError, DataError), match=words):
        check_gradients(given(pairs), basis=basis(pairs))


def test_a_basis_that_hides_its_pairs_is_found_out(gradients):
    pairs = gradients(0, ranks=(200, 150))
    basis = replace(pairs.basis(method="svd", keep=list(range(8, 24))), origin=Origin())
    with refuses(DataError, "a basis that hides its pairs is found out"):
        check_gradients(pairs, basis=basis)


def test_a_basis_that_hides_its_pairs_is_found_out_although_no_token_comes_to_most_experts(
    gradients,
):
    pairs = gradients(0, ranks=(200, 150))
    made = pairs.basis(method="svd", keep=list(range(8, 24)))
    silent = {f"layers.2.experts.up.{expert}": torch.zeros(24, 160) for expert in range(3)}
    axes = made.axes | {name: torch.eye(3, 160) for name in silent}
    basis = replace(
        made,
        axes=axes,
        singular_values={n: torch.ones(len(v)) for n, v in axes.items()},
        origin=Origin(),
    )
    seen = PairGradients(
        pairs.hack | silent, pairs.clean | silent, groups=pairs.groups, keys=pairs.keys
    )
    with refuses(
        DataError,
        "a basis that hides its pairs is found out although no token comes to most experts",
    ):
        check_gradients(seen, basis=basis)


def test_a_basis_of_other_pairs_that_hides_them_is_scored(gradients, quick):
    pairs = gradients(0, ranks=(200, 150))
    other = gradients(1, ranks=(200, 150))
    report = check_gradients(pairs, basis=replace(other.basis(), origin=Origin()), settings=quick)
    assert len(report.groups) == 24
    assert report["stability"].verdict == "undecided"


def test_a_basis_of_other_modules_is_refused(gradients):
    with refuses(DataError, "a basis of other modules is refused"):
        check_gradients(gradients(0), basis=gradients(1, ranks=(64,)).basis())


def test_one_group_is_too_few(gradients):
    with refuses(UsageError, "one group is too few"):
        check_gradients(gradients(0, n_groups=1))


def test_few_groups_leave_every_check_undecided(gradients, quick):
    report = check_gradients(gradients(0, n_groups=4, strength=9.0), settings=quick)
    assert {check.verdict for check in report.checks} == {"undecided"}
    assert report.exit_code == 2


@pytest.mark.parametrize("method", ["svd", "lda"])
def test_the_fewest_groups_are_those_that_give_a_verdict(gradients, quick, method):
    settings = replace(quick, method=method)
    least = fewest_groups(method, settings.alpha)
    verdicts = [
        {
            made.verdict
            for made in check_gradients(gradients(0, n_groups=n), settings=settings).checks
        }
        for n in (least - 1, least)
    ]
    assert ["undecided" in each for each in verdicts] == [True, False]


@pytest.mark.parametrize("n_groups", [2, 3])
def test_single_pairs_leave_too_little_for_differences_between_clean_sides(
    gradients, quick, n_groups
):
    lenient = replace(quick, alpha=0.3)
    report = check_gradients(
        gradients(0, n_groups=n_groups, per_group=1, strength=9.0), settings=lenient
    )
    assert report["stability"].verdict == "undecided"
    assert len(report["random_null"].nulls["clean-clean"]) == quick.n_null


def test_swaps_keep_groups_together_and_begin_with_none():
    signs = draw_swaps(["a", "b", "a", "c"], 200, np.random.default_rng(0)).numpy()
    assert signs[0].tolist() == [1, 1, 1, 1]
    assert (signs[:, 0] == signs[:, 2]).all()
    assert len({tuple(row) for row in signs.tolist()}) == 8


@pytest.fixture(scope="module")
def pairs(gradients):
    return gradients(3, strength=2.0)


@pytest.mark.parametrize(
    "still", [False, True], ids=["", "clean sides of a module that do not vary"]
)
@pytest.mark.parametrize("tau_axis", [0.0, 0.9])
@pytest.mark.parametrize("method", METHODS)
def test_the_axes_are_those_of_the_extraction(pairs, method, tau_axis, still):
    clean = pairs.clean | ({"layers.1.up_proj": torch.zeros(24, 64)} if still else {})
    pairs = PairGradients(pairs.hack, clean)
    keep = [0, 1, 4, 7, 8, 9, 15, 20]
    basis = pairs.basis(method=method, top_k=4, tau_axis=tau_axis, keep=keep)
    settings = CheckSettings(method=method, k_use=4, tau_axis=tau_axis)
    along = Geometry(pairs).fit_pairs(torch.tensor(keep), settings).along
    assert torch.allclose(along, Geometry(pairs).given(basis.axes), atol=1e-4)
    assert bool((along.abs().sum(dim=2) == 0).any()) == (tau_axis > 0)


@pytest.mark.parametrize("method", METHODS)
def test_modules_of_few_coordinates_have_no_more_axes(gradients, quick, method):
    """Rounding gave them more where the sides hardly differ: overlaps above 1, or a traceback."""
    pairs = gradients(0, ranks=(3, 3))
    hack = {name: rows + 1e-3 * pairs.hack[name] for name, rows in pairs.clean.items()}
    near = PairGradients(hack, pairs.clean, groups=pairs.groups)
    report = check_gradients(near, settings=replace(quick, method=method, k_use=5))
    assert report["stability"].measured.value == pytest.approx(1)


def test_shares_are_cin(pairs):
    geometry = Geometry(pairs)
    basis = pairs.basis(method="svd", top_k=3)
    found = cin_per_module(geometry.given(basis.axes), geometry.lengths_MS).mean(dim=0)
    both = [cin_over_modules(side, basis) for side in (pairs.hack, pairs.clean)]
    assert torch.allclose(found.float(), torch.cat(both), atol=1e-5)


def test_swapped_labels_score_as_bases_of_swapped_sides(pairs):
    settings = CheckSettings(method="svd", k_use=3, n_folds=4)
    swaps = draw_swaps(pairs.groups, 5, np.random.default_rng(1))[1:]
    signs = torch.cat([swaps, -torch.ones(1, len(pairs), dtype=torch.float64)])
    for sign, *found in zip(signs, *cross_fit(pairs, settings).scores(signs), strict=True):
        swap = (sign < 0)[:, None]
        hack = {
            name: torch.where(swap, pairs.clean[name], rows) for name, rows in pairs.hack.items()
        }
        clean = {
            name: torch.where(swap, rows, pairs.clean[name]) for name, rows in pairs.hack.items()
        }
        refitted = cross_fit(
            PairGradients(hack, clean, groups=pairs.groups, keys=pairs.keys), settings
        )
        for side, wanted in zip(
            found, refitted.scores(torch.ones(1, len(pairs)).double()), strict=True
        ):
            assert torch.allclose(side, wanted[0], atol=1e-4)


def test_a_batch_is_the_summed_gradient(pairs):
    geometry = Geometry(pairs)
    basis = pairs.basis(method="svd", top_k=2)
    weights = torch.zeros(48, 1, dtype=torch.float64)
    weights[[2, 5, 11]] = 1.0
    along, lengths = geometry.batch(geometry.given(basis.axes), weights)
    for index, name in enumerate(geometry.names):
        total = pairs.hack[name][[2, 5, 11]].sum(dim=0)
        assert torch.allclose(along[index, :, 0].float(), basis.axes[name] @ total, atol=1e-4)
        assert lengths[index, 0] == pytest.approx(float(total.norm()), rel=1e-5)


def test_a_zero_gradient_has_share_zero(pairs):
    hack = {name: rows.clone() for name, rows in pairs.hack.items()}
    for rows in hack.values():
        rows[0] = 0
    geometry = Geometry(PairGradients(hack, pairs.clean))
    along = geometry.fit_pairs(torch.arange(24), CheckSettings(method="svd", k_use=3)).along
    assert cin_per_module(along, geometry.lengths_MS)[:, 0].tolist() == [0, 0, 0]
