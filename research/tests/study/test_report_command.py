"""`assay vhack report` for logs of training runs, and still for checks."""

import json

import pytest
from assay_research.study.log import RunLog
from click.testing import CliRunner

from assay.cli.vhack import vhack
from assay.errors import DataError
from research.tests.study.test_summary import REFERENCE, logs_of


@pytest.fixture
def folder(tmp_path):
    for index, log in enumerate([*REFERENCE, *logs_of("erase-gradient", [0.0] * 5, [0.9] * 5)]):
        log.write(tmp_path / f"{index}.jsonl")
    return tmp_path


def test_logs_become_a_page_and_a_table(folder):
    page = folder / "page.html"
    done = CliRunner().invoke(vhack, ["report", str(folder), "-o", str(page)], catch_exceptions=False)
    assert done.exit_code == 0
    assert "adam/erase-gradient" in page.read_text()
    assert "succeeds" in done.stdout


def test_json_holds_the_numbers(folder):
    done = CliRunner().invoke(
        vhack, ["report", str(folder), "-o", str(folder / "p.html"), "--json"], catch_exceptions=False
    )
    values = json.loads(done.stdout)
    assert values["schema"] == "assay.vhack.report/1"
    assert values["runs"] == 10
    (arm,) = (arm for arm in values["arms"] if arm["condition"] == "adam/erase-gradient")
    assert arm["verdict"] == "succeeds"
    assert arm["tipped"]["count"] == 0


@pytest.mark.parametrize(
    ("change", "words"),
    [({"hack": ...}, "without 'hack'"), ({"solve": "x"}, "without 'solve'"), ({"step": None}, "without 'step'")],
)
def test_a_log_without_rates_is_refused_in_words(tmp_path, change, words):
    """As that of a reward of one's own that returns numbers."""
    log = REFERENCE[0]
    lines = [{**line, **change} if line["kind"] == "step" else line for line in log.state()["lines"]]
    lines = [{name: value for name, value in line.items() if value is not ...} for line in lines]
    RunLog(log.header, lines).write(tmp_path / "log.jsonl")
    with pytest.raises(DataError, match=words):
        CliRunner().invoke(vhack, ["report", str(tmp_path), "-o", str(tmp_path / "p.html")], catch_exceptions=False)
