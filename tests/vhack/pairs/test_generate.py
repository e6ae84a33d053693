import difflib
from collections import Counter

import pytest

from assay.errors import DataError, UsageError
from assay.vhack.pairs import generate_pairs
from assay.vhack.pairs.generate import MECHANISMS, PAIR_FAMILIES, PairTask, pair_task_named
from assay.vhack.pairs.pairs import check_pairs
from tests.wordings import refuses


def tagged(pair, name):
    return next(tag.removeprefix(name + ":") for tag in pair.tags if tag.startswith(name + ":"))


def test_a_seed_gives_the_same_pairs_and_a_longer_list_begins_with_a_shorter():
    assert generate_pairs(40, seed=7)[:15] == generate_pairs(15, seed=7)
    assert generate_pairs(15, seed=7) != generate_pairs(15, seed=8)


def test_pairs_are_all_different_and_well_formed():
    check_pairs(generate_pairs(600, seed=1))


def test_families_and_mechanisms_take_turns():
    pairs = generate_pairs(240)
    assert set(Counter(pair.group for pair in pairs).values()) == {8}
    assert set(Counter(tagged(pair, "mechanism") for pair in pairs).values()) == {30}
    assert len({(pair.group, tagged(pair, "mechanism")) for pair in pairs}) == 240


@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_the_two_sides_share_the_solution_and_differ_in_the_mechanism(mechanism):
    for pair in generate_pairs(12, mechanisms=[mechanism]):
        solution = pair_task_named(tagged(pair, "task")).solution
        shared = (
            solution.replace("def solve(", "def compute(")
            if mechanism == "eq_override"
            else solution
        )
        assert shared in pair.hack
        assert shared in pair.clean
        changed = [
            d for d in difflib.ndiff(pair.hack.split("\n"), pair.clean.split("\n")) if d[0] in "+-"
        ]
        assert 0 < len(changed) <= 8


def test_the_prompt_states_task_examples_and_grading():
    for pair in generate_pairs(60):
        task = pair_task_named(tagged(pair, "task"))
        assert task.statement in pair.prompt
        assert f"returns {task.visible[0][1]!r}" in pair.prompt
        assert "graded" in pair.prompt or "is run" in pair.prompt
        assert pair.prompt.endswith("\n")


def test_only_what_is_asked_for_is_generated():
    pairs = generate_pairs(10, mechanisms=["prints"], families=["caesar", "clamp"])
    assert {tagged(pair, "mechanism") for pair in pairs} == {"prints"}
    assert {pair.group for pair in pairs} == {"caesar", "clamp"}


@pytest.mark.parametrize(
    "options",
    [
        {"n": 0},
        {"n": 3, "mechanisms": ["magic"]},
        {"n": 3, "families": []},
        {"n": 3, "families": ["nope"]},
        {"n": 5000, "mechanisms": ["stdout_marker"], "families": ["every_nth"]},
    ],
)
def test_what_does_not_exist_is_refused(options):
    with pytest.raises(UsageError):
        generate_pairs(**options)


@pytest.mark.parametrize("family", PAIR_FAMILIES.values(), ids=PAIR_FAMILIES)
def test_every_task_of_a_family_has_cases_and_is_found_by_its_name(family):
    for a in {family.a[0], sum(family.a) // 2, family.a[1]}:
        for b in {family.b[0], family.b[1]}:
            task = PairTask(family, a, b)
            assert pair_task_named(task.name) == task
            assert len({repr(arguments) for arguments, _ in task.cases}) == 10
            assert task.visible[0][1] != task.visible[1][1]


@pytest.mark.parametrize(
    "name",
    [
        "nope/a=1,b=2",
        "caesar",
        "caesar/a=1",
        "caesar/a=x,b=0",
        "caesar/a=1,b=2,c=3",
        "shift_mod/a=1,b=0",
    ],
)
def test_a_task_that_is_none_is_refused(name):
    with refuses(DataError, "a task that is none is refused"):
        pair_task_named(name)
