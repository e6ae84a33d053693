"""Files of δS: what was saved is what is loaded, and what is no such file is refused by name."""

import copy
import os
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from assay.errors import DataError
from assay.vhack import weight_svd
from assay.vhack.directions.delta import DeltaS
from assay.vhack.directions.delta.delta_file import read_delta_lengths, save_delta
from tests.vhack.delta.conftest import randomise
from tests.wordings import refuses


def test_save_and_load(module, ids, small_svd, tmp_path):
    other = copy.deepcopy(module)
    adapter = DeltaS(module, small_svd)
    randomise(adapter)
    adapter.save(tmp_path / "delta.safetensors")
    again = DeltaS(other, small_svd)
    again.load(tmp_path / "delta.safetensors")
    assert all(torch.equal(a, b) for a, b in zip(adapter.delta, again.delta, strict=True))
    assert adapter.values()["model.layers.2.mlp.down_proj"].norm() > 0


def test_a_file_for_other_weights_or_factors_or_damaged_is_refused(module, small_svd, tmp_path):
    path = tmp_path / "delta.safetensors"
    other = copy.deepcopy(module)
    turned = copy.deepcopy(module)
    adapter = DeltaS(module, small_svd)
    randomise(adapter)
    adapter.save(path)
    with torch.no_grad():
        other.model.layers[0].mlp.up_proj.weight[0, 0] += 1
    with refuses(DataError, "a file for other weights or factors or damaged is refused"):
        DeltaS(other, weight_svd(other)).load(path)
    svd = weight_svd(turned)
    name = "model.layers.0.mlp.up_proj"
    svd[name].left.copy_(svd[name].left.flip(1))
    with refuses(DataError, "a file for other weights or factors or damaged is refused, 2"):
        DeltaS(turned, svd).load(path)
    tensors = load_file(path)
    tensors[name][3] += 1
    with safe_open(path, framework="pt") as reader:
        save_file(tensors, tmp_path / "bad.safetensors", metadata=reader.metadata())
    with refuses(DataError, "a file for other weights or factors or damaged is refused, 3"):
        adapter.load(tmp_path / "bad.safetensors")
    save_file(tensors, tmp_path / "none.safetensors")
    with refuses(DataError, "a file for other weights or factors or damaged is refused, 4"):
        adapter.load(tmp_path / "none.safetensors")
    os.mkfifo(tmp_path / "pipe")  # to open it would wait for ever
    for name in ("absent.safetensors", "pipe", "."):
        with refuses(DataError, "a file for other weights or factors or damaged is refused, 5"):
            adapter.load(tmp_path / name)


@pytest.mark.parametrize(
    "change",
    [
        lambda delta: torch.full_like(delta, torch.nan),
        lambda delta: torch.full_like(delta, torch.inf),
        lambda delta: torch.full_like(delta, 1e30),
        lambda delta: delta.to(torch.int8),
        lambda delta: delta.double(),
        lambda delta: delta.half(),
        lambda delta: delta.to(torch.complex64),
        lambda delta: delta.to(torch.float8_e4m3fn),
    ],
    ids=["nan", "inf", "1e30", "int8", "float64", "float16", "complex", "float8"],
)
@pytest.mark.parametrize("with_probe", [False, True])
def test_numbers_that_are_not_finite_float32_are_refused(
    module, small_svd, tmp_path, change, with_probe
):
    """Also where its hash and its probe were made for them."""
    adapter = DeltaS(module, small_svd)
    randomise(adapter)
    adapter.save(tmp_path / "good.safetensors")
    good = load_file(tmp_path / "good.safetensors")
    values = {name: change(t) for name, t in good.items() if not name.startswith("_probe/")}
    try:
        save_delta(tmp_path / "hashed.safetensors", adapter.groups, values)
    except RuntimeError:  # complex numbers have no probe, and no hash of their own
        shutil.copy(tmp_path / "good.safetensors", tmp_path / "hashed.safetensors")
    with safe_open(tmp_path / "hashed.safetensors", framework="pt") as file:
        metadata = file.metadata()
    probes = good if not with_probe else load_file(tmp_path / "hashed.safetensors")
    save_file({**probes, **values}, tmp_path / "bad.safetensors", metadata=metadata)
    before = adapter.values()
    with pytest.raises(DataError) as caught:
        adapter.load(tmp_path / "bad.safetensors")
    assert "wanted: " in str(caught.value)
    assert all(torch.equal(value, before[name]) for name, value in adapter.values().items())


def test_a_file_of_another_rank_is_refused(module, small_svd, tmp_path, cut_svd):
    other = copy.deepcopy(module)
    DeltaS(module, small_svd).save(tmp_path / "delta.safetensors")
    with refuses(DataError, "a file of another rank is refused"):
        DeltaS(other, cut_svd).load(tmp_path / "delta.safetensors")


def test_the_lengths_of_what_is_no_vector_are_refused(tmp_path):
    save_file(
        {"m": torch.tensor(1.0)}, tmp_path / "delta.safetensors", {"schema": "assay.delta_s/1"}
    )
    with refuses(DataError, "the lengths of what is no vector are refused"):
        read_delta_lengths(tmp_path / "delta.safetensors")
