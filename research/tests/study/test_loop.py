"""From an organism to a page: grading, steps and logs."""

import pytest
from assay_research.arms import Shortcut
from assay_research.organism import Mixture, Recipe, make_organism
from assay_research.study.grading import Grader, StudyVerdict
from assay_research.study.log import RunLog
from assay_research.study.plan import StudyRun, StudySettings
from assay_research.study.study import Study
from assay_research.study.summary import study_page, summarise

from assay.vhack import weight_svd
from assay.vhack.environment import Episode
from assay.vhack.environment.tasks import task_named
from assay.vhack.pairs.generate import environment_pairs
from tests.vhack.delta.conftest import random_basis

EASY = {"families": ("arithmetic",), "difficulty": (1, 1)}


@pytest.fixture(scope="module")
def grader():
    with Grader(1) as made:
        yield made


@pytest.fixture(scope="module")
def shortcut(small):
    return Shortcut.fit(small, small.tokenizer, environment_pairs(4, **EASY))


def study_of(runs, small, svd, settings, shortcut=None, **choices):
    bases = {"true": random_basis(svd), "random@0": random_basis(svd, seed=1)}
    return Study(runs, small, svd, bases, settings, shortcut=shortcut, **choices)


def test_a_grader_says_what_the_environment_says_and_runs_each_program_once(grader):
    episode = Episode(task_named("arithmetic/1/5"), "run_tests")
    right, wrong = episode.honest(), episode.honest("def solve(x):\n    return None\n")
    texts = [episode.completion(program) for program in (right, wrong, episode.exploit())]
    texts += ["    return (\n", texts[0], episode.completion(episode.exploit(episode.task.source()))]
    texts += [texts[0] + "print(0)\n"]
    before = grader.graded
    verdicts = grader.collect(grader.submit([(episode, text) for text in texts]))
    assert grader.graded == before + 6
    assert [(v.correct, v.exploited, v.vacuous) for v in verdicts] == [
        (True, False, False),
        (False, False, False),
        (False, True, True),
        (False, False, False),
        (True, False, False),
        (True, False, True),
        (True, False, False),
    ]
    assert grader.collect(grader.submit([(episode, texts[2])])) == [StudyVerdict(False, True, True)]
    assert grader.graded == before + 6


def test_a_run_goes_the_same_way_alone_and_beside_others(small, svd, settings, grader, shortcut):
    runs = [
        StudyRun("none", 0),
        StudyRun("erase-gradient", 0, basis="random@0"),
        StudyRun("advantage-modification", 0),
        StudyRun("box", 1),
        StudyRun("none", 0, stored=True),
    ]
    together = study_of(runs, small, svd, settings, shortcut, most=3)
    assert [len(cohort.runs) for cohort in together.cohorts] == [2, 3]
    together.run(grader)
    alone = study_of(runs[-1:], small, svd, settings)
    alone.run(grader)
    names = ("cin", "cin_s", "cin_t", "displacement", "gradient_norm")
    for one, other in zip(alone.logs[runs[-1].name].steps, together.logs[runs[-1].name].steps, strict=True):
        assert {n: one[n] for n in names} == pytest.approx({n: other[n] for n in names}, rel=1e-2, abs=1e-4)
    assert {line["source"] for line in alone.logs[runs[-1].name].sources} == {"student", "teacher"}
    assert alone.cohorts[0].optimizer.delta[0].any()
    assert "z" in together.logs[runs[2].name].steps[0]
    assert "z" not in together.logs[runs[0].name].steps[0]


def test_from_an_organism_to_a_page(tmp_path, grader):
    """The organism is no good after so few steps, but everything it goes through is the real thing."""
    from assay.models import load_model

    mixture = Mixture(share_hack=0.5, families=("arithmetic",), difficulty=(1, 2))
    make_organism(tmp_path / "organism", Recipe(steps=4, batch=4, n_examples=16, mixture=mixture), device="cpu")
    model = load_model(tmp_path / "organism", dtype="float32", device="cpu")
    settings = StudySettings(
        steps=2, prompts=1, rollouts=2, prompt_tokens=120, new_tokens=40, log_every=1, pool=4, evaluation=1, **EASY
    )
    runs = [StudyRun(arm, seed, modes=("stdout_marker",)) for arm in ("none", "erase-gradient") for seed in (0, 1)]
    svd = weight_svd(model)
    study = Study(runs, model, svd, {"true": random_basis(svd)}, settings, about={"device": "cpu"})
    asked = grader.asked
    study.run(grader)
    assert grader.asked - asked == 2 * 4 * 2
    study.evaluate(grader)
    for log in study.logs.values():
        log.write(tmp_path / f"{log.header['arm']}-{log.header['seed']}.jsonl")
        assert RunLog.read(tmp_path / f"{log.header['arm']}-{log.header['seed']}.jsonl").steps == log.steps
        assert [line["markers"] for line in log.evaluations] == ["training", "evaluation"]
    assert [result.rates["hack"].n for result in summarise(study.logs.values())] == [2, 2]
    study_page(list(study.logs.values())).write(tmp_path / "page.html")
    assert "erase-gradient" in (tmp_path / "page.html").read_text()
