"""``assay poc calibrate --vectors``: published vectors, known cheats, and files that are merged."""

import json
from pathlib import Path

import pytest

from assay.poc import Calibration
from research.tests import published


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three honest machines of one build, one of another model and two of another round."""
    rows = published.network(3, nonces=64)
    rows.append(
        published.machine("2026-05__model-b-h100", model="owner/Model-B", of="b", nonces=64)
    )
    rows += [published.machine(f"other-{i}", block="other", nonces=64) for i in range(2)]
    return published.write(tmp_path_factory.mktemp("sets") / "sets.jsonl.gz", rows)


def test_published_vectors(assay, sets: Path, tmp_path: Path):
    path = tmp_path / "c.json"
    made = assay(
        "poc", "calibrate", "--vectors", sets, "--sets", "2026-05,-model-b", "--digest", "ab" * 32, "-o", path,
        "--json",
    )  # fmt: skip
    assert made.code == 0, made.err
    said = json.loads(made.out)
    assert (said["machines"], said["n"], said["checkpoint"]) == (3, 64, "ab" * 32)
    assert said["left_out_audits"] > 0
    (build,) = Calibration.load(path).builds
    assert [one.name for one in build.machines] == [f"2026-05__model-a-{i}" for i in range(3)]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--vectors", "SETS", "--model", "reference:qwen3", "-o", "c.json"), "--model"),
        (("--vectors", "SETS", "--digest", "xyz", "-o", "c.json"), "`digest` xyz"),
        (("--vectors", "SETS", "--sets", "nothing", "-o", "c.json"), "choose with `sets`"),
    ],
)
def test_forms_that_do_not_go_together_are_refused_by_name(
    arguments, words: str, assay, sets, tmp_path: Path
):
    known = {"SETS": sets}
    result = assay("poc", "calibrate", *(known.get(word, word) for word in arguments))
    assert result.code == 2
    assert words in " ".join(result.err.split())
    assert not list(tmp_path.iterdir())
