from dataclasses import replace

import numpy as np
import pytest
import torch

from assay.errors import DataError, UsageError
from assay.vhack import Origin, PairGradients
from assay.vhack.checks import CheckSettings, check_gradients
from assay.vhack.checks.folds import cross_fit, design_for_basis, draw_swaps


def part(pairs, rows, **others):
    index = torch.tensor(rows)
    sides = ({n: t[index] for n, t in side.items()} for side in (pairs.hack, pairs.clean))
    named = {"groups": [pairs.groups[r] for r in rows], "keys": [pairs.keys[r] for r in rows]}
    return PairGradients(*sides, **(named | others))


@pytest.mark.parametrize("method", ["svd", "mean-diff", "lda"])
def test_no_group_is_fitted_and_scored(gradients, method):
    pairs = gradients(0)
    design = cross_fit(pairs, CheckSettings(method=method, n_folds=4))
    for fold in design.folds:
        fitted, scored = ({pairs.groups[i] for i in rows.tolist()} for rows in (fold.train, fold.test))
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
    moved = cross_fit(PairGradients(hack, pairs.clean, groups=pairs.groups, keys=pairs.keys), settings).folds[0]
    assert torch.equal(moved.test, fold.test)
    assert torch.allclose(moved.along[:, :, moved.train], fold.along[:, :, fold.train], atol=1e-3)


def test_groups_of_the_basis_are_not_scored_even_by_other_pairs(gradients):
    pairs = gradients(0, strength=3.0)
    basis = pairs.basis(keep=[0, 3, 6, 9])
    tested = design_for_basis(basis, pairs, CheckSettings()).tested_groups
    assert set(tested) == {"g4", "g5", "g6", "g7"}


def test_numbers_from_its_own_pairs_are_refused(gradients):
    pairs = gradients(0)
    with pytest.raises(UsageError, match="every pair belongs to a group"):
        check_gradients(pairs, basis=pairs.basis())


def test_one_group_that_a_basis_has_not_seen_is_too_few_for_an_interval(gradients):
    pairs = gradients(0)
    with pytest.raises(UsageError, match="made from, or to group g7"):
        check_gradients(pairs, basis=pairs.basis(keep=list(range(21))))


def test_the_same_pair_under_another_group_is_refused(gradients):
    pairs = gradients(0)
    renamed = part(pairs, list(range(24)), groups=[f"new {g}" for g in pairs.groups])
    with pytest.raises(DataError, match="pair 0 is in group new g0 here, but the basis was made from it in group g0"):
        check_gradients(renamed, basis=pairs.basis())


@pytest.mark.parametrize("method", ["svd", "mean-diff"])
def test_a_basis_that_hides_its_pairs_is_found_out(gradients, method):
    pairs = gradients(0, ranks=(200, 150))
    basis = replace(pairs.basis(method=method, keep=list(range(8, 24))), origin=Origin())
    with pytest.raises(DataError, match="made from pairs that it is to be scored on"):
        check_gradients(pairs, basis=basis)


def test_a_basis_that_hides_its_pairs_is_found_out_although_no_token_comes_to_most_experts(gradients):
    pairs = gradients(0, ranks=(200, 150))
    made = pairs.basis(method="svd", keep=list(range(8, 24)))
    silent = {f"layers.2.experts.up.{expert}": torch.zeros(24, 160) for expert in range(3)}
    axes = made.axes | {name: torch.eye(3, 160) for name in silent}
    basis = replace(made, axes=axes, singular_values={n: torch.ones(len(v)) for n, v in axes.items()}, origin=Origin())
    seen = PairGradients(pairs.hack | silent, pairs.clean | silent, groups=pairs.groups, keys=pairs.keys)
    with pytest.raises(DataError, match="made from pairs that it is to be scored on"):
        check_gradients(seen, basis=basis)


def test_a_basis_of_other_pairs_that_hides_them_is_scored(gradients, quick):
    pairs, other = gradients(0, ranks=(200, 150)), gradients(1, ranks=(200, 150))
    report = check_gradients(pairs, basis=replace(other.basis(), origin=Origin()), settings=quick)
    assert len(report.groups) == 24
    assert report["stability"].verdict == "undecided"


def test_a_basis_of_other_modules_is_refused(gradients):
    with pytest.raises(DataError, match="other modules"):
        check_gradients(gradients(0), basis=gradients(1, ranks=(64,)).basis())


def test_one_group_is_too_few(gradients):
    with pytest.raises(UsageError, match="1 group of pairs to check lda with"):
        check_gradients(gradients(0, n_groups=1))


def test_few_groups_leave_every_check_undecided(gradients, quick):
    report = check_gradients(gradients(0, n_groups=4, strength=9.0), settings=quick)
    assert {check.verdict for check in report.checks} == {"undecided"}
    assert report.exit_code == 2


@pytest.mark.parametrize("n_groups", [2, 3])
def test_single_pairs_leave_too_little_for_differences_between_clean_sides(gradients, quick, n_groups):
    lenient = replace(quick, alpha=0.3)
    report = check_gradients(gradients(0, n_groups=n_groups, per_group=1, strength=9.0), settings=lenient)
    assert report["stability"].verdict == "undecided"
    assert len(report["random_null"].nulls["clean-clean"]) == quick.n_null


def test_swaps_keep_groups_together_and_begin_with_none():
    signs = draw_swaps(["a", "b", "a", "c"], 200, np.random.default_rng(0)).numpy()
    assert signs[0].tolist() == [1, 1, 1, 1]
    assert (signs[:, 0] == signs[:, 2]).all()
    assert len({tuple(row) for row in signs.tolist()}) == 8


def test_swapping_every_label_gives_the_same_scores_the_other_way(gradients):
    pairs = gradients(2, strength=1.0)
    design = cross_fit(pairs, CheckSettings(method="svd", n_folds=4))
    hack, clean = design.scores(torch.stack([torch.ones(24), -torch.ones(24)]).double())
    swapped = PairGradients(pairs.clean, pairs.hack, groups=pairs.groups, keys=pairs.keys)
    again = cross_fit(swapped, CheckSettings(method="svd", n_folds=4)).scores(torch.ones(1, 24).double())
    assert torch.allclose(hack[1], again[0][0], atol=1e-6)
    assert torch.allclose(clean[1], again[1][0], atol=1e-6)
