"""A report in a real browser: what decides is in sight at every width, and nothing is wider than the window."""

from pathlib import Path

import pytest

from assay.pages.report import Badge, Report
from tests.poc.service.dashboard.browser import Watched, chromium

pytestmark = [pytest.mark.slow]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    report = Report("A report", "Its table is wider than a phone.", command="assay demo")
    report.section("Verdicts")
    columns = ("node", "mean distance", "valid", "largest residual", "checked", "highest null", "verdict")
    rows = [[f"node {i}", "1.41417", "58.3%", "0.0048", "32", "0.7", Badge("fraud", "fail")] for i in range(3)]
    report.table(columns, rows, caption="cheaters")
    path = tmp_path_factory.mktemp("report") / "report.html"
    report.write(path)
    return path


@pytest.mark.parametrize("width", [360, 640, 1280])
def test_the_verdict_is_in_sight(page: Path, width: int):
    with chromium() as browser:
        watched = Watched(browser, viewport={"width": width, "height": 800})
        watched.page.goto(page.as_uri())
        assert watched.errors == []
        assert watched.overflow() <= 0
        for badge in watched.page.locator("td .badge").all():
            box = badge.bounding_box()
            assert box["x"] >= 0
            assert box["x"] + box["width"] <= width
