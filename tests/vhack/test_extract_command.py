"""``assay vhack extract``."""

import json
from types import SimpleNamespace

import pytest
import torch

from assay.cli import run
from assay.errors import UsageError
from assay.models import load_model
from assay.vhack import Basis
from assay.vhack.delta.delta import user_cache
from assay.vhack.pairs import generate_pairs, write_pairs
from assay.vhack.pairs.pairs import authored_pairs


@pytest.fixture
def extract(tmp_path, monkeypatch, capsys):
    """Run the command on the small reference model, and give code, stdout and stderr."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def call(*arguments):
        given = ["vhack", "extract", "--model", "reference:llama", "--device", "cpu", *map(str, arguments)]
        code = run(given)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def test_a_basis_is_written_and_described(extract, tmp_path):
    path = tmp_path / "basis.safetensors"
    pairs = authored_pairs()[:4]
    write_pairs(tmp_path / "pairs.jsonl", pairs)
    code, out, _ = extract("--pairs", tmp_path / "pairs.jsonl", "--n-heldout", 1, "--json", "-o", path)
    assert code == 0
    said = json.loads(out)
    assert said["schema"] == "assay.vhack.extract/1"
    # Three axes of three whitened pairs: of what these axes keep it would be all.
    assert 0.5 < said["energy_of_5_axes"] < 0.999
    assert (said["modules_left_out"], said["weights_covered"]) == (0, 1.0)
    assert (said["modules"], said["pairs_used"], said["pairs_held_out"], said["axes_per_module"]) == (56, 3, 1, 3)
    basis = Basis.load(path, load_model("reference:llama", device="cpu"))
    assert basis.origin.pairs == tuple(pair.key for pair in pairs[:3])
    assert said["weights"] == basis.origin.weights
    assert len(list((tmp_path / "cache" / "assay" / "svd").iterdir())) == 56
    # The file is not replaced unasked, and nothing is computed first.
    code, _, err = extract("--pairs", tmp_path / "pairs.jsonl", "-o", path)
    assert code == 2
    assert "exists" in err


def test_a_table_without_json_and_no_cache(extract, tmp_path):
    write_pairs(tmp_path / "pairs.jsonl", authored_pairs()[:2])
    asked = ["--n-heldout", "0", "--no-cache", "--rank", "8", "--method", "svd"]
    code, out, _ = extract("--pairs", tmp_path / "pairs.jsonl", *asked, "-o", tmp_path / "b")
    assert code == 0
    assert "captured energy" in out
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--top-k", 0), "0 axes"),
        (("--method", "pca"), "method='pca'"),
        (("--heldout-group", "nobody"), "'nobody' is not there"),
        (("--max-tokens", 0), "--max-tokens 0"),
        (("--pairs", "missing.jsonl"), "missing.jsonl"),
        (("--rank", 0), "rank=0"),
        (("--factors", "int8"), "--factors int8"),
        (("-o", "missing/basis"), "missing/basis: No such file or directory"),
    ],
)
def test_bad_input_is_an_error_in_three_parts_before_the_model_is_loaded(
    extract, tmp_path, monkeypatch, arguments, message
):
    monkeypatch.setattr("assay.models.load.load_model", lambda *_, **__: pytest.fail("the model was loaded"))
    code, out, err = extract("-o", tmp_path / "basis", *arguments)
    assert code == 2
    assert message in err
    assert "wanted:" in err
    assert out == ""
    assert not (tmp_path / "basis").exists()


def test_the_last_groups_are_held_out_where_nothing_is_said(extract, tmp_path):
    write_pairs(tmp_path / "pairs.jsonl", generate_pairs(6))
    _, out, _ = extract("--pairs", tmp_path / "pairs.jsonl", "--json", "-o", tmp_path / "basis")
    assert json.loads(out)["groups_held_out"] == [generate_pairs(6)[-1].group]


def test_few_groups_are_told_with_what_to_do(extract, tmp_path, monkeypatch):
    def stop(*_, **__):
        raise UsageError("stopped", wanted="", do="")

    monkeypatch.setattr("assay.models.load.load_model", stop)
    write_pairs(tmp_path / "pairs.jsonl", generate_pairs(4))
    _, _, err = extract("--pairs", tmp_path / "pairs.jsonl", "-o", tmp_path / "basis")
    assert "warning: 4 pairs in 4 groups are too few" in err
    assert "check needs 6 groups" in err
    assert "generated:48" in err
    assert "warning" not in extract("--pairs", "generated:20", "-o", tmp_path / "basis")[2]


def test_a_user_without_a_cache_directory_does_without(tmp_path, monkeypatch):
    model = SimpleNamespace(device=torch.device("cpu"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert user_cache(model) == tmp_path / "assay"
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert user_cache(model) is None
    assert user_cache(model, tmp_path) == tmp_path
