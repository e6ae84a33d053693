"""``assay vhack extract``."""

from types import SimpleNamespace

import pytest
import torch

from assay.models import load_model
from assay.vhack import Basis
from assay.vhack.directions.delta.delta_models import user_cache
from assay.vhack.pairs import generate_pairs, write_pairs
from assay.vhack.pairs.pairs import authored_pairs

EXTRACT = ("vhack", "extract", "--model", "reference:llama", "--device", "cpu")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_a_basis_is_written_and_described(told, refused, tmp_path):
    path = tmp_path / "basis.safetensors"
    pairs = authored_pairs()[:4]
    write_pairs(tmp_path / "pairs.jsonl", pairs)
    said = told(*EXTRACT, "--pairs", tmp_path / "pairs.jsonl", "--n-heldout", 1, "-o", path)
    assert said["schema"] == "assay.vhack.extract/1"
    assert (said["modules_left_out"], said["weights_covered"]) == (0, 1.0)
    assert (
        said["modules"],
        said["pairs_used"],
        said["pairs_held_out"],
        said["axes_per_module"],
    ) == (56, 3, 1, 3)
    basis = Basis.load(path, load_model("reference:llama", device="cpu"))
    assert basis.origin.pairs == tuple(pair.key for pair in pairs[:3])
    assert said["weights"] == basis.origin.weights
    assert len(list((tmp_path / "cache" / "assay" / "svd").iterdir())) == 56
    # The file is not replaced unasked, and nothing is computed first.
    assert "exists" in refused(*EXTRACT, "--pairs", tmp_path / "pairs.jsonl", "-o", path)


@pytest.mark.slow
def test_a_table_without_json_and_no_cache(assay, tmp_path):
    write_pairs(tmp_path / "pairs.jsonl", authored_pairs()[:2])
    asked = ["--n-heldout", "0", "--no-cache", "--rank", "8", "--method", "svd"]
    said = assay(*EXTRACT, "--pairs", tmp_path / "pairs.jsonl", *asked, "-o", tmp_path / "b")
    assert said.code == 0
    assert "captured energy" in said.out
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--heldout-group", "nobody"), "'nobody' is not there"),
        (("--max-tokens", 0), "`max_tokens` 0"),
        (("--pairs", "missing.jsonl"), "missing.jsonl"),
        (("--factors", "int8"), "`factors` int8"),
        (("-o", "missing/basis"), "missing/basis: No such file or directory"),
    ],
)
def test_bad_input_is_refused_before_the_model_is_loaded(
    refused, tmp_path, monkeypatch, arguments, message
):
    monkeypatch.setattr(
        "assay.models.load_model", lambda *_, **__: pytest.fail("the model was loaded")
    )
    assert message in refused(*EXTRACT, "-o", tmp_path / "basis", *arguments)
    assert not (tmp_path / "basis").exists()


def test_few_groups_are_told_with_what_to_do(assay, tmp_path):
    write_pairs(tmp_path / "pairs.jsonl", generate_pairs(4))
    extract = ("vhack", "extract", "--model", "no/model", "-o", tmp_path / "basis", "--pairs")
    said = assay(*extract, tmp_path / "pairs.jsonl").err
    assert "warning: 4 pairs in 4 groups are too few" in said
    assert "by lda, assay vhack check needs 13" in said
    assert "generated:48" in said
    assert "warning" not in assay(*extract, "generated:20").err


def test_a_user_without_a_cache_directory_does_without(tmp_path, monkeypatch):
    model = SimpleNamespace(device=torch.device("cpu"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert user_cache(model) == tmp_path / "assay"
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert user_cache(model) is None
    assert user_cache(model, tmp_path) == tmp_path
