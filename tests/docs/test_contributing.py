"""The table of CONTRIBUTING.md that says where to change what."""

import re
from dataclasses import replace
from pathlib import Path

from assay.poc.protocol.pipelines import PIPELINES, get_pipeline
from assay.vhack.directions.delta.arms import ARMS, arm_named

ROOT = Path(__file__).parents[2]


def test_its_files_and_folders_exist():
    page = (ROOT / "CONTRIBUTING.md").read_text()
    table = page.split("## Where to change what")[1].split("\n## ")[0]
    paths = re.findall(r"[`(\s]([\w-]+(?:/[\w.-]+)+)", table)
    assert len(paths) > 14
    absent = [
        path
        for path in paths
        if not any((top / path).exists() for top in (ROOT, ROOT / "src/assay"))
    ]
    assert not absent


def test_a_row_of_a_registry_is_all_that_its_lookup_needs(monkeypatch):
    monkeypatch.setitem(PIPELINES, "fresh", replace(PIPELINES["poc-2.0"], name="fresh"))
    monkeypatch.setitem(ARMS, "fresh", ARMS["filter"])
    assert get_pipeline("fresh").name == "fresh"
    assert arm_named("fresh") == ARMS["filter"]
