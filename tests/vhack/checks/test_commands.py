import json

import typer
from typer.testing import CliRunner

from assay.cli import _vhack_check, _vhack_pairs
from assay.errors import UsageError
from assay.vhack.checks import check_gradients
from assay.vhack.pairs import generate_pairs, read_pairs

app = typer.Typer()
app.add_typer(_vhack_pairs.app, name="pairs")
app.command()(_vhack_check.check)
app.command()(_vhack_check.report)


def called(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_generated_pairs_are_written_and_listed(tmp_path):
    path = tmp_path / "pairs.jsonl"
    made = called("pairs", "generate", "-n", 9, "--seed", 4, "-o", path, "--json")
    assert json.loads(made.stdout) == {
        "schema": "assay.vhack.pairs.generate/1",
        "path": str(path),
        "pairs": 9,
        "groups": 9,
        "seed": 4,
    }
    assert read_pairs(path) == generate_pairs(9, seed=4)
    assert isinstance(called("pairs", "generate", "-n", 9, "-o", path).exception, UsageError)
    assert called("pairs", "generate", "-n", 9, "-o", path, "--overwrite").exit_code == 0
    assert len(json.loads(called("pairs", "list", path, "--json").stdout)["pairs"]) == 9
    assert "16 pairs in 8 groups" in called("pairs", "list").stdout


def test_verify_says_which_pair_does_not_hold(tmp_path):
    path = tmp_path / "pairs.jsonl"
    called("pairs", "generate", "-n", 2, "--mechanism", "prints", "-o", path)
    assert called("pairs", "verify", path).exit_code == 0
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines[1]["hack"], lines[1]["clean"] = lines[1]["clean"], lines[1]["hack"]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    result = called("pairs", "verify", path, "--json")
    assert result.exit_code == 1
    assert [bool(pair["faults"]) for pair in json.loads(result.stdout)["pairs"]] == [False, True]
    assert "1 of 2 pairs do what they claim" in called("pairs", "verify", path).stdout


def test_check_writes_json_and_page_and_report_draws_it_again(tmp_path):
    result = called(
        *(
            "check",
            "--model",
            "reference:qwen3",
            "--dtype",
            "float32",
            "--pairs",
            "generated:12",
            "--method",
            "mean-diff",
        ),
        *("--k-use", 1, "-o", tmp_path / "check.json", "--html", tmp_path / "check.html", "--json"),
    )
    values = json.loads(result.stdout)
    assert result.exit_code == {"pass": 0, "fail": 1, "undecided": 2}[values["verdict"]]
    assert json.loads((tmp_path / "check.json").read_text()) == values
    assert "reference:qwen3" in (tmp_path / "check.html").read_text()
    drawn = called("report", tmp_path / "check.json", "-o", tmp_path / "again.html", "--json")
    assert json.loads(drawn.stdout)["verdict"] == values["verdict"]
    assert (tmp_path / "again.html").stat().st_size > 50_000


def test_the_table_of_a_report_gives_every_verdict_with_its_reason(gradients, quick, capsys):
    _vhack_check._print(check_gradients(gradients(0), settings=quick))
    shown = capsys.readouterr().out
    assert shown.count("fail") >= 5
    assert "Against random bases: p = " in shown
