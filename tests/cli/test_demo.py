"""The demonstration, on the bundled model and on one without a law, as a user sees it."""

import json
import shlex

import pytest

from assay.poc import Proof


@pytest.mark.parametrize("bundled", [True, False])
def test_demo_believes_the_honest_and_catches_the_cheaters(assay, tmp_path, monkeypatch, small_checkpoint, bundled):
    monkeypatch.setattr("assay.cli.output.PAUSE", 0.0)
    result = assay("demo", "--model", "reference:qwen3" if bundled else small_checkpoint, "-o", tmp_path, "--json")
    assert result.code == 0, result.err
    summary = json.loads(result.out)
    assert summary["schema"] == "assay.demo/2"
    assert [row["verdict"] for row in summary["honest"]] == ["honest"] * 3
    assert [row["verdict"] for row in summary["cheaters"]] == ["fraud"] * 4
    assert summary["all_as_expected"] is True
    page = (tmp_path / "report.html").read_text()
    assert page.count("<svg") == 1
    assert summary["detectors"].keys() == {"length", "ngrams", "likelihood", "probe"}
    assert 0 <= summary["filter"]["lost"] < summary["filter"]["caught"] <= summary["filter"]["asked"] < 48
    for phase in ("honest nodes: ", "detectors: ", *(() if bundled else ("honest noise: ",))):
        assert phase in result.err, "a pipe sees progress"
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert len(Proof.load(tmp_path / "proof.jsonl").records) == 56
    assert (tmp_path / "calibration.json").exists() is not bundled
    program, *verify = shlex.split(summary["next"][0])
    assert program == "assay"
    assert assay(*verify).code == 0, "the command that the demonstration prints"


def test_demo_takes_the_real_model_where_its_packages_are(assay, tmp_path, monkeypatch):
    asked = []

    def stop(name):
        asked.append(name)
        raise FileNotFoundError(2, "stop", name)

    monkeypatch.setattr("assay.models.load.model_info", stop)
    for found in (True, False):
        monkeypatch.setattr("assay.cli.demo.find_spec", lambda name, found=found: found or name != "gguf" or None)
        assert assay("demo", "-o", tmp_path / "new").code == 2
    assert asked == ["pretrained:smollm2", "reference:qwen3"]
    assert not (tmp_path / "new").exists()
