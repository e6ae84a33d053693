"""The demonstration, on the bundled model and on one without a law, as a user sees it."""

import json
import shlex
import shutil

import pytest
from safetensors.torch import load_file, save_file

from assay.cli.demo import VERIFYING
from assay.models.resolve import find_bundled
from assay.poc import Proof


@pytest.fixture
def foreign(tmp_path):
    """A checkpoint in float32 with a tokenizer, of which assay has no law."""
    folder = tmp_path / "model"
    shutil.copytree(find_bundled("reference:qwen3"), folder)
    weights = {
        name: tensor.float() * 1.01
        for name, tensor in load_file(folder / "model.safetensors").items()
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text()) | {
        "dtype": "float32",
        "torch_dtype": "float32",
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.no_law
@pytest.mark.slow
@pytest.mark.parametrize("bundled", [True, False])
def test_demo_believes_the_honest_and_catches_the_cheaters(
    assay, tmp_path, monkeypatch, foreign, bundled
):
    monkeypatch.setattr("assay.framework.output.PAUSE", 0.0)
    result = assay(
        "demo", "--model", "reference:qwen3" if bundled else foreign, "-o", tmp_path, "--json"
    )
    assert result.code == 0, result.err
    summary = json.loads(result.out)
    assert summary["schema"] == "assay.demo/2"
    assert [row["verdict"] for row in summary["honest"]] == ["honest"] * 3
    assert [row["verdict"] for row in summary["cheaters"]] == ["fraud"] * 4
    assert summary["all_as_expected"] is True
    page = (tmp_path / "report.html").read_text()
    assert page.count("<svg") == 1
    assert summary["detectors"].keys() == {
        *("length", "ngrams", "program", "likelihood", "probe", "cin-lda")
    }
    assert (
        0
        <= summary["filter"]["lost"]
        < summary["filter"]["caught"]
        <= summary["filter"]["asked"]
        < 48
    )
    for phase in ("honest nodes: ", "detectors: ", *(() if bundled else ("honest noise: ",))):
        assert phase in result.err, "a pipe sees progress"
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert len(Proof.load(tmp_path / "proof.jsonl").records) == 56
    assert (tmp_path / "calibration.json").exists() is not bundled
    assert (tmp_path / "verify.toml").read_text() == VERIFYING
    program, *verify = shlex.split(summary["next"][0])
    assert program == "assay"
    verified = assay(*verify)
    assert verified.code == 0, "the command that the demonstration prints"
    assert "warning" not in verified.err


def test_demo_takes_the_real_model_where_its_packages_are(assay, tmp_path, monkeypatch):
    asked = []

    def stop(name):
        asked.append(name)
        raise FileNotFoundError(2, "stop", name)

    monkeypatch.setattr("assay.models.model_info", stop)
    for found in (True, False):
        monkeypatch.setattr(
            "assay.cli.demo.find_spec", lambda name, found=found: found or name != "gguf" or None
        )
        assert assay("demo", "-o", tmp_path / "new").code == 2
    assert asked == ["pretrained:smollm2", "reference:qwen3"]
    assert not (tmp_path / "new").exists()


def test_demo_refuses_a_model_without_a_tokenizer_before_it_computes(
    assay, tmp_path, small_checkpoint
):
    refused = assay("demo", "--model", small_checkpoint, "-o", tmp_path / "new")
    assert (refused.code, (tmp_path / "new").exists()) == (2, False)
    assert "tokenizer" in refused.err


def test_demo_replaces_only_its_own_files(refused, small_checkpoint, tmp_path):
    words = ("demo", "--model", small_checkpoint, "-o", tmp_path)
    (tmp_path / "proof.jsonl").write_text("of the user")
    assert "holds proof.jsonl, which no demo wrote" in refused(*words)
    (tmp_path / "verify.toml").write_text(VERIFYING)
    assert "tokenizer" in refused(*words)
