import json
from dataclasses import replace

import pytest
from click.testing import CliRunner

from assay.cli.vhack import CheckCommand, ExtractSettings, vhack
from assay.errors import DataError, StorageError, UsageError
from assay.vhack import Origin
from assay.vhack.checks import CheckSettings, check_gradients
from assay.vhack.checks.folds import fewest_groups
from assay.vhack.pairs import generate_pairs, read_pairs
from assay.vhack.training import TrainSettings


def called(*arguments):
    return CliRunner().invoke(vhack, [str(argument) for argument in arguments])


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


@pytest.fixture
def no_model(monkeypatch):
    """A command that gets as far as loading a model fails."""
    monkeypatch.setattr("assay.models.load.load_model", lambda *_, **__: pytest.fail("the model was loaded"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--method", "pca"), "method='pca'"),
        (("-o", "missing/check.json"), "missing/check.json: No such file or directory"),
        (("--html", "."), "Is a directory"),
        (("--basis", "missing.safetensors"), "cannot be read"),
    ],
)
def test_what_cannot_work_is_refused_before_the_model_is_loaded(no_model, monkeypatch, tmp_path, arguments, message):
    monkeypatch.chdir(tmp_path)
    error = called("check", "--model", "reference:llama", *arguments).exception
    assert isinstance(error, UsageError | DataError | StorageError)
    assert message in error.seen


def test_the_default_method_is_that_of_extraction_and_training():
    defaults = [CheckSettings().method, Origin().method, TrainSettings(model="m").method]
    flags = [command.model_fields["method"].default for command in (CheckCommand, ExtractSettings)]
    assert {*defaults, *flags} == {"lda"}


def test_too_few_groups_are_told_before_the_work(monkeypatch):
    def stop(*_, **__):
        raise UsageError("stopped", wanted="", do="")

    monkeypatch.setattr("assay.models.load.load_model", stop)
    result = called("check", "--model", "m", "--pairs", "authored")
    assert "warning: 8 groups are too few for a verdict by lda: it needs 13" in result.stderr
    assert "or check with --method svd, which needs 6" in result.stderr
    assert "warning" not in called("check", "--model", "m", "--pairs", "authored", "--method", "svd").stderr
    assert "warning" not in called("check", "--model", "m", "--pairs", "generated:48").stderr


def test_the_fewest_groups_are_those_that_give_a_verdict(gradients, quick):
    for method in ("svd", "lda"):
        settings = replace(quick, method=method)
        least = fewest_groups(settings)
        verdicts = {
            n: {made.verdict for made in check_gradients(gradients(0, n_groups=n), settings=settings).checks}
            for n in (least - 1, least)
        }
        assert "undecided" in verdicts[least - 1]
        assert "undecided" not in verdicts[least]
