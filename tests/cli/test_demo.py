"""The demonstration, on the bundled model, as a user sees it."""

import json

from assay.poc import Proof


def test_demo_believes_the_honest_and_catches_the_cheaters(assay, tmp_path, monkeypatch):
    monkeypatch.setattr("assay.cli.output.PAUSE", 0.0)
    result = assay("demo", "-o", tmp_path / "out", "--json")
    assert result.code == 0, result.err
    summary = json.loads(result.out)
    assert summary["schema"] == "assay.demo/1"
    assert [row["verdict"] for row in summary["honest"]] == ["honest"] * 9
    assert [row["verdict"] for row in summary["cheaters"]] == ["fraud"] * 4
    assert summary["all_as_expected"] is True
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("<svg") == 1
    assert {row["name"] for row in summary["vhack"]} == {"pools", "heldout", "random_null", "sources", "stability"}
    assert {row["verdict"] for row in summary["vhack"]} == {"pass"}
    assert "<code>assay vhack check</code>" in page
    for phase in ("honest nodes: ", "hack directions: "):
        assert phase in result.err, "a pipe sees progress"
    assert "chord law" in page
    assert "weight matrix, in torch.bfloat16" in page, "factors have the dtype of the weights"
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert len(Proof.load(tmp_path / "out" / "proof.jsonl").records) == 64
