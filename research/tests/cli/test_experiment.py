"""``assay poc experiment`` and ``assay research clusters``: tables on stdout, files of the run, and
what is refused.
"""

import json
from pathlib import Path

import pytest
from assay_research.matrix import MatrixPlan
from assay_research.runs.runs import open_run

from research.tests import published
from research.tests.experiments.test_matrix import published_cells

SMALL = ["--nonces", "32", "--seq-len", "8", "--dtype", "float32", "--device", "cpu"]


@pytest.fixture
def finished_matrix(tmp_path: Path) -> Path:
    """A run that holds the 36 published tests."""
    plan = MatrixPlan(models=("qwen", "llama"), device="cpu")
    names = {test.key for test in plan.tests()}
    with open_run(tmp_path / "seeds", "matrix", plan.settings) as run:
        for cell in published_cells():
            assert cell["key"] in names
            run.append(cell["key"], {name: value for name, value in cell.items() if name != "key"})
    return tmp_path


def test_a_finished_matrix_prints_the_published_table(finished_matrix, assay):
    result = assay(
        "poc", "experiment", "matrix", "--models", "qwen,llama", "--device", "cpu", "--run-name", "seeds",
        "-o", finished_matrix,
    )  # fmt: skip
    assert result.code == 0, result.err
    for words in (
        "qwen, sign-flips",
        "58.07%",
        "block_gamma",
        "1.09%",
        "10.27%",
        "inside noise",
        "over 5%",
        "120.0",
    ):
        assert words in result.out
    assert (finished_matrix / "seeds" / "report.html").is_file()


def test_approaches_and_weights_share_a_page(assay, small_checkpoint, tmp_path):
    common = ["--models", small_checkpoint, *SMALL, "--run-name", "both", "-o", tmp_path]
    result = assay(
        "poc",
        "experiment",
        "approaches",
        "--approaches",
        "sign-flips,artifact",
        "--checked",
        8,
        "--timed",
        0,
        *common,
    )
    assert result.code == 0, result.err
    assert "poc-2.0" in result.out
    assert "breaks structure" in result.out
    result = assay("poc", "experiment", "weights", *common, "--json")
    assert json.loads(result.out)["schema"] == "assay.poc.experiment.weights/1"
    page = Path(json.loads(result.out)["report"]).read_text()
    assert "Which approach breaks" in page
    assert "Does training give" in page
    again = assay("poc", "experiment", "report", "--run-name", "both", "-o", tmp_path)
    assert (again.code, again.out.strip()) == (0, str(tmp_path / "both" / "report.html"))
    assert Path(again.out.strip()).read_text() == page, "the same records give the same bytes"


@pytest.mark.parametrize(
    ("arguments", "seen"),
    [
        (["report", "--run-name", "none"], "holds no experiment"),
        (["report", "--run-name", "../none"], "run name"),
        (["matrix", "--modes", "nonsense"], "modes nonsense"),
        (["matrix", "--duration", "0"], "duration"),
        (["weights", "--preset", "nonsense"], "preset 'nonsense'"),
        (["approaches", "--approaches", "nonsense"], "preset 'nonsense'"),
        (["approaches", "--models", ""], "models ()"),
        (["approaches", "--models", "reference:nonsense"], "reference:nonsense"),
        (["weights", "--dtype", "fp16"], "--dtype fp16"),
        (["redteam", "--dtypes", "bfloat16,int4"], "dtypes int4"),
        (["responses", "--dtypes", "float8"], "dtypes float8"),
    ],
)
def test_refusals(arguments: list[str], seen: str, assay, tmp_path):
    result = assay("poc", "experiment", *arguments, "-o", tmp_path)
    assert result.code == 2
    assert seen in result.err
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("assay_research.clusters.clusters.LEAST_AUDITS", 0)
    monkeypatch.setattr("assay_research.clusters.clusters.CHEAT_AUDITS", 2)
    monkeypatch.setattr("assay_research.clusters.clusters.INSIDE_AUDITS", 2)


def test_tables_a_page_and_json(small, assay, tmp_path: Path):
    data = published.write(tmp_path / "nonces.jsonl", published.network(3, nonces=64))
    result = assay("research", "clusters", data, "--audits", 2, "-o", tmp_path)
    assert result.code == 0, result.err
    for words in ("2026-05 model-a", "count (0.41, 0.1, 0.05)", "oracle", "report: "):
        assert words in result.out
    (folder,) = tmp_path.glob("clusters-nonces-*")
    assert (folder / "report.html").is_file()
    again = json.loads(
        assay("research", "clusters", data, "--audits", 2, "-o", tmp_path, "--json").out
    )
    assert again["schema"] == "assay_research.clusters/1"
    assert again["folder"] == str(folder)
    assert [build["build"] for build in again["builds"]] == ["2026-05 model-a"]


def test_sets_that_cannot_be_read_are_refused(assay, tmp_path: Path):
    assert assay("research", "clusters", tmp_path / "none.jsonl", "-o", tmp_path).code == 2
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"set": "a"}\n')
    result = assay("research", "clusters", bad, "-o", tmp_path)
    assert result.code == 2
    assert "bad.jsonl, line 1" in result.err
    assert assay("research", "clusters", bad, "--audits", 0, "-o", tmp_path).code == 2
    assert [path.name for path in tmp_path.iterdir()] == ["bad.jsonl"]
