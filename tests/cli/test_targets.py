"""``assay poc calibrate --valid-rate``: over blocks, with a model and without."""

import json
from pathlib import Path

import pytest


@pytest.fixture
def proofs(assay, small_checkpoint: Path, tmp_path: Path) -> list[Path]:
    """Proofs of two blocks of the small checkpoint, 32 nonces each."""
    shape = ("--seq-len", 16, "--batch-size", 8, "--device", "cpu", "--nonces", "0:32", "--public-key", "k")
    made = [tmp_path / f"{block}.jsonl" for block in ("one", "two")]
    for path in made:
        options = ("--model", small_checkpoint, "--block-hash", path.stem, "-o", path)
        assert assay("poc", "prove", *options, *shape).code == 0
    return made


def test_proofs_of_several_blocks(assay, proofs: list[Path], small_checkpoint: Path):
    both = ("poc", "calibrate", "--valid-rate", 0.2, *proofs, "--json")
    assumed = json.loads(assay(*both).out)
    assert (assumed["n"], assumed["blocks"], assumed["effective_dimension_from"]) == (64, 2, "assumed")
    given = json.loads(assay(*both, "--effective-dimension", 60).out)
    assert (given["effective_dimension"], given["effective_dimension_from"]) == (60.0, "given")
    assert given["high"] - given["low"] < assumed["high"] - assumed["low"]
    result = assay(*both, "--model", small_checkpoint, "--device", "cpu")
    assert result.code == 0, result.err
    measured = json.loads(result.out)
    assert (measured["effective_dimension_from"], len(measured["factors"])) == ("model", 2)
    for wrong in (
        (proofs[0],),
        ("-o", proofs[0].with_name("x")),
        ("--model", "reference:llama", "--device", "cpu"),
        ("--model", small_checkpoint, "--effective-dimension", 60),
        ("--effective-dimension", 0),
    ):
        assert assay(*both, *wrong).code == 2


def test_the_closed_form_says_how_far_blocks_lie_apart(assay):
    found = json.loads(assay("poc", "calibrate", "--valid-rate", 0.1, "--json").out)
    assert (found["effective_dimension"], found["effective_dimension_from"]) == (16.0, "assumed")
    assert 0.01 < found["block_rate_low"] < 0.05 < 0.15 < found["block_rate_high"] < 0.25
    narrow = json.loads(assay("poc", "calibrate", "--valid-rate", 0.1, "--effective-dimension", 200, "--json").out)
    assert found["block_rate_low"] < narrow["block_rate_low"] < 0.1 < narrow["block_rate_high"] < 0.13
    assert "block_rate_low" not in json.loads(
        assay("poc", "calibrate", "--valid-rate", 0.1, "--dimension", 12, "--json").out
    )
    assert assay("poc", "calibrate", "--valid-rate", 0.1, "--model", "reference:llama").code == 2
