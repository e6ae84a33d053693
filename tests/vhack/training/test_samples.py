"""Completions in a file: resumed bit by bit, read as every pool is, and refused where they belong
to something else.
"""

import json

import pytest
import torch

from assay.errors import DataError, ModelError, UsageError
from assay.vhack.directions.checks import read_pool
from assay.vhack.training.evaluation import sample_tasks
from assay.vhack.training.pool import RolloutPool
from assay.vhack.training.tasks import read_samples
from tests.wordings import refuses

HOW = {"temperature": 1.0, "max_new_tokens": 5, "seed": 0, "batch": 2}


class Stopped(Exception):
    pass


def stop_after(count):
    def progress(done, total):
        if done >= count:
            raise Stopped

    return progress


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_an_interrupted_call_goes_on_as_if_it_never_was(model, tasks, tmp_path):
    wanted = [task for task in tasks for _ in range(2)]
    assert sample_tasks(tmp_path / "straight", model, wanted, **HOW) == 0
    with pytest.raises(Stopped):
        sample_tasks(tmp_path / "stopped", model, wanted, progress=stop_after(4), **HOW)
    partial = tmp_path / "stopped.partial"
    partial.write_text(
        partial.read_text() + partial.read_text().splitlines()[0][:-7]
    )  # a torn line
    assert not (tmp_path / "stopped").exists()
    assert sample_tasks(tmp_path / "stopped", model, wanted, **HOW) == 4
    assert (tmp_path / "stopped").read_bytes() == (tmp_path / "straight").read_bytes()
    assert not partial.exists()
    found = lines(tmp_path / "straight")
    assert [line["prompt"] for line in found] == [task.prompt for task in wanted]
    assert len({tuple(line["tokens"]) for line in found}) > 4
    assert found[0]["origin"] == {
        "model": model.reference,
        "weights": model.digest,
        "dtype": "float32",
        **HOW,
    }


def test_every_end_token_of_the_generation_configuration_ends_a_completion(model, tasks, tmp_path):
    ends = [257, *range(0, 256, 2)]
    model.module.generation_config.eos_token_id = ends
    sample_tasks(tmp_path / "file", model, tasks, **HOW | {"max_new_tokens": 40})
    for tokens in (line["tokens"] for line in lines(tmp_path / "file")):
        assert tokens[-1] in ends
        assert not set(tokens[:-1]) & set(ends)


def test_the_rest_of_another_call_is_refused_or_dropped_when_asked(model, tasks, tmp_path):
    with pytest.raises(Stopped):
        sample_tasks(tmp_path / "file", model, tasks, progress=stop_after(2), **HOW)
    for changes, these in (({"temperature": 0.5}, tasks), ({}, tasks[::-1]), ({}, tasks[:1])):
        with refuses(UsageError, "the rest of another call is refused or dropped when asked"):
            sample_tasks(tmp_path / "file", model, these, **HOW | changes)
    grouped = [
        [{"prompt": task.prompt, "group": group} for task in tasks] for group in ("one", "other")
    ]
    with pytest.raises(Stopped):
        sample_tasks(tmp_path / "own", model, grouped[0], progress=stop_after(2), **HOW)
    for these in (grouped[1], [task.prompt for task in tasks]):
        with refuses(UsageError, "the rest of another call is refused or dropped when asked"):
            sample_tasks(tmp_path / "own", model, these, **HOW)
    assert sample_tasks(tmp_path / "file", model, tasks, overwrite=True, **HOW | {"seed": 1}) == 0
    assert {line["origin"]["seed"] for line in lines(tmp_path / "file")} == {1}
    with refuses(UsageError, "the rest of another call is refused or dropped when asked, 2"):
        sample_tasks(tmp_path / "file", model, tasks, **HOW)


def test_what_does_not_fit_the_context_leaves_no_file(model, tasks, tmp_path):
    with refuses(UsageError, "what does not fit the context leaves no file"):
        sample_tasks(tmp_path / "file", model, tasks, **HOW | {"max_new_tokens": 760})
    assert list(tmp_path.iterdir()) == []


def test_a_file_is_a_teacher_pool_and_a_pool_of_a_check(model, tasks, tmp_path):
    sample_tasks(tmp_path / "file", model, tasks, **HOW)
    assert RolloutPool.load(tmp_path / "file", model.tokenizer, max_new_tokens=5).prompts == {
        t.prompt for t in tasks
    }
    assert [one.group for one in read_pool(tmp_path / "file")] == [task.task.name for task in tasks]
    records, found = read_samples(tmp_path / "file", [])
    assert found == tasks
    assert len(records) == len(tasks)


def test_completions_of_others_find_their_tasks_by_the_prompt(tmp_path):
    own = [{"prompt": "1 + 1 =", "answer": "2", "group": "sums"}, "2 + 2 ="]
    (tmp_path / "file").write_text(
        '{"prompt":"2 + 2 =","completion":"4"}\n{"prompt":"1 + 1 =","completion":"3"}\n'
    )
    _, found = read_samples(tmp_path / "file", own)
    assert found == own[::-1]
    with refuses(DataError, "completions of others find their tasks by the prompt"):
        read_samples(tmp_path / "file", [*own, {"prompt": "1 + 1 =", "answer": "3"}])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"completion": None}, "line 1: not a completion"),
        ({"prompt": "another"}, "a prompt that is not the one of"),
        ({"task": "numbers/99/1"}, "task 'numbers/99/1'"),
        ({"mode": "luck"}, "mode .?luck"),
        ({"markers": "mine"}, "split .?mine"),
        ({"task": ...}, "a prompt of none of the 0 tasks"),
    ],
)
def test_lines_that_cannot_be_graded_are_named(tasks, tmp_path, changes, words):
    line = {"prompt": tasks[0].prompt, "completion": "    return 1\n", "task": tasks[0].task.name}
    line |= {"mode": tasks[0].mode, "markers": "training", **changes}
    (tmp_path / "file").write_text(
        json.dumps({name: value for name, value in line.items() if value is not ...}) + "\n"
    )
    with pytest.raises(DataError, match=words):
        read_samples(tmp_path / "file", [])


def test_a_model_that_computes_nothing_finite_is_refused_in_words(model, tasks, tmp_path):
    with torch.no_grad():
        next(model.module.parameters()).fill_(torch.nan)
    with refuses(ModelError, "a model that computes nothing finite is refused in words"):
        sample_tasks(tmp_path / "file", model, tasks, **HOW)
    assert not (tmp_path / "file").exists()
