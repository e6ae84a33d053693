"""Decompositions of weight matrices: accuracy of both roads, and the files they are kept in."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from assay.errors import BadWeights, StorageError, UsageError
from assay.vhack import weight_svd
from assay.vhack.directions.gradients import svd as _svd
from assay.vhack.directions.gradients.svd import factorise
from tests.wordings import refuses


def matrix(rows, columns, smallest=1e-2, seed=0):
    """Singular values fall geometrically from 1 to ``smallest``."""
    generator = torch.Generator().manual_seed(seed)
    rank = min(rows, columns)
    left, right = (
        torch.linalg.qr(torch.randn(size, rank, generator=generator, dtype=torch.float64)).Q
        for size in (rows, columns)
    )
    values = torch.logspace(0, float(torch.tensor(smallest).log10()), rank, dtype=torch.float64)
    return (left * values) @ right.T


def errors(weight, factors):
    weight = weight.detach()
    left, values, right = (
        part.double().cpu() for part in (factors.left, factors.values, factors.right)
    )
    one = torch.eye(len(values), dtype=torch.float64)
    residual = ((left * values) @ right - weight).norm() / weight.norm()
    return (
        float(residual),
        float((left.T @ left - one).norm()),
        float((right @ right.T - one).norm()),
    )


@pytest.mark.parametrize("method", ["exact", "gram"])
@pytest.mark.parametrize("shape", [(96, 32), (32, 96), (48, 48), (1, 5)])
def test_factors_give_the_matrix_back(method, shape):
    weight = matrix(*shape)
    factors = factorise(weight.float(), method=method)
    assert max(errors(weight.float().double(), factors)) < 1e-5
    assert factors.left.shape == (shape[0], min(shape))
    assert factors.right.shape == (min(shape), shape[1])
    assert (factors.values.diff() <= 0).all()
    assert max(factors.residual, factors.orthogonality) < 1e-6


def test_both_roads_span_the_same_directions():
    weight = matrix(64, 24)
    exact, gram = (factorise(weight, method=method) for method in ("exact", "gram"))
    assert torch.allclose(exact.values, gram.values, rtol=1e-5)
    signs = (exact.left * gram.left).sum(dim=0).sign()
    assert torch.allclose(exact.left, gram.left * signs, atol=1e-5)
    # One sign for both factors: a δS coordinate does not depend on it.
    assert torch.allclose(exact.right, gram.right * signs[:, None], atol=1e-5)


def test_an_inaccurate_result_is_given_up_for_the_exact_one(monkeypatch):
    weight = matrix(40, 20)
    wrong = torch.linalg.eigh

    def blunt(gram):
        values, vectors = wrong(gram)
        return torch.return_types.linalg_eigh((values, vectors + 1e-3))

    monkeypatch.setattr(torch.linalg, "eigh", blunt)
    gram = factorise(weight, method="gram")
    exact = factorise(weight, method="exact")
    assert torch.equal(gram.values, exact.values)
    assert torch.equal(gram.left, exact.left)


def test_factors_can_be_bfloat16():
    weight = matrix(64, 32)
    factors = factorise(weight, dtype=torch.bfloat16)
    assert factors.left.dtype == factors.right.dtype == torch.bfloat16
    assert factors.values.dtype == torch.float32
    assert 1e-4 < errors(weight, factors)[0] < 1e-2
    assert factors.residual < 1e-6  # measured before rounding


def test_truncation_keeps_the_strongest(small_svd, cut_svd):
    full = small_svd["model.layers.0.self_attn.q_proj"]
    cut = cut_svd["model.layers.0.self_attn.q_proj"]
    assert torch.equal(cut.left, full.left[:, :8])
    assert torch.equal(cut.values, full.values[:8])
    assert torch.equal(cut.right, full.right[:8])
    assert cut.left.untyped_storage().nbytes() == cut.left.numel() * 4
    assert cut_svd.rank == 8
    assert full.truncated(10_000) is full


def test_a_matrix_that_is_not_finite_is_named(small_model):
    import copy

    module = copy.deepcopy(small_model.module)
    with torch.no_grad():
        module.model.layers[1].mlp.up_proj.weight[0, 0] = torch.nan
    with refuses(BadWeights, "a matrix that is not finite is named"):
        weight_svd(module)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [({"rank": 0}, "rank=0"), ({"dtype": "float16"}, "float16"), ({"method": "qr"}, "qr")],
)
def test_wrong_settings_are_refused(small_model, wrong, message):
    with pytest.raises(UsageError, match=message):
        weight_svd(small_model, **wrong)


@pytest.fixture
def linear():
    """A model that is one projection."""
    module = nn.Module()
    module.up_proj = nn.Linear(12, 20, bias=False)
    with torch.no_grad():
        module.up_proj.weight.copy_(matrix(20, 12))
    return module


def never(*_, **__):
    raise AssertionError("decomposed although a file is there")


def test_files_are_used_again(monkeypatch, tmp_path, linear):
    first = weight_svd(linear, cache=tmp_path)["up_proj"]
    (file,) = (tmp_path / "svd").iterdir()
    assert file.suffix == ".safetensors"
    monkeypatch.setattr(_svd, "factorise", never)
    again = weight_svd(linear, cache=tmp_path)["up_proj"]
    for name in ("left", "values", "right"):
        assert torch.equal(getattr(first, name), getattr(again, name))
    assert (first.residual, first.orthogonality) == (again.residual, again.orthogonality)
    assert weight_svd(linear, cache=tmp_path, rank=3)["up_proj"].rank == 3


@pytest.mark.parametrize("change", ["weight", "dtype", "method"])
def test_another_matrix_or_setting_is_another_file(tmp_path, linear, change):
    weight_svd(linear, cache=tmp_path)
    settings = {"dtype": {"dtype": "bfloat16"}, "method": {"method": "gram"}, "weight": {}}[change]
    if change == "weight":
        with torch.no_grad():
            linear.up_proj.weight[0, 0] += 1e-6
    found = weight_svd(linear, cache=tmp_path, **settings)["up_proj"]
    assert len(list((tmp_path / "svd").iterdir())) == 2
    assert errors(linear.up_proj.weight.detach().double(), found)[0] < 1e-2


@pytest.mark.parametrize("damage", ["cut", "empty", "other", "shape"])
def test_a_damaged_file_is_written_again(tmp_path, linear, damage):
    first = weight_svd(linear, cache=tmp_path)["up_proj"]
    (file,) = (tmp_path / "svd").iterdir()
    whole = file.read_bytes()
    if damage == "other":
        save_file({"left": torch.zeros(3)}, file)
    elif damage == "shape":
        save_file(
            load_file(file) | {"left": torch.zeros(2, 2)},
            file,
            {"residual": "0", "orthogonality": "0"},
        )
    else:
        file.write_bytes(whole[:-9] if damage == "cut" else b"")
    again = weight_svd(linear, cache=tmp_path)["up_proj"]
    assert torch.equal(first.left, again.left)
    assert torch.equal(load_file(file)["left"], first.left)
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def test_equal_weights_of_two_dtypes_share_a_file_in_a_directory_that_is_named_by_a_text(
    tmp_path, linear
):
    weight_svd(linear.bfloat16(), cache=str(tmp_path), dtype="float32")
    weight_svd(linear.float(), cache=str(tmp_path))
    assert len(list((tmp_path / "svd").iterdir())) == 1


def test_a_cache_that_cannot_be_written_is_an_error(tmp_path, linear):
    (tmp_path / "file").write_text("")
    with refuses(StorageError, "a cache that cannot be written is an error"):
        weight_svd(linear, cache=tmp_path / "file")


def test_the_number_of_threads_is_put_back(small_model, linear):
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        weight_svd(small_model)
        assert torch.get_num_threads() == 2
        with torch.no_grad():
            linear.up_proj.weight[0, 0] = torch.inf
        with pytest.raises(BadWeights):
            weight_svd(linear)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("method", ["exact", "gram"])
def test_matrices_of_low_rank_or_with_small_singular_values(method):
    small = (matrix(80, 40, smallest) for smallest in (1e-6, 1e-14))
    for weight in (matrix(30, 4) @ matrix(4, 20), torch.zeros(8, 5), torch.ones(6, 9), *small):
        factors = factorise(weight.double(), method=method)
        assert max(errors(weight.double(), factors)) < 1e-5 or not weight.any()
        assert factors.orthogonality < 1e-6
        assert torch.isfinite(factors.left).all()
