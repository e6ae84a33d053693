"""Axes from synthetic gradients, where the truth is known, and what becomes of a basis on disk."""

import math
import os

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from assay.errors import DataError, UsageError
from assay.vhack import Basis, Origin, PairGradients, cin, cin_over_modules
from assay.vhack.directions.basis.axes import draw_frames, shrinkage
from assay.vhack.names import METHODS
from tests.wordings import refuses

N = 10
R = 200


def planted(seed, strength, noise=1.0, n=N, r=R):
    """Hack and clean gradients of one module: noise, and on the hack side ``strength`` along the
    first coordinate.
    """
    generator = torch.Generator().manual_seed(seed)
    hack, clean = noise / math.sqrt(2) * torch.randn(2, n, r, generator=generator)
    hack[:, 0] += strength
    return {"m": hack}, {"m": clean}


def basis_of(hack, clean, **settings):
    return PairGradients(hack, clean).basis(**settings)


def test_axes_are_the_singular_rows_of_the_differences():
    hack, clean = planted(0, 3.0)
    basis = basis_of(hack, clean, method="svd")
    _, values, rows = torch.linalg.svd(hack["m"] - clean["m"], full_matrices=False)
    assert torch.allclose(basis.singular_values["m"], values, rtol=1e-5)
    assert torch.allclose((basis.axes["m"] * rows).sum(dim=1).abs(), torch.ones(N), atol=1e-5)
    assert torch.allclose(basis.axes["m"] @ basis.axes["m"].T, torch.eye(N), atol=1e-6)
    assert basis.axes["m"].dtype == torch.float32


@pytest.mark.parametrize("strength", [8.0, 4.0])
def test_a_planted_axis_is_recovered_as_well_as_theory_says(strength):
    # Benaych-Georges and Nadakuditi (2012): with θ² = N·strength²/(R·σ²) and c = N/R, the squared
    # cosine between the planted and the first right singular vector tends to 1 − (c + θ²)/(θ²(θ² +
    # 1)).
    theta2 = N * strength**2 / R
    c = N / R
    found = [
        float(basis_of(*planted(seed, strength), method="svd").axes["m"][0, 0])
        for seed in range(200)
    ]
    assert min(found) > 0  # it points hack-ward
    # The law is one for N and R to infinity; at this size its own error is below 0.01.
    square = 1 - (c + theta2) / (theta2 * (theta2 + 1))
    assert sum(one**2 for one in found) / 200 == pytest.approx(square, abs=0.01)


def test_axes_point_where_most_pairs_are():
    axis = torch.zeros(R)
    axis[3] = 1.0
    signs = torch.tensor([-1.0] * 7 + [9.0] * 3)  # the mean would point the other way
    basis = basis_of({"m": signs[:, None] * axis}, {"m": torch.zeros(N, R)}, top_k=1)
    assert torch.allclose(basis.axes["m"][0], -axis, atol=1e-6)
    assert basis.votes["m"].tolist() == [[7, 3]]
    assert basis.undecided == []


def test_a_tie_is_reported():
    differences = torch.zeros(4, R)
    differences[:2, 0], differences[2:, 0] = 2.0, -1.0
    basis = basis_of({"m": differences}, {"m": torch.zeros(4, R)}, top_k=2)
    assert basis.undecided == [("m", 0)]
    assert basis.votes["m"][:, 0].tolist() == basis.votes["m"][:, 1].tolist()
    assert (
        basis.axes["m"][0, 0] > 0
    )  # turned by the mean, so that it does not depend on the library


def test_rows_that_the_data_cannot_fill_are_zero():
    hack = torch.zeros(5, R)
    hack[:, 1] = torch.arange(1.0, 6.0)
    basis = basis_of(
        {"m": hack, "still": torch.ones(5, 3)}, {"m": torch.zeros(5, R), "still": torch.ones(5, 3)}
    )
    assert basis.axes["m"].shape == (5, R)
    assert basis.axes["m"][0].norm() == pytest.approx(1.0)
    assert not basis.axes["m"][1:].any()
    assert not basis.axes["still"].any()
    assert not basis.singular_values["still"].any()
    assert all(torch.isfinite(axes).all() for axes in basis.axes.values())


def test_weak_axes_are_zeroed():
    hack, clean = planted(2, 20.0)
    whole = basis_of(hack, clean)
    cut = basis_of(hack, clean, tau_axis=0.3)
    weak = whole.singular_values["m"] < 0.3 * whole.singular_values["m"][0]
    assert 0 < weak.sum() < len(weak)
    assert not cut.axes["m"][weak].any()
    assert torch.equal(cut.axes["m"][~weak], whole.axes["m"][~weak])
    assert torch.equal(cut.singular_values["m"], whole.singular_values["m"])
    assert torch.equal(whole.slice(12, 0.3).axes["m"], cut.axes["m"])


def test_slice():
    basis = basis_of(*planted(2, 3.0))
    three = basis.slice(3)
    assert torch.equal(three.axes["m"], basis.axes["m"][:3])
    assert len(three.singular_values["m"]) == len(three.votes["m"]) == 3
    assert basis.slice(2000).axes["m"].shape == basis.axes["m"].shape
    for wrong in ({"k_use": 0}, {"tau_axis": 1.5}, {"tau_axis": float("nan")}):
        with pytest.raises(UsageError):
            basis.slice(**wrong)


def test_lda_equals_the_formula_written_out():
    hack, clean = planted(4, 2.0, n=8, r=20)
    basis = basis_of(hack, clean, method="lda", top_k=3)
    rows = clean["m"].double()
    covariance = torch.cov(rows.T, correction=0)
    share = shrinkage((rows - rows.mean(0)) @ (rows - rows.mean(0)).T, 20)
    shrunk = (1 - share) * covariance + share * covariance.trace() / 20 * torch.eye(20)
    values, vectors = torch.linalg.eigh(shrunk)
    root = (vectors * values.rsqrt()) @ vectors.T
    _, singular, right = torch.linalg.svd(
        (hack["m"] - clean["m"]).double() @ root, full_matrices=False
    )
    wanted = torch.linalg.qr((right[:3] @ root).T).Q.T
    assert torch.allclose(basis.singular_values["m"].double(), singular[:3], rtol=1e-4)
    assert torch.allclose(
        (basis.axes["m"].double() * wanted).sum(1).abs(), torch.ones(3).double(), atol=1e-4
    )


def test_shrinkage_is_that_of_ledoit_and_wolf():
    rows = torch.randn(9, 30, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rows -= rows.mean(0)
    sample = rows.T @ rows / 9
    mu = sample.trace() / 30
    distance = (sample - mu * torch.eye(30)).square().sum()
    spread = sum((torch.outer(row, row) - sample).square().sum() for row in rows) / 81
    assert shrinkage(rows @ rows.T, 30) == pytest.approx(
        float(min(spread / distance, torch.tensor(1.0)))
    )


def test_a_part_of_the_pairs_gives_the_basis_of_that_part_alone():
    hack, clean = planted(5, 3.0)
    groups = [f"g{index % 3}" for index in range(N)]
    gradients = PairGradients(hack, clean, groups=groups, keys=[f"p{index}" for index in range(N)])
    keep = [index for index in range(N) if groups[index] != "g0"]
    for method in METHODS:
        basis = gradients.basis(method=method, keep=keep)
        direct = basis_of({"m": hack["m"][keep]}, {"m": clean["m"][keep]}, method=method)
        assert torch.allclose(basis.axes["m"], direct.axes["m"], atol=1e-5)
        assert set(basis.origin.groups) == {"g1", "g2"}
        assert basis.origin.pairs == tuple(f"p{index}" for index in keep)


def test_gradients_that_do_not_fit_are_refused():
    hack, clean = planted(0, 1.0)
    with refuses(UsageError, "gradients that do not fit are refused"):
        basis_of(hack, {"m": clean["m"][:3]})
    with refuses(UsageError, "gradients that do not fit are refused, 2"):
        basis_of(hack, {"x": clean["m"]})
    with refuses(UsageError, "gradients that do not fit are refused, 3"):
        PairGradients(hack, clean, keys=["a", "b"])
    with refuses(UsageError, "gradients that do not fit are refused, 4"):
        basis_of(hack, clean, method="pca")
    with refuses(UsageError, "gradients that do not fit are refused, 5"):
        basis_of({"m": hack["m"][:2]}, {"m": clean["m"][:2]}, method="lda")
    with refuses(UsageError, "gradients that do not fit are refused, 6"):
        basis_of(hack, clean, top_k=0)
    with pytest.raises(UsageError):  # no file of such a basis could be read
        basis_of(hack, clean, top_k=1025)
    with refuses(DataError, "gradients that do not fit are refused, 7"):
        basis_of(hack, hack)


@pytest.mark.parametrize("side", ["hack", "clean"])
def test_a_gradient_that_is_not_finite_is_named(side):
    sides = dict(zip(("hack", "clean"), planted(0, 1.0), strict=True))
    sides[side]["m"][4, 7] = float("nan")
    with pytest.raises(DataError, match=f"pair 4, {side} side, is not finite in m"):
        basis_of(**sides)


def test_cin_by_hand():
    axes = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    gradients = torch.tensor([[3.0, -4.0, 0.0], [0.0, 0.0, 2.0], [3.0, 4.0, 12.0], [0.0, 0.0, 0.0]])
    assert cin(gradients, axes).tolist() == pytest.approx([0.6, 0.0, 5 / 13, 0.0])
    assert cin(gradients, axes, two_sided=True).tolist() == pytest.approx([1.0, 0.0, 5 / 13, 0.0])
    assert (
        cin(gradients, torch.cat([axes, torch.zeros(3, 3)])).tolist()
        == cin(gradients, axes).tolist()
    )


def test_cin_over_modules():
    basis = Basis({"a": torch.eye(2)[:1], "b": torch.eye(3)[:1]}, {}, {})
    gradients = {
        "a": torch.tensor([[3.0, 4.0]]),
        "b": torch.tensor([[-12.0, 0.0, 5.0]]),
        "c": torch.ones(1, 1),
    }
    assert cin_over_modules(gradients, basis).tolist() == pytest.approx([0.3])
    assert cin_over_modules(gradients, basis, two_sided=True).tolist() == pytest.approx(
        [(0.6 + 12 / 13) / 2]
    )
    with refuses(UsageError, "cin over modules"):
        cin_over_modules({"a": gradients["a"]}, basis)
    with pytest.raises(UsageError):
        cin_over_modules({**gradients, "b": torch.ones(1, 2)}, basis)


@pytest.fixture
def saved(tmp_path):
    hack, clean = planted(7, 4.0)
    origin = Origin(model="some/model", weights="abc", dtype="bfloat16", factors="float32")
    gradients = PairGradients(
        hack, clean, keys=[f"key{index}" for index in range(N)], origin=origin
    )
    basis = gradients.basis(tau_axis=0.1)
    basis.save(tmp_path / "basis.safetensors")
    return basis, tmp_path / "basis.safetensors"


def test_a_file_gives_the_basis_back(saved):
    basis, path = saved
    again = Basis.load(path)
    assert again.origin == basis.origin
    for part in ("axes", "singular_values", "votes"):
        assert torch.equal(getattr(again, part)["m"], getattr(basis, part)["m"])


def test_the_file_has_the_published_schema(saved):
    basis, path = saved
    tensors = load_file(path)
    assert sorted(tensors) == ["_sv/m", "m"]
    assert tensors["m"].shape == (N, R)
    assert tensors["_sv/m"].shape == (N,)
    with safe_open(path, "pt") as reader:
        metadata = reader.metadata()
    assert metadata["schema"] == "v2_with_sv"
    known = {
        "model": "some/model",
        "dtype": "bfloat16",
        "top_k": "12",
        "tau_axis": "0.1",
        "weights_sha256": "abc",
    }
    assert known.items() <= metadata.items()
    assert metadata["pairs_sha256"] == basis.origin.pairs_digest
    assert metadata["settings_sha256"] == basis.origin.settings_digest


def test_a_model_without_these_modules_is_refused(saved, small_model):
    with refuses(DataError, "a model without these modules is refused"):
        Basis.load(saved[1], small_model)


DEEP = "[" * 100_000


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": None}, "it has no 'schema'"),
        ({"schema": "v1"}, "schema 'v1'"),
        ({"_sv/m": None}, "it has no '_sv/m'"),
        ({"m": lambda m: m[:3].clone()}, "m has axes"),
        (
            {"m": lambda m: m[:, :1].clone()},
            "m has axes",
        ),  # their products take memory by the square of the file
        ({"m": lambda m: torch.full_like(m, torch.nan)}, "NaN"),
        ({"m": lambda m: 1000 * m}, "off from orthonormal by 1e"),
        ({"m": lambda m: m[[0] * len(m)].clone()}, "off from orthonormal by 1"),
        ({"m": lambda m: m.to(torch.float64)}, "not float32"),
        ({"_sv/m": lambda values: -values}, "negative"),
        ({"_sv/m": lambda values: values * torch.nan}, "NaN"),
        ({"_sv/m": lambda values: values[:, None].clone()}, "m has axes"),
        ({"captured": "nan"}, "captured nan"),
        ({"votes": "{}"}, "it has no 'm'"),
        ({"votes": "x"}, "not a basis"),
        ({"votes": '{"m": [1, 2, 3]}'}, "not a basis"),
        ({"votes": '{"m": [[1, -2]]}'}, "m has axes"),
        ({"votes": '{"m": [[1e40, 2]]}'}, "not a basis"),
        ({"votes": DEEP}, "not a basis"),
        ({"groups": '["one"]'}, "10 pairs and 1 groups"),
        ({"skipped": '{"a": 1}'}, "skipped: Input should be a valid tuple"),
        ({"top_k": "many"}, "not a basis"),
        ({"pairs": '["another"]'}, "hashes"),
        ({"method": "svd"}, "hashes"),
    ],
)
def test_damaged_files_are_refused(saved, tmp_path, change, message):
    tensors = load_file(saved[1])
    with safe_open(saved[1], "pt") as reader:
        metadata = reader.metadata()
    for name, made in change.items():
        parts = tensors if name in tensors else metadata
        parts[name] = made(parts[name]) if callable(made) else made
        if made is None:
            del parts[name]
    bad = tmp_path / "bad.safetensors"
    save_file(tensors, bad, metadata)
    with pytest.raises(DataError, match=message) as raised:
        Basis.load(bad)
    assert raised.value.wanted == "a file of schema v2_with_sv"
    assert raised.value.do.startswith("extract it again")


def test_a_file_from_which_a_module_was_taken_is_refused(tmp_path):
    hack = {name: torch.randn(10, 8) for name in ("m", "n")}
    PairGradients(hack, {name: torch.zeros(10, 8) for name in hack}).basis(method="svd").save(
        tmp_path / "whole"
    )
    with safe_open(tmp_path / "whole", "pt") as reader:
        metadata = reader.metadata()
    tensors = {
        name: rows for name, rows in load_file(tmp_path / "whole").items() if not name.endswith("n")
    }
    save_file(tensors, tmp_path / "part", metadata)
    with refuses(DataError, "a file from which a module was taken is refused"):
        Basis.load(tmp_path / "part")


def test_what_is_not_a_safetensors_file_is_refused(saved, tmp_path):
    (tmp_path / "bad").write_bytes(saved[1].read_bytes()[:100])
    os.mkfifo(tmp_path / "pipe")
    for name in ("bad", "missing", "pipe", "."):
        with refuses(DataError, "what is not a safetensors file is refused"):
            Basis.load(tmp_path / name)


def test_drawn_frames_are_orthonormal_and_uniform():
    generator = torch.Generator().manual_seed(0)
    frames = draw_frames(4000, 3, 2, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(
        frames.mT @ frames, torch.eye(2, dtype=torch.float64).expand(4000, 2, 2)
    )
    rotated = torch.linalg.qr(torch.randn(3, 3, generator=generator, dtype=torch.float64)).Q
    # Also the mean of a frame of which each column is as likely as its negative is zero.
    for seen in (frames, rotated @ frames):
        assert seen.mean(dim=0).abs().max() < 5 * (3 * 4000) ** -0.5
