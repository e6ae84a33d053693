import json

import pytest

from assay.vhack.environment import episodes
from assay.vhack.pairs import write_pairs
from assay.vhack.training.pool import RolloutPool
from tests.vhack.training.conftest import cheating, checkpoint, model, pairs  # noqa: F401


@pytest.fixture
def arguments(checkpoint, pairs, model, tmp_path):  # noqa: F811
    write_pairs(tmp_path / "pairs.jsonl", pairs)
    tasks = episodes(2, modes=["exit_code"], difficulty=1, share_none=0.2)
    RolloutPool([cheating(one, model.tokenizer) for one in tasks if one.mode != "none"]).save(
        tmp_path / "pool.jsonl"
    )
    return [
        "vhack", "train", "--model", checkpoint, "-o", tmp_path / "run", "--pairs", tmp_path / "pairs.jsonl",
        "--method", "svd", "--modes", "exit_code", "--difficulty", "1", "--tasks", 2, "--prompts", 1, "--group", 3,
        "--max-new-tokens", 64, "--teacher", tmp_path / "pool.jsonl", "--teacher-share", "0.34", "--dtype", "float32",
        "--device", "cpu", "--save-every", 1, "--arm", "displaced-0.4+erase-update-two-sided",
    ]  # fmt: skip


@pytest.mark.slow
def test_a_run_is_made_and_continued(assay, told, refused, arguments):
    first = assay(*arguments, "--steps", 1)
    assert first.code == 0, first.err
    assert "displaced-0.4+erase-update-two-sided: 1 steps in" in " ".join(first.out.split())
    assert "step 1/1  hack" in first.err
    assert "arm displaced-0.4+erase-update-two-sided: " in first.err
    second = assay(*arguments, "--steps", 2, "--allow-partial", "--json")
    values = json.loads(second.out)
    assert values["schema"] == "assay.vhack.train.result/1"
    assert (values["steps"], values["resumed_from"], values["arm"]) == (
        2,
        1,
        "displaced-0.4+erase-update-two-sided",
    )
    assert "step 1/2" not in second.err
    assert values["last"]["leak_two_sided"] < 1e-6
    assert values["last"]["displacement"] > 1
    assert told(*arguments, "--steps", 2)["resumed_from"] == 2
    assert "lr 0.015, now 0.5" in refused(*arguments, "--steps", 2, "--lr", "0.5")


@pytest.mark.parametrize(
    ("flags", "seen"),
    [
        (["--arm", "nothing"], "arm 'nothing'"),
        (["--difficulty", "easy"], "`difficulty` easy"),
        (["--basis", "missing.safetensors"], "missing.safetensors"),
        (["--micro-batch", "2"], "`micro_batch` 2"),
    ],
)
def test_bad_arguments_leave_nothing(refused, arguments, tmp_path, flags, seen):
    assert seen in refused(*arguments, *flags)
    assert not (tmp_path / "run" / "log.jsonl").exists()


def test_a_run_goes_into_a_directory(refused, arguments, tmp_path):
    (tmp_path / "run").write_text("")
    assert "run" in refused(*arguments, "--steps", 1)
