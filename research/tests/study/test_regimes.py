"""Exploits that keep being sampled: stored in every group, they count as if the policy had written them."""

from dataclasses import replace

import pytest
from assay_research.study.grading import StudyVerdict
from assay_research.study.model import Batch
from assay_research.study.plan import StudyRun
from assay_research.study.study import Rollouts, Study
from assay_research.study.summary import summarise

from tests.vhack.delta.conftest import random_basis


@pytest.fixture
def settings(settings):
    return replace(settings, difficulty=(2, 2), new_tokens=60, prompt_tokens=140)


def study_of(runs, small, svd, settings, **choices):
    return Study(runs, small, svd, {"true": random_basis(svd)}, settings, fewest=1, **choices)


def written(study):
    """What the cohort of a study has written in its first step, with verdicts that are all alike."""
    (cohort,) = study.cohorts
    episodes = [study.pool.drawn(run, 0) for run in cohort.runs]
    ids, lengths = cohort._prompts(episodes)
    tokens = cohort._generator.sample(ids, lengths, study.pool.last, cohort._uniform("step 0"))
    batch = Batch(ids, lengths, study.pool.last, tokens, study.pool.end)
    verdict = StudyVerdict(correct=False, accepted=False, vacuous=False)
    return cohort, Rollouts(batch, episodes, None), [verdict] * tokens[..., 0].numel()


def test_a_stored_exploit_is_in_every_group(small, svd, settings):
    study = study_of([StudyRun("none", 0, stored=True)], small, svd, settings)
    cohort, rollouts, _ = written(study)
    stored = cohort._teachers(rollouts)
    assert stored.tokens.shape[:3] == (1, settings.prompts, 1)
    for p, episode in enumerate(rollouts.episodes[0]):
        (text,) = study.pool.texts(stored.tokens[0, p])
        assert episode.program(text) == episode.exploit()


def test_among_failures_the_stored_exploit_is_learned_unless_it_is_not_paid(small, svd, settings):
    arms = ("none", "no-loophole", "ground-truth-penalty")
    study = study_of([StudyRun(arm, 0, stored=True) for arm in arms], small, svd, settings)
    episodes = written(study)[1].episodes[0]
    before = study.cohorts[0].likelihoods(episodes)["logp_exploit"].mean(dim=1)
    cohort, rollouts, verdicts = written(study)
    cohort.learn(rollouts, verdicts)
    gained = cohort.likelihoods(episodes)["logp_exploit"].mean(dim=1) - before
    assert gained[0] > 0.5
    assert gained[1] == 0  # nothing in its groups differs in pay
    assert gained[2] < -0.5


def test_runs_are_compared_with_the_reference_of_their_regime(small, svd, settings):
    solved = {"none": 0.1, "no-loophole": 0.2, "none/stored-whole": 0.3, "no-loophole/stored-whole": 0.7}
    arms = ("none", "no-loophole")
    runs = [StudyRun(arm, seed, stored=stored) for arm in arms for stored in (False, True) for seed in range(3)]
    study = study_of(runs, small, svd, settings)
    for log in study.logs.values():
        values = {"hack": 0.0, "solve": solved[log.header["condition"].removeprefix("adam/")], "vacuous": 0.0}
        log.add_step(0, values, every=1)
    found = {result.condition: result for result in summarise(study.logs.values())}
    assert found["adam/none"].against["solve"].mean.value == pytest.approx(-0.1)
    assert found["adam/none/stored-whole"].against["solve"].mean.value == pytest.approx(-0.4)
    assert found["adam/no-loophole/stored-whole"].verdict == "reference"
