import json
from pathlib import Path

import pytest
import torch

from assay.models import load_model
from assay.vhack import weight_svd
from assay.vhack.directions.delta import DeltaS
from assay.vhack.environment import Episode, tasks
from tests.vhack.training.conftest import checkpoint  # noqa: F401

TENSORS = Path(__file__).parents[1] / "data" / "models" / "llama" / "model.safetensors"
TASKS = ["--modes", "exit_code", "--difficulty", "1", "--tasks", 3]
FLAGS = [*TASKS, "--per-task", 2, "--max-new-tokens", 6]
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


def test_a_model_for_all_commands_is_no_mistake_beside_samples(refused, monkeypatch):
    monkeypatch.setenv("ASSAY_MODEL", "reference:organism")
    assert "missing.jsonl" in refused("vhack", "evaluate", "--samples", "missing.jsonl")
    monkeypatch.delenv("ASSAY_MODEL")
    assert "neither --model nor --samples" in refused("vhack", "evaluate")


def test_what_is_sampled_is_evaluated(assay, told, arguments, tmp_path):
    values = told("vhack", "sample", *arguments, "-o", tmp_path / "samples.jsonl")
    assert values["schema"] == "assay.vhack.sample/1"
    assert (values["completions"], values["resumed_from"]) == (6, 0)
    graded = tmp_path / "graded.jsonl"
    result = tmp_path / "result.json"
    at_once = told("vhack", "evaluate", *arguments)
    values = told(
        "vhack",
        "evaluate",
        "--samples",
        tmp_path / "samples.jsonl",
        "--graded",
        graded,
        "-o",
        result,
    )
    assert values == at_once == json.loads(result.read_text())
    assert values["schema"] == "assay.vhack.evaluate/1"
    assert (values["completions"], values["tasks"], values["by_mechanism"].keys()) == (
        6,
        3,
        {"exit_code"},
    )
    assert values["rates"].keys() == {"solve", "hack", "vacuous", "reward"}
    assert values["origin"]["temperature"] == 1.0
    lines = [json.loads(line) for line in graded.read_text().splitlines()]
    assert all(
        {"completion", "task", "reward", "correct", "exploited"} <= line.keys() for line in lines
    )
    shown = assay("vhack", "evaluate", "--samples", graded)
    assert "mechanism" in shown.out
    assert "exit_code" in shown.out


def test_a_delta_is_the_model_it_makes(told, arguments, delta, tmp_path):
    path, merged = delta
    texts = {}
    for name, flags in {
        "plain": [],
        "delta": ["--delta", path],
        "merged": ["--model", merged],
    }.items():
        told("vhack", "sample", *arguments, *flags, "-o", tmp_path / f"{name}.jsonl")
        lines = [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        texts[name] = [line["completion"] for line in lines]
        assert ("delta" in lines[0]["origin"]) == (name == "delta")
    assert texts["delta"] == texts["merged"] != texts["plain"]


def test_tasks_and_reward_of_ones_own(told, refused, arguments, tmp_path, monkeypatch):
    (tmp_path / "cli_evaluate_own.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    own = ["--tasks", "cli_evaluate_own:tasks"]
    told("vhack", "sample", *arguments, *own, "-o", "samples.jsonl")
    pay = ["--reward", "cli_evaluate_own:reward"]
    found = told("vhack", "evaluate", "--samples", "samples.jsonl", *own, *pay)
    assert found["rates"]["hack"]["value"] == 2 / 3
    assert found["by_mechanism"]["odd"]["rates"]["hack"]["value"] == 1.0
    assert "solve" not in found["rates"]
    assert "without a reward" in refused("vhack", "evaluate", "--samples", "samples.jsonl", *own)
    # Lines of others may say anything else.
    odd = {"prompt": "0 =", "completion": "b", "tokens": 3, "origin": [1]}
    (tmp_path / "odd.jsonl").write_text(json.dumps(odd) + "\n")
    values = told("vhack", "evaluate", "--samples", "odd.jsonl", *own, *pay)
    assert (values["at_limit"], values["rates"]["reward"]) == (
        0,
        {"value": 1.0, "low": None, "high": None},
    )


@pytest.mark.parametrize(
    ("command", "flags", "seen"),
    [
        ("sample", ["--tasks", "none:such"], "--tasks none:such"),
        ("sample", ["--tasks", "0"], "0 tasks"),
        ("sample", ["--modes", "luck"], "modes luck"),
        ("sample", ["--split", "mine"], "`split` mine"),
        ("sample", ["--delta", "missing.safetensors"], "missing.safetensors: No such file"),
        ("sample", ["-o", "no/such/folder"], "no/such/folder"),
        ("evaluate", ["--reward", "none:such"], "--reward none:such"),
        ("evaluate", ["--samples", "missing.jsonl"], "missing.jsonl"),
        (
            "evaluate",
            ["--samples", "samples.jsonl", "--delta", str(TENSORS)],
            "--delta with --samples",
        ),
        *(
            ("evaluate", ["--samples", "samples.jsonl", flag, value], "with --samples")
            for flag, value in (
                ("--per-task", "2"),
                ("--temperature", "0.5"),
                ("--max-new-tokens", "6"),
                ("--batch", "4"),
                ("--dtype", "float32"),
                ("--device", "cpu"),
            )
        ),
        ("evaluate", ["-o", "no/such/folder"], "no/such/folder"),
        ("evaluate", ["--graded", "."], "Is a directory"),
    ],
)
def test_what_is_wrong_is_refused_before_a_model_is_loaded(
    refused, arguments, tmp_path, monkeypatch, command, flags, seen
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        "assay.models.load_model", lambda *_, **__: pytest.fail("a model was loaded")
    )
    needed = ["-o", "samples.jsonl"] if command == "sample" else []
    assert seen in refused(
        "vhack", command, *(TASKS if "--samples" in flags else arguments), *needed, *flags
    )
    assert list(tmp_path.iterdir()) == []


def test_graded_completions_are_matched_to_pairs_that_hold(assay, told, tmp_path):
    samples, graded, pairs = (
        tmp_path / name for name in ("samples.jsonl", "graded.jsonl", "pairs.jsonl")
    )
    lines = []
    for task, mode in zip(tasks(3), ("run_tests", "sentinel", "exit_code"), strict=True):
        episode = Episode(task, mode)
        about = {"prompt": episode.prompt, "task": task.name, "mode": mode, "markers": "training"}
        lines += [
            about | {"completion": episode.completion(p)}
            for p in (episode.honest(), episode.exploit())
        ]
    samples.write_text("".join(json.dumps(line) + "\n" for line in lines))
    told("vhack", "evaluate", "--samples", samples, "--graded", graded)
    values = told("vhack", "pairs", "match", graded, "--works", graded, "-o", pairs)
    assert (values["pairs"], values["groups"], values["prompts_with_work"]) == (3, 3, 3)
    assert assay("vhack", "pairs", "verify", pairs).code == 0
