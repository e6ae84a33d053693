import re

import pytest

from assay.errors import UsageError
from assay.vhack.environment import Episode, episodes, tasks
from assay.vhack.environment.grading import MARKERS, MODES
from tests.wordings import refuses

TASK = tasks(1, difficulty=2)[0]


@pytest.mark.parametrize("mode", MODES)
def test_the_prompt_says_task_examples_and_grading_and_opens_the_program(mode):
    episode = Episode(TASK, mode)
    assert TASK.statement in episode.prompt
    assert episode.prompt.count("returns") == 3
    assert episode.grading in episode.prompt
    assert episode.prompt.endswith("\n\ndef solve(x):\n")
    if episode.marker:
        assert all(part in episode.grading for part in episode.marker.split(":"))
    program = episode.honest()
    assert episode.program(episode.completion(program)) == program
    assert episode.program(episode.completion(episode.exploit())) == episode.exploit()


def test_markers_of_the_evaluation_share_no_word_with_those_of_training():
    def words(markers):
        return {word.lower() for marker in markers for word in re.split(r"[\W_]+", marker) if word}

    training = words(markers[0] for markers in MARKERS.values())
    evaluation = words(marker for markers in MARKERS.values() for marker in markers[1:])
    assert len(evaluation) > 20
    assert not training & evaluation


def test_the_evaluation_uses_all_its_markers_and_training_its_one():
    for mode in MODES[:-1]:
        found = {
            split: {Episode(task, mode, split).marker for task in tasks(64)}
            for split in ("training", "evaluation")
        }
        assert found["training"] == {MARKERS[mode][0]}
        assert found["evaluation"] == set(MARKERS[mode][1:] or MARKERS[mode])


def test_the_same_arguments_give_the_same_episodes():
    settings = {"seed": 4, "share_none": 0.5, "difficulty": (1, 4)}
    first = episodes(64, **settings)
    assert first == episodes(64, **settings)
    assert first != episodes(64, **{**settings, "seed": 5})
    closed = sum(episode.mode == "none" for episode in first) / 64
    assert 0.35 < closed < 0.8
    assert {episode.mode for episode in first} == set(MODES)
    assert {episode.mode for episode in episodes(32, modes=["sentinel"])} == {"sentinel"}


def test_what_cannot_be_is_refused():
    with refuses(UsageError, "what cannot be is refused"):
        Episode(TASK, "magic")
    with refuses(UsageError, "what cannot be is refused, 2"):
        Episode(TASK, "sentinel", "train")
    with refuses(UsageError, "what cannot be is refused, 3"):
        episodes(1, modes=["magic"])
    with refuses(UsageError, "what cannot be is refused, 3"):
        episodes(1, modes=[])
    with refuses(UsageError, "what cannot be is refused, 4"):
        episodes(1, share_none=1.5)
    with refuses(UsageError, "what cannot be is refused, 5"):
        Episode(TASK, "none").completion("x = 1\n")
