"""Labels with the mistakes of a detector, and the penalty that makes up for what one misses."""

from types import SimpleNamespace

import pytest
import torch

from assay.errors import UsageError
from assay.vhack.detectors.threshold import Threshold
from assay.vhack.training.labels import Labels, break_even
from assay.vhack.training.outcomes import FLAGS, Outcomes
from assay.vhack.training.settings import TrainSettings
from tests.wordings import refuses

ROLLOUTS = 20_000


@pytest.fixture
def reward():
    """A reward that has graded rollouts, of which the first half exploits."""
    flags = torch.zeros(ROLLOUTS, len(FLAGS), dtype=torch.bool)
    flags[: ROLLOUTS // 2, FLAGS.index("exploited")] = True
    mechanisms = ["sentinel" if row % 2 else "exit_code" for row in range(ROLLOUTS)]
    last = Outcomes(flags, torch.zeros(ROLLOUTS))
    return SimpleNamespace(last=last, mechanisms=mechanisms, known_flags=FLAGS)


def shares(labels, reward):
    """Shares flagged, and shares at least doubtful, of exploits and of the others."""
    threshold = labels.threshold
    scores = torch.tensor(labels.scores(reward, "a key"))
    halves = [scores[: ROLLOUTS // 2], scores[ROLLOUTS // 2 :]]
    return [
        [float((half > limit).double().mean()) for half in halves]
        for limit in (threshold.value, threshold.usual)
    ]


@pytest.mark.parametrize("recall", [0.3, 0.6, 0.9])
def test_they_catch_and_lose_what_they_say(reward, recall):
    flagged, doubted = shares(Labels(recall=recall, lost=0.05), reward)
    assert flagged == pytest.approx([recall, 0.05], abs=0.02)
    assert doubted[1] == pytest.approx(0.5, abs=0.02)
    assert doubted[0] > recall + 0.05


def test_without_mistakes_they_are_the_labels_and_nothing_is_doubtful(reward):
    labels = Labels()
    flagged, doubted = shares(labels, reward)
    assert flagged == doubted == [1.0, 0.0]
    some = Labels(("sentinel",), recall=0.6)
    assert shares(some, reward)[0] == pytest.approx([0.325, 0.05], abs=0.02)
    assert some.scores(reward, "a key") == some.scores(reward, "a key")
    assert some.scores(reward, "a key") != some.scores(reward, "another")


def test_a_reward_that_does_not_mark_exploits_is_refused(reward):
    reward.known_flags = ["correct"]
    with refuses(UsageError, "a reward that does not mark exploits is refused"):
        Labels().scores(reward, "a key")


@pytest.mark.parametrize(("caught", "lost"), [(1.0, 0.0), (0.9, 0.05), (0.6, 0.05), (0.3, 0.05)])
def test_with_the_break_even_an_exploit_earns_what_a_failure_earns(caught, lost):
    penalty = break_even(Threshold(0.0, lost, lost, lost, caught))
    assert 1 - penalty * caught == pytest.approx(-penalty * lost)


def test_a_detector_that_tells_nothing_apart_has_a_bounded_penalty():
    assert break_even(Threshold(0.0, 0.05, 0.0, 0.1, 0.05)) == 5
    assert break_even(Threshold(0.0, 0.05, 0.0, 0.1, 0.15)) == 5


@pytest.mark.parametrize("recall", ["0.05", "1.2", "x", "nan", "-1"])
def test_a_recall_that_is_none_is_refused(recall):
    with pytest.raises(UsageError):
        TrainSettings(model="reference:organism", detector=f"labels@{recall}")
    with pytest.raises(UsageError):
        TrainSettings(model="reference:organism", detector="cin-lda@0.6")


def test_settings_name_mechanisms_and_recall():
    settings = TrainSettings(model="reference:organism", detector="labels=sentinel@0.6:random")
    assert settings.flags_by == ("labels", True, ("sentinel",), 0.6)
    with pytest.raises(UsageError):
        Labels(recall=0.05)
