"""``assay poc calibrate``: the forms of the command, and the r_target of a valid rate over blocks."""

import pytest

from assay.poc import Round, prove


@pytest.fixture(scope="module")
def proofs(tmp_path_factory, small_model):
    """Proofs of one round in two batch sizes."""
    folder = tmp_path_factory.mktemp("proofs")
    round = Round(block_hash="block", public_key="key", model="small", seq_len=8)
    paths = [folder / name for name in ("a.jsonl", "b.jsonl")]
    for path, size in zip(paths, (8, 16), strict=True):
        prove(small_model, round, range(32), batch_size=size, output=path)
    return paths


FORMS = {
    "--vectors": ("--valid-rate", 0.1, "--vectors", "x"),
    "--merge": ("--valid-rate", 0.1, "--merge", "x"),
    "--dimension": ("PROOFS", "--dimension", 12, "-o", "c.json"),
    "--effective-dimension": ("PROOFS", "--effective-dimension", 9, "-o", "c.json"),
    "--digest": ("PROOFS", "--digest", "ab" * 32, "-o", "c.json"),
    "--sets": ("PROOFS", "--sets", "x", "-o", "c.json"),
    "-o": ("PROOFS",),
    "leave --vectors": ("PROOFS", "--vectors", "SETS", "-o", "c.json"),
    "directory": ("--vectors", "none", "-o", "no-such-folder/c.json"),
    "repeat --merge": ("--merge", "c.json", "-o", "d.json"),
    "--model with --merge alone": ("--merge", "c", "--merge", "d", "--model", "x", "-o", "e"),
    "two honest proofs": ("PROOF", "-o", "c.json"),
}


@pytest.mark.parametrize("words", FORMS)
def test_forms_that_do_not_go_together_are_refused_by_name(words, refused, proofs, tmp_path):
    known = {"PROOFS": proofs, "PROOF": proofs[:1], "SETS": ["x"]}
    arguments = [value for word in FORMS[words] for value in known.get(str(word), [word])]
    assert words in " ".join(refused("poc", "calibrate", *arguments).split())
    assert not list(tmp_path.iterdir())


@pytest.fixture
def blocks(told, proving, tmp_path):
    """Proofs of two blocks of the small checkpoint, 32 nonces each."""
    return [told(*proving(f"{name}.jsonl", block_hash=name, nonces="0:32"))["path"] for name in ("one", "two")]


def test_proofs_of_several_blocks(told, refused, blocks, small_checkpoint, tmp_path):
    both = ("poc", "calibrate", "--valid-rate", 0.2, *blocks)
    assumed = told(*both)
    assert (assumed["n"], assumed["blocks"], assumed["effective_dimension_from"]) == (64, 2, "assumed")
    assert (assumed["dimension"], assumed["confidence"]) == (8192, 0.95)
    assert assumed["low"] < assumed["measured"] < assumed["high"]
    assert assumed["agrees"] == (assumed["low"] <= assumed["r_target"] <= assumed["high"])
    given = told(*both, "--effective-dimension", 60)
    assert (given["effective_dimension"], given["effective_dimension_from"]) == (60.0, "given")
    assert given["high"] - given["low"] < assumed["high"] - assumed["low"]
    measured = told(*both, "--model", small_checkpoint, "--device", "cpu")
    assert (measured["effective_dimension_from"], len(measured["factors"])) == ("model", 2)
    for wrong in (
        (blocks[0],),
        ("-o", tmp_path / "x"),
        ("--dimension", 5),
        ("--model", "reference:llama", "--device", "cpu"),
        ("--model", small_checkpoint, "--effective-dimension", 60),
        ("--effective-dimension", 0),
    ):
        refused(*both, *wrong)


def test_the_closed_form_says_how_far_blocks_lie_apart(told, refused):
    rate = ("poc", "calibrate", "--valid-rate", 0.1)
    found = told(*rate)
    assert (found["effective_dimension"], found["effective_dimension_from"]) == (16.0, "assumed")
    assert 0.01 < found["block_rate_low"] < 0.05 < 0.15 < found["block_rate_high"] < 0.25
    narrow = told(*rate, "--effective-dimension", 200)
    assert found["block_rate_low"] < narrow["block_rate_low"] < 0.1 < narrow["block_rate_high"] < 0.13
    assert "block_rate_low" not in told(*rate, "--dimension", 12)
    refused(*rate, "--model", "reference:llama")
