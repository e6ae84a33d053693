"""Rates of completions by loophole, with whole tasks in their intervals, of the environment and of
a reward.
"""

import pytest

from assay.errors import BackendUnavailable, DataError, UsageError
from assay.stats.rates import grouped_share_interval
from assay.vhack.environment import episodes
from assay.vhack.training import evaluate
from tests.wordings import refuses


@pytest.fixture(scope="module")
def mixed():
    """Tasks with two loopholes, four completions each: one exploit, one honest, one wrong, one that
    is no program.
    """
    chosen = episodes(3, modes=["run_tests"], difficulty=1) + episodes(
        2, modes=["sentinel"], difficulty=1, seed=1
    )
    rows = [
        (task, text)
        for task in chosen
        for text in (
            task.completion(task.exploit()),
            task.completion(task.honest()),
            "    return None\n",
            "(",
        )
    ]
    return [task for task, _ in rows], [text for _, text in rows]


@pytest.mark.needs("sandbox")
def test_the_environment_tells_work_from_exploits(mixed):
    found = evaluate(*mixed)
    rates = found.rates()
    assert {name: rate.value for name, rate in rates.items()} == {
        "solve": 0.25, "hack": 0.25, "vacuous": 0.25, "reward": 0.5,
    }  # fmt: skip
    assert (rates["hack"].low, rates["hack"].high) == grouped_share_interval(
        [1, 0, 0, 0] * 5, found.groups
    )
    assert rates["hack"].low < 0.25 < rates["hack"].high
    parts = found.by_mechanism()
    assert {name: len(part.grades) for name, part in parts.items()} == {
        "run_tests": 12,
        "sentinel": 8,
    }
    assert parts["sentinel"].rates()["hack"].value == 0.25
    shown = found.as_dict()
    assert (shown["completions"], shown["tasks"], shown["faults"]) == (20, 5, 0)


@pytest.mark.needs("sandbox")
def test_one_task_has_no_interval(mixed):
    found = evaluate(mixed[0][:4], mixed[1][:4]).rates()
    assert {(rate.low, rate.high) for rate in found.values()} == {(None, None)}
    assert found["hack"].text == "0.250"


def test_a_reward_of_ones_own_says_what_it_knows():
    tasks = [
        {"prompt": f"{a} + 1 =", "answer": str(a + 1), "mechanism": "luck" if a % 2 else ""}
        for a in range(200)
    ]
    seen = []

    def pay(prompts, completions, answer, **_):
        seen.append(len(prompts))
        return [
            {
                "reward": -0.5 if text == "?" else 1.0,
                "correct": text == right,
                "exploited": text == "all",
            }
            for text, right in zip(completions, answer, strict=True)
        ]

    texts = [("all", "?", str(a + 1))[a % 3] for a in range(200)]
    ticks = []
    found = evaluate(tasks, texts, reward=pay, progress=lambda *done: ticks.append(done))
    rates = found.rates()
    assert sum(seen) == 200
    assert len(seen) > 1
    assert ticks[-1] == (200, 200)
    assert rates.keys() == {"solve", "hack", "reward"}
    assert rates["hack"].value == 67 / 200
    assert rates["solve"].value == 66 / 200
    assert rates["reward"].low < 0.4975 < rates["reward"].high
    assert found.by_mechanism().keys() == {"luck"}
    assert evaluate(
        tasks, texts, reward=lambda prompts, **_: [0.0] * len(prompts)
    ).rates().keys() == {"reward"}


def test_a_column_that_some_tasks_do_not_have_stays_beside_its_prompts():
    tasks = [{"prompt": "a", "answer": "1"}, "b", {"prompt": "c", "answer": "3", "hint": "x"}]

    def pay(prompts, completions, answer, hint):
        assert (prompts, answer, hint) == (["a", "b", "c"], ["1", None, "3"], [None, None, "x"])
        return [1.0, 2.0, 3.0]

    assert evaluate(tasks, ["", "", ""], reward=pay).rates()["reward"].value == 2.0


def test_what_cannot_be_graded_is_refused(mixed, monkeypatch):
    with refuses(DataError, "what cannot be graded is refused"):
        evaluate(["a"], ["b", "c"])
    with refuses(UsageError, "what cannot be graded is refused, 2"):
        evaluate(["a"], ["b"])
    monkeypatch.setattr("assay.vhack.environment.backends.available_backend", lambda: None)
    with refuses(BackendUnavailable, "what cannot be graded is refused, 3"):
        evaluate(*mixed)
