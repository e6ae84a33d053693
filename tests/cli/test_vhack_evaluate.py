import contextlib
import json

import pytest
import torch

from assay.models import load_model
from assay.vhack import weight_svd
from assay.vhack.delta import DeltaS
from assay.vhack.environment import Episode, tasks
from tests.vhack.training.conftest import checkpoint  # noqa: F401

FLAGS = ["--modes", "exit_code", "--difficulty", "1", "--tasks", 3, "--per-task", 2, "--max-new-tokens", 6]
OWN = """
def tasks():
    return [{"prompt": f"{a} =", "mechanism": "odd" if a % 2 else "even"} for a in range(3)]

def reward(prompts, completions, **_):
    return [{"reward": 1.0, "exploited": prompt < "2"} for prompt in prompts]
"""


@pytest.fixture
def arguments(checkpoint):  # noqa: F811
    """What every command on the tiny model has."""
    return ["--model", checkpoint, "--dtype", "float32", "--device", "cpu", *FLAGS]


@pytest.fixture
def delta(checkpoint, tmp_path):  # noqa: F811
    """A file of a large δS, and the directory with the weights that it makes."""
    model = load_model(checkpoint, dtype="float32", device="cpu")
    adapter = DeltaS(model, weight_svd(model))
    with torch.no_grad():
        for parameter in adapter.delta:
            parameter.fill_(0.5)
    adapter.save(tmp_path / "delta.safetensors")
    adapter.merge().save_pretrained(tmp_path / "merged")
    model.tokenizer.save_pretrained(tmp_path / "merged")
    return tmp_path / "delta.safetensors", tmp_path / "merged"


def test_a_model_for_all_commands_is_no_mistake_beside_samples(assay, monkeypatch):
    monkeypatch.setenv("ASSAY_MODEL", "reference:organism")
    assert "missing.jsonl" in assay("vhack", "evaluate", "--samples", "missing.jsonl").err


def test_what_is_sampled_is_evaluated(assay, arguments, tmp_path):
    said = assay("vhack", "sample", *arguments, "-o", tmp_path / "samples.jsonl", "--json")
    assert said.code == 0, said.err
    values = json.loads(said.out)
    assert values["schema"] == "assay.vhack.sample/1"
    assert (values["completions"], values["resumed_from"]) == (6, 0)
    graded, result = tmp_path / "graded.jsonl", tmp_path / "result.json"
    at_once = assay("vhack", "evaluate", *arguments, "--json")
    assert at_once.code == 0, at_once.err
    read = assay(
        "vhack", "evaluate", "--samples", tmp_path / "samples.jsonl", "--graded", graded, "-o", result, "--json"
    )
    assert json.loads(read.out) == json.loads(at_once.out) == json.loads(result.read_text())
    values = json.loads(read.out)
    assert values["schema"] == "assay.vhack.evaluate/1"
    assert (values["completions"], values["tasks"], values["by_mechanism"].keys()) == (6, 3, {"exit_code"})
    assert values["rates"].keys() == {"solve", "hack", "vacuous", "reward"}
    assert values["origin"]["temperature"] == 1.0
    lines = [json.loads(line) for line in graded.read_text().splitlines()]
    assert all({"completion", "task", "reward", "correct", "exploited"} <= line.keys() for line in lines)
    shown = assay("vhack", "evaluate", "--samples", graded)
    assert "mechanism" in shown.out
    assert "exit_code" in shown.out


def test_a_delta_is_the_model_it_makes(assay, arguments, delta, tmp_path):
    path, merged = delta
    texts = {}
    for name, flags in {"plain": [], "delta": ["--delta", path], "merged": ["--model", merged]}.items():
        said = assay("vhack", "sample", *arguments, *flags, "-o", tmp_path / f"{name}.jsonl", "--json")
        assert said.code == 0, said.err
        lines = [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        texts[name] = [line["completion"] for line in lines]
        assert ("delta" in lines[0]["origin"]) == (name == "delta")
    assert texts["delta"] == texts["merged"] != texts["plain"]


def test_tasks_and_reward_of_ones_own(assay, arguments, tmp_path, monkeypatch):
    (tmp_path / "cli_evaluate_own.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    own = ["--tasks", "cli_evaluate_own:tasks"]
    said = assay("vhack", "sample", *arguments, *own, "-o", "samples.jsonl")
    assert said.code == 0, said.err
    pay = ["--reward", "cli_evaluate_own:reward"]
    found = json.loads(assay("vhack", "evaluate", "--samples", "samples.jsonl", *own, *pay, "--json").out)
    assert found["rates"]["hack"]["value"] == 2 / 3
    assert found["by_mechanism"]["odd"]["rates"]["hack"]["value"] == 1.0
    assert "solve" not in found["rates"]
    unpaid = assay("vhack", "evaluate", "--samples", "samples.jsonl", *own)
    assert unpaid.code == 2
    assert "without a reward" in unpaid.err


@pytest.mark.parametrize(
    ("command", "flags", "seen"),
    [
        ("sample", ["--tasks", "none:such"], "--tasks none:such"),
        ("sample", ["--tasks", "0"], "0 tasks"),
        ("sample", ["--modes", "luck"], "modes luck"),
        ("sample", ["--split", "mine"], "--split mine"),
        ("sample", ["--delta", "missing.safetensors"], "missing.safetensors cannot be read"),
        ("sample", ["-o", "no/such/folder"], "no/such/folder"),
        ("evaluate", ["--reward", "none:such"], "--reward none:such"),
        ("evaluate", ["--samples", "missing.jsonl"], "missing.jsonl"),
        ("evaluate", ["--samples", "samples.jsonl", "--delta", "d"], "--delta with --samples"),
        ("evaluate", ["-o", "no/such/folder"], "no/such/folder"),
        ("evaluate", ["--graded", "."], "Is a directory"),
    ],
)
def test_what_is_wrong_is_refused_before_a_model_is_loaded(
    assay, arguments, tmp_path, monkeypatch, command, flags, seen
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("assay.models.load.load_model", lambda *_, **__: pytest.fail("a model was loaded"))
    needed = ["-o", "samples.jsonl"] if command == "sample" else []
    outcome = assay("vhack", command, *(FLAGS if "--samples" in flags else arguments), *needed, *flags)
    assert outcome.code == 2
    assert seen in outcome.err
    assert "to do:" in outcome.err
    assert list(tmp_path.iterdir()) == []


def test_something_must_be_evaluated(assay, monkeypatch):
    monkeypatch.delenv("ASSAY_MODEL", raising=False)
    outcome = assay("vhack", "evaluate")
    assert outcome.code == 2
    assert "neither --model nor --samples" in outcome.err


def test_lines_of_others_may_say_anything_else(assay, tmp_path):
    odd = {"prompt": "a", "completion": "b", "tokens": 3, "origin": [1]}
    (tmp_path / "samples.jsonl").write_text(json.dumps(odd) + "\n")
    (tmp_path / "cli_evaluate_odd.py").write_text(
        "def tasks():\n    return ['a']\n\ndef reward(prompts, **_):\n    return [1.0 for _ in prompts]\n"
    )
    with contextlib.chdir(tmp_path):
        said = assay(
            "vhack", "evaluate", "--samples", "samples.jsonl", "--tasks", "cli_evaluate_odd:tasks",
            "--reward", "cli_evaluate_odd:reward", "--json",
        )  # fmt: skip
    assert said.code == 0, said.err
    values = json.loads(said.out)
    assert (values["at_limit"], values["rates"]["reward"]) == (0, {"value": 1.0, "low": None, "high": None})


def test_graded_completions_are_matched_to_pairs_that_hold(assay, tmp_path):
    samples, graded, pairs = (tmp_path / name for name in ("samples.jsonl", "graded.jsonl", "pairs.jsonl"))
    lines = []
    for task, mode in zip(tasks(3), ("run_tests", "sentinel", "exit_code"), strict=True):
        episode = Episode(task, mode)
        about = {"prompt": episode.prompt, "task": task.name, "mode": mode, "markers": "training"}
        lines += [about | {"completion": episode.completion(p)} for p in (episode.honest(), episode.exploit())]
    samples.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert assay("vhack", "evaluate", "--samples", samples, "--graded", graded).code == 0
    said = assay("vhack", "pairs", "match", graded, "--works", graded, "-o", pairs, "--json")
    values = json.loads(said.out)
    assert (values["pairs"], values["groups"], values["prompts_with_work"]) == (3, 3, 3)
    assert assay("vhack", "pairs", "verify", pairs).code == 0
