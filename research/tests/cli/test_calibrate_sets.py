"""``assay poc calibrate --vectors``: published vectors, known cheats, and files that are merged."""

import json
from pathlib import Path

import pytest

from assay.poc import Calibration, prove
from research.tests import published


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three honest machines of one build, one of another model and two of another round."""
    rows = published.network(3, nonces=64)
    rows.append(published.machine("2026-05__model-b-h100", model="owner/Model-B", of="b", nonces=64))
    rows += [published.machine(f"other-{i}", block="other", nonces=64) for i in range(2)]
    return published.write(tmp_path_factory.mktemp("sets") / "sets.jsonl.gz", rows)


@pytest.fixture(scope="module")
def cheat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A set of a cheat in the round of the honest ones."""
    rows = [published.machine("2026-04__model-a-int4", noise=0.6, nonces=64)]
    return published.write(tmp_path_factory.mktemp("cheat") / "cheat.jsonl", rows)


@pytest.fixture(scope="module")
def proofs(tmp_path_factory: pytest.TempPathFactory, small_model) -> list[Path]:
    """Proofs of one round in two batch sizes."""
    from assay.poc import Round

    folder = tmp_path_factory.mktemp("proofs")
    round = Round(block_hash="block", public_key="key", model="small", seq_len=8)
    paths = [folder / name for name in ("a.jsonl", "b.jsonl")]
    for path, size in zip(paths, (8, 16), strict=True):
        prove(small_model, round, range(32), batch_size=size, output=path)
    return paths


def test_published_vectors_and_a_known_cheat(assay, sets: Path, cheat: Path, tmp_path: Path):
    path = tmp_path / "c.json"
    made = assay(
        "poc", "calibrate", "--vectors", sets, "--sets", "2026-05,-model-b", "--digest", "ab" * 32, "-o", path,
        "--against", cheat, "--name", "int4", "--json",
    )  # fmt: skip
    assert made.code == 0, made.err
    said = json.loads(made.out)
    assert (said["machines"], said["n"], said["checkpoint"], said["named"]) == (3, 64, "ab" * 32, "int4")
    assert said["left_out_audits"] > 0
    (build,) = Calibration.load(path).builds
    assert [one.name for one in build.machines] == [f"2026-05__model-a-{i}" for i in range(3)]
    assert set(build.named) == {"int4"}


def test_proofs_with_a_scale_of_the_block_and_a_file_to_merge(assay, proofs, sets: Path, small_checkpoint, tmp_path):
    vectors, path = tmp_path / "vectors.json", tmp_path / "c.json"
    assert assay("poc", "calibrate", "--vectors", sets, "--sets", "other", "-o", vectors).code == 0
    made = assay("poc", "calibrate", *proofs, "--model", small_checkpoint, "--merge", vectors, "-o", path)
    assert made.code == 0, made.err
    assert "1024" not in made.out, "the model is known to be no mixture of experts"
    measured = Calibration.load(path)
    assert [(build.preset, build.hidden_size) for build in measured.builds] == [("poc-2.0", 64), ("artifact", 0)]
    both = tmp_path / "both.json"
    assert assay("poc", "calibrate", "--merge", path, "--merge", vectors, "-o", both).code == 0
    assert Calibration.load(both) == measured, "a build that is there already is not added again"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--vectors", "SETS", "--model", "reference:qwen3", "-o", "c.json"), "--model"),
        (("--vectors", "SETS", "--against", "CHEAT", "-o", "c.json"), "in pairs"),
        (("--vectors", "SETS", "--digest", "xyz", "-o", "c.json"), "--digest xyz"),
        (("--vectors", "SETS", "--sets", "nothing", "-o", "c.json"), "choose with --sets"),
    ],
)
def test_forms_that_do_not_go_together_are_refused_by_name(arguments, words: str, assay, sets, cheat, tmp_path: Path):
    known = {"SETS": sets, "CHEAT": cheat}
    result = assay("poc", "calibrate", *(known.get(word, word) for word in arguments))
    assert result.code == 2
    assert words in " ".join(result.err.split())
    assert not list(tmp_path.iterdir())
