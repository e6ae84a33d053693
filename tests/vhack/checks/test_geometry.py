import pytest
import torch

from assay.vhack import PairGradients, cin_over_modules
from assay.vhack.checks import CheckSettings
from assay.vhack.checks.folds import Geometry, cin_per_module
from assay.vhack.names import METHODS


@pytest.fixture(scope="module")
def pairs(gradients):
    return gradients(3, strength=2.0)


@pytest.mark.parametrize("method", METHODS)
def test_the_axes_are_those_of_the_extraction(pairs, method):
    keep = [0, 1, 4, 7, 8, 9, 15, 20]
    basis = pairs.basis(method=method, top_k=4, keep=keep)
    frame = Geometry(pairs).fit_pairs(torch.tensor(keep), CheckSettings(method=method, k_use=4))
    assert torch.allclose(frame.along, Geometry(pairs).given(basis.axes), atol=1e-4)


@pytest.mark.parametrize("method", ["lda", "svd"])
def test_weak_axes_are_dropped_as_in_the_extraction(pairs, method):
    basis = pairs.basis(method=method, top_k=4, tau_axis=0.9)
    settings = CheckSettings(method=method, k_use=4, tau_axis=0.9)
    along = Geometry(pairs).fit_pairs(torch.arange(len(pairs)), settings).along
    assert torch.allclose(along, Geometry(pairs).given(basis.axes), atol=1e-4)
    assert (along.abs().sum(dim=2) == 0).any()


def test_shares_are_cin(pairs):
    geometry = Geometry(pairs)
    basis = pairs.basis(method="svd", top_k=3)
    found = cin_per_module(geometry.given(basis.axes), geometry.lengths_MS).mean(dim=0)
    both = [cin_over_modules(side, basis) for side in (pairs.hack, pairs.clean)]
    assert torch.allclose(found.float(), torch.cat(both), atol=1e-5)


def test_turned_axes_are_those_of_a_refit_with_swapped_labels(pairs):
    signs = torch.where(torch.rand(5, len(pairs), generator=torch.Generator().manual_seed(1)) < 0.5, -1.0, 1.0).double()
    geometry = Geometry(pairs)
    frame = geometry.fit_pairs(torch.arange(len(pairs)), CheckSettings(method="svd", k_use=3))
    found = cin_per_module(frame.along, geometry.lengths_MS, frame.turned(signs))
    for row, sign in enumerate(signs):
        swap = (sign < 0)[:, None]
        hack = {name: torch.where(swap, pairs.clean[name], rows) for name, rows in pairs.hack.items()}
        clean = {name: torch.where(swap, rows, pairs.clean[name]) for name, rows in pairs.hack.items()}
        refitted = PairGradients(hack, clean).basis(method="svd", top_k=3)
        expected = cin_per_module(geometry.given(refitted.axes), geometry.lengths_MS)
        assert torch.allclose(found[row], expected, atol=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_overlaps_are_scalar_products_of_axes(pairs, method):
    halves = [list(range(12)), list(range(12, 24))]
    one, other = (pairs.basis(method=method, top_k=3, keep=half) for half in halves)
    geometry = Geometry(pairs)
    settings = CheckSettings(method=method, k_use=3)
    frames = [geometry.fit_pairs(torch.tensor(half), settings) for half in halves]
    expected = torch.stack([one.axes[name] @ other.axes[name].T for name in one.axes])
    assert torch.allclose(geometry.overlaps(*frames).float(), expected, atol=1e-4)


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


def test_a_module_whose_clean_sides_do_not_vary_is_fitted_as_in_the_extraction(pairs):
    clean = {name: rows.clone() for name, rows in pairs.clean.items()}
    clean["layers.1.up_proj"][:] = 0
    still = PairGradients(pairs.hack, clean)
    frame = Geometry(still).fit_pairs(torch.arange(24), CheckSettings(k_use=3))
    assert torch.allclose(frame.along, Geometry(still).given(still.basis(method="lda", top_k=3).axes), atol=1e-4)


def test_a_zero_gradient_has_share_zero(pairs):
    hack = {name: rows.clone() for name, rows in pairs.hack.items()}
    for rows in hack.values():
        rows[0] = 0
    geometry = Geometry(PairGradients(hack, pairs.clean))
    along = geometry.fit_pairs(torch.arange(24), CheckSettings(method="svd", k_use=3)).along
    assert cin_per_module(along, geometry.lengths_MS)[:, 0].tolist() == [0, 0, 0]
