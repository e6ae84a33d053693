"""The page of a run: sections of what is there, in their order, and what it says of a run that is not finished."""

import pytest
from assay_research.runs import report as _report
from assay_research.runs.report import Section, build_report
from assay_research.runs.runs import open_run

from assay.errors import DataError


@pytest.fixture
def registered(monkeypatch):
    """Two experiments whose sections are drawn by functions of this test."""
    monkeypatch.setattr(_report, "SECTIONS", dict.fromkeys(("second", "first"), f"{__name__}:shown"))


def shown(run) -> Section:
    return Section(f"{run.experiment}: {len(run.cells)} cells", "about", {})


def measure(folder, experiment: str, count: int) -> None:
    with open_run(folder, experiment, {"seq_len": 8, "blocks": ["a", "b"]}) as run:
        for index in range(count):
            run.append(str(index), {"value": index})


def test_sections_come_in_the_order_of_the_table(registered, tmp_path):
    measure(tmp_path, "first", 3)
    one = build_report(tmp_path).read_text()
    assert "first: 3 cells" in one
    assert "second" not in one
    measure(tmp_path, "second", 1)
    both = build_report(tmp_path).read_text()
    assert both.index("second: 1 cells") < both.index("first: 3 cells")
    assert "a, b" in both
    assert "has not reached its end" not in both
    assert build_report(tmp_path).read_text() == both


def test_a_folder_without_experiments(tmp_path):
    with pytest.raises(DataError, match="holds no experiment"):
        build_report(tmp_path)
