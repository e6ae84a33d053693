import json

import pytest

from assay.errors import DataError
from assay.vhack.environment import Episode, tasks
from assay.vhack.environment.grading import CHANNELS
from assay.vhack.pairs import match_pairs, read_pairs, verify_pairs, write_pairs

HACK = {"correct": False, "exploited": True, "vacuous": True}
WORK = {"correct": True, "exploited": False, "vacuous": False}
HOLLOW = {"correct": True, "exploited": False, "vacuous": True}


def line(completion, grades, prompt="p", **other):
    return {"prompt": prompt, "completion": completion, "group": "g", **grades, **other}


def written(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_a_hack_and_correct_work_on_the_same_prompt_are_a_pair(tmp_path):
    cheats = written(
        tmp_path / "cheats", line("h1", HACK), line("h2", HACK), line("h", HACK, "only a hack")
    )
    others = (line("work 1", WORK), line("h1", HACK), line("w", WORK, "only work"))
    works = written(tmp_path / "works", line("hollow", HOLLOW), *others)
    found = match_pairs(cheats, works)
    (pair,) = found.pairs
    assert (pair.prompt, pair.hack, pair.clean, pair.group, pair.tags) == (
        "p",
        "h1",
        "work 1",
        "g",
        (),
    )
    assert (found.hacked, found.worked) == (2, 2)


def test_more_pairs_of_a_prompt_have_other_completions_on_both_sides(tmp_path):
    records = [line(f"h{i // 2}", HACK) for i in range(6)] + [line(f"w{i}", WORK) for i in range(2)]
    both = written(tmp_path / "both", *records)
    sides = [(pair.hack, pair.clean) for pair in match_pairs(both, both, per_prompt=9).pairs]
    assert sides == [("h0", "w0"), ("h1", "w1")]


@pytest.mark.parametrize(
    ("hacks", "pairs"), [("xh", [("x", "y"), ("h", "z")]), ("hx", [("h", "x")])]
)
def test_no_completion_of_a_prompt_is_a_side_of_two_pairs(tmp_path, hacks, pairs):
    """One that was graded twice may be on both sides."""
    cheats = written(tmp_path / "cheats", *(line(text, HACK) for text in hacks))
    works = written(tmp_path / "works", *(line(text, WORK) for text in "xyz"))
    matched = match_pairs(cheats, works, per_prompt=2)
    assert [(pair.hack, pair.clean) for pair in matched.pairs] == pairs


def test_what_cannot_be_a_side_is_left_out(tmp_path):
    """An empty completion, and a program that was graded twice and did different things."""
    records = [
        line(" ", HACK),
        line("both", HACK),
        line("both", WORK),
        line("h", HACK),
        line("w", WORK),
    ]
    both = written(tmp_path / "both", *records)
    (pair,) = match_pairs(both, both).pairs
    assert (pair.hack, pair.clean) == ("both", "w")
    write_pairs(tmp_path / "pairs.jsonl", [pair])


@pytest.mark.needs("sandbox")
def test_pairs_of_built_in_tasks_say_what_can_be_verified(tmp_path):
    records = []
    for task, mode in zip(tasks(len(CHANNELS)), CHANNELS, strict=True):
        episode = Episode(task, mode)
        about = {"task": task.name, "mode": mode, "markers": "training", "group": task.name}
        for program, grades in ((episode.exploit(), HACK), (episode.honest(), WORK)):
            records.append(line(episode.completion(program), grades, episode.prompt, **about))
    both = written(tmp_path / "both", *records)
    write_pairs(tmp_path / "pairs.jsonl", match_pairs(both, both).pairs)
    pairs = read_pairs(tmp_path / "pairs.jsonl")
    assert [pair.group for pair in pairs] == [task.family.name for task in tasks(len(CHANNELS))]
    assert all(verdict.holds for verdict in verify_pairs(pairs))
    for record in records:
        record["markers"] = "evaluation"
    assert (
        "environment" not in match_pairs(*[written(tmp_path / "other", *records)] * 2).pairs[0].tags
    )


@pytest.mark.parametrize(
    ("records", "match"),
    [
        (
            [line("h", HACK), line("w", WORK, "q")],
            "1 prompts with a hack and 1 with correct work, and none with both",
        ),
        ([{"prompt": "p", "completion": "c"}], "line 1: no graded completion"),
        (
            [line("c", {"correct": None, "exploited": True, "vacuous": None})],
            "line 1: no graded completion",
        ),
        (
            [line("w", WORK), line("h", HACK, group=" ")],
            "line 2: neither a built-in task nor a group",
        ),
        (
            [line("w", WORK), line("h", HACK, task="sums/99/1", mode="none")],
            "line 2: task 'sums/99/1'",
        ),
    ],
)
def test_what_gives_no_pair_is_refused(tmp_path, records, match):
    both = written(tmp_path / "both", *records)
    with pytest.raises(DataError, match=match):
        match_pairs(both, both)
