"""``assay research clusters``: tables on stdout, files in the run's folder, and what is refused."""

import json
from pathlib import Path

import pytest

from research.tests import published


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("assay_research.clusters.clusters.LEAST_AUDITS", 0)
    monkeypatch.setattr("assay_research.clusters.clusters.CHEAT_AUDITS", 2)
    monkeypatch.setattr("assay_research.clusters.clusters.INSIDE_AUDITS", 2)


def test_tables_a_page_and_json(small, assay, tmp_path: Path):
    data = published.write(tmp_path / "nonces.jsonl", published.network(3, nonces=64))
    result = assay("research", "clusters", data, "--audits", 2, "-o", tmp_path)
    assert result.code == 0, result.err
    for words in ("2026-05 model-a", "first version", "count (0.41, 0.1, 0.05)", "oracle", "report: "):
        assert words in result.out
    (folder,) = tmp_path.glob("clusters-nonces-*")
    assert (folder / "report.html").is_file()
    again = json.loads(assay("research", "clusters", data, "--audits", 2, "-o", tmp_path, "--json").out)
    assert again["schema"] == "assay_research.clusters/1"
    assert again["folder"] == str(folder)
    assert [build["build"] for build in again["builds"]] == ["2026-05 model-a"]


def test_refusals(assay, tmp_path: Path):
    assert assay("research", "clusters", tmp_path / "none.jsonl", "-o", tmp_path).code == 2
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"set": "a"}\n')
    result = assay("research", "clusters", bad, "-o", tmp_path)
    assert result.code == 2
    assert "bad.jsonl, line 1" in result.err
    assert assay("research", "clusters", bad, "--audits", 0, "-o", tmp_path).code == 2
    assert [path.name for path in tmp_path.iterdir()] == ["bad.jsonl"]
