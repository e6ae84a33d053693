import json

import pytest

from assay.vhack.pairs import generate_pairs, read_pairs

GENERATE = ("vhack", "pairs", "generate")
VERIFY = ("vhack", "pairs", "verify")


def test_generated_pairs_are_written_and_listed(assay, told, refused, tmp_path):
    path = tmp_path / "pairs.jsonl"
    wanted = {
        "schema": "assay.vhack.pairs.generate/1",
        "path": str(path),
        "pairs": 9,
        "groups": 9,
        "seed": 4,
    }
    assert told(*GENERATE, "-n", 9, "--seed", 4, "-o", path) == wanted
    assert read_pairs(path) == generate_pairs(9, seed=4)
    refused(*GENERATE, "-n", 9, "-o", path)
    told(*GENERATE, "-n", 9, "-o", path, "--overwrite")
    assert len(told("vhack", "pairs", "list", path)["pairs"]) == 9
    assert "16 pairs in 8 groups" in assay("vhack", "pairs", "list").out


def test_verify_says_which_pair_does_not_hold(assay, told, tmp_path):
    path = tmp_path / "pairs.jsonl"
    told(*GENERATE, "-n", 2, "--mechanism", "prints", "-o", path)
    told(*VERIFY, path)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines[1]["hack"], lines[1]["clean"] = lines[1]["clean"], lines[1]["hack"]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    result = assay(*VERIFY, path, "--json")
    assert result.code == 1
    assert [bool(pair["faults"]) for pair in json.loads(result.out)["pairs"]] == [False, True]
    assert "1 of 2 pairs do what they claim" in assay(*VERIFY, path).out


@pytest.mark.slow
def test_check_writes_json_and_page_and_report_draws_it_again(assay, tmp_path):
    check = (
        "vhack",
        "check",
        "--model",
        "reference:qwen3",
        "--dtype",
        "float32",
        "--pairs",
        "generated:12",
    )
    how = (
        "--method",
        "svd",
        "--k-use",
        1,
        "-o",
        tmp_path / "check.json",
        "--html",
        tmp_path / "check.html",
    )
    result = assay(*check, *how, "--json")
    values = json.loads(result.out)
    assert result.code == {"pass": 0, "fail": 1, "undecided": 2}[values["verdict"]]
    assert json.loads((tmp_path / "check.json").read_text()) == values
    assert "reference:qwen3" in (tmp_path / "check.html").read_text()
    drawn = assay(
        "vhack", "report", tmp_path / "check.json", "-o", tmp_path / "again.html", "--json"
    )
    assert json.loads(drawn.out)["verdict"] == values["verdict"]
    assert (tmp_path / "again.html").stat().st_size > 20_000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("-o", "missing/check.json"), "missing/check.json: No such file or directory"),
        (("--html", "."), "Is a directory"),
        (("--basis", "missing.safetensors"), "No such file"),
        (("--pairs", "generated:4"), "2 pairs for lda"),
    ],
)
def test_what_cannot_work_is_refused_before_the_model_is_loaded(
    refused, monkeypatch, tmp_path, arguments, message
):
    monkeypatch.setattr(
        "assay.models.load_model", lambda *_, **__: pytest.fail("the model was loaded")
    )
    monkeypatch.chdir(tmp_path)
    assert message in refused("vhack", "check", "--model", "reference:llama", *arguments)


def test_too_few_groups_are_told_before_the_work(assay):
    check = ("vhack", "check", "--model", "no/model", "--pairs")
    said = assay(*check, "authored").err
    assert "warning: 8 groups are too few for a verdict by lda: it needs 13" in said
    assert "or check with --method svd, which needs 6" in said
    assert "warning" not in assay(*check, "authored", "--method", "svd").err
    assert "warning" not in assay(*check, "generated:48").err
