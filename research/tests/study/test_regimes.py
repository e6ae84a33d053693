"""What the third experiment adds: exploits that keep being sampled, supervised starts, pairs that a model has found."""

from dataclasses import replace

import pytest
import torch
from assay_research.study.cohort import Rollouts
from assay_research.study.forward import StackedModel
from assay_research.study.generate import Generator
from assay_research.study.gradient import Batch, policy_gradient, token_logprobs
from assay_research.study.grading import StudyVerdict
from assay_research.study.loop import Study
from assay_research.study.plan import StudyRun
from assay_research.study.rival import supervised_start
from assay_research.study.sampled import sampled_pairs
from assay_research.study.summary import summarise

from assay.errors import DataError, UsageError
from assay.vhack import pair_gradients
from assay.vhack.delta.advantage import Shortcut
from assay.vhack.delta.controls import basis_of_kind
from assay.vhack.delta.frames import Frames
from assay.vhack.environment import Episode, grade
from assay.vhack.environment.tasks import task_named
from assay.vhack.pairs.reference import environment_pairs
from tests.vhack.delta.conftest import random_basis

EASY = {"families": ("arithmetic",), "difficulty": (2, 2)}


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
    tokens = cohort._generator.sample(ids, lengths, study.pool.last, cohort._uniform("step 0"), cohort._temperature_R)
    batch = Batch(ids, lengths, study.pool.last, tokens, study.pool.end)
    verdict = StudyVerdict(correct=False, accepted=False, vacuous=False)
    return cohort, Rollouts(batch, episodes, None), [verdict] * tokens[..., 0].numel()


@pytest.mark.parametrize("kind", ["whole", "partial"])
def test_a_stored_exploit_is_in_every_group_and_counts_as_the_policys_own(small, svd, settings, kind):
    study = study_of([StudyRun("none", 0, stored=kind), StudyRun("none", 0)], small, svd, settings)
    cohort, rollouts, _ = written(study)
    stored, behaviour = cohort._teachers(rollouts)
    assert stored.tokens.shape[:3] == (1, settings.prompts, 1)
    assert behaviour.isnan().all()
    for p, episode in enumerate(rollouts.episodes[0]):
        (text,) = study.pool.texts(stored.tokens[0, p])
        source = None if kind == "whole" else episode.task.source(leave_out=0)
        assert episode.program(text) == episode.exploit(source)
    plain = policy_gradient(small_stack(small, svd), stored, torch.ones(1, settings.prompts, 1), divisor=6)
    weighed = policy_gradient(
        small_stack(small, svd), stored, torch.ones(1, settings.prompts, 1), behaviour_RPGT=behaviour, divisor=6
    )
    for one, other in zip(plain, weighed, strict=True):
        assert torch.equal(one, other)


def small_stack(small, svd, runs=1):
    return StackedModel(small, runs, svd)


def test_both_kinds_of_stored_exploits_are_paid_for_wrong_work():
    for kind in ("arithmetic", "branches"):
        episode = Episode(task_named(f"{kind}/3/7"), "run_tests")
        for source in (None, episode.task.source(leave_out=0)):
            made = grade(episode, episode.exploit(source))
            assert (made.correct, made.vacuous) == (False, True)


def test_among_failures_the_stored_exploit_is_learned_unless_it_is_not_paid(small, svd, settings):
    arms = ("none", "no-loophole", "ground-truth-penalty")
    study = study_of([StudyRun(arm, 0, stored="whole") for arm in arms], small, svd, settings)
    episodes = written(study)[1].episodes[0]
    before = study.cohorts[0].likelihoods(episodes)["logp_exploit"].mean(dim=1)
    cohort, rollouts, verdicts = written(study)
    cohort.learn(rollouts, verdicts)
    gained = cohort.likelihoods(episodes)["logp_exploit"].mean(dim=1) - before
    assert gained[0] > 0.5
    assert gained[1] == 0  # nothing in its groups differs in pay
    assert gained[2] < -0.5


def test_advantage_modification_looks_at_stored_exploits_too(small, svd, settings):
    shortcut = Shortcut.fit(small, small.tokenizer, environment_pairs(4, **EASY))
    runs = [StudyRun("none", 0, stored="whole"), StudyRun("advantage-modification", 0, stored="whole")]
    study = study_of(runs, small, svd, settings, shortcut=replace(shortcut, middle=-1e3, spread=1.0))
    cohort, rollouts, _ = written(study)
    stored, _ = cohort._teachers(rollouts)
    pays = cohort._pays(stored)
    assert (pays[0] == 1).all()
    torch.testing.assert_close(pays[1], torch.full_like(pays[1], -1.0))  # z is large, and 1 − α is −1


def test_a_temperature_is_that_of_sampling_and_of_the_gradient(small, svd):
    model = small_stack(small, svd, 2)
    shape, generator = (1, 400, 5, 1), torch.Generator().manual_seed(1)
    ids = torch.randint(3, 4000, (1, 1, 5), generator=generator).expand(2, -1, -1)
    lengths, uniform = torch.full((2, 1), 5), torch.rand(1, 2, 1, 400, generator=generator)
    heat = torch.tensor([1.0, 1.7])
    drawn = Generator(model, shape, end=2).sample(ids, lengths, 9, uniform, heat)
    batch = Batch(ids, lengths, 9, drawn, 2)
    logits = model.complete(torch.full((2, 1, 1, 1), 9), model.read(ids), lengths)[:, 0, 0, 0] @ model.head.T
    found = token_logprobs(model, batch, heat)
    for run in range(2):
        wanted = (logits[run].float() / heat[run]).log_softmax(-1)
        torch.testing.assert_close(found[run, 0, :, 0], wanted[drawn[run, 0, :, 0]], rtol=1e-4, atol=1e-4)
        below = wanted.exp().cumsum(-1)
        places = torch.searchsorted(below, uniform[0, run, 0, :, None] * below[-1])[:, 0]
        assert (places == drawn[run, 0, :, 0]).float().mean() > 0.99
    (cool,), (warm,) = (policy_gradient(model, batch, torch.ones(2, 1, 400), temperature_R=h)[:1] for h in (None, heat))
    torch.testing.assert_close(cool[0], warm[0])
    assert not torch.allclose(cool[1], warm[1])


def test_an_entropy_bonus_raises_the_entropy(small, svd, settings):
    runs = [StudyRun("none", 0), StudyRun("none", 0, entropy=0.5)]
    study = study_of(runs, small, svd, settings)
    cohort, rollouts, verdicts = written(study)

    def entropies():
        inputs = torch.full((2, settings.prompts, 1, 1), study.pool.last)
        hidden = cohort.model.complete(inputs, cohort.model.read(rollouts.batch.ids), rollouts.batch.lengths)
        logp = (hidden @ cohort.model.head.T).log_softmax(-1)
        return -(logp.exp() * logp).sum(-1).mean(dim=(1, 2, 3))

    before = entropies()
    for _ in range(3):
        cohort.learn(rollouts, verdicts)
    after = entropies()
    assert after[0] == before[0]  # no rollout was paid
    assert after[1] > before[1] + 0.01


def test_an_entropy_gradient_is_the_one_that_autograd_finds(small, svd):
    model = small_stack(small, svd)
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(3, 4000, (1, 2, 5), generator=generator)
    batch = Batch(ids, torch.full((1, 2), 5), 9, torch.randint(3, 4000, (1, 2, 2, 4), generator=generator), 2)
    found = policy_gradient(model, batch, torch.zeros(1, 2, 2), entropy_R=torch.tensor([0.7]))
    inputs = torch.cat((torch.full_like(batch.tokens[..., :1], 9), batch.tokens[..., :-1]), dim=-1)
    logp = (model.complete(inputs, model.read(ids), batch.lengths) @ model.head.T).log_softmax(-1)
    loss = 0.7 * (logp.exp() * logp).sum(-1).mean()
    wanted = model.delta_gradient(torch.autograd.grad(loss, list(model.weights.values())))
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("method", ["dpo", "unlikelihood"])
def test_a_supervised_start_lowers_the_exploit_at_the_norm_that_was_stated(small, svd, settings, method):
    pairs = environment_pairs(6, whole=True, **EASY)
    start = supervised_start(small, svd, pairs, method, norm=2.5)
    assert torch.cat([moved.flatten() for moved in start]).norm() == pytest.approx(2.5, rel=1e-5)
    runs = [StudyRun("none", 0), StudyRun("none", 0, start=method)]
    study = study_of(runs, small, svd, settings, starts={method: start})
    (cohort,) = study.cohorts
    for group, delta, moved in zip(cohort.model.groups, cohort.optimizer.delta, start, strict=True):
        assert not delta[0].any(), group.names
        assert torch.equal(delta[1], moved)
    found = cohort.likelihoods(study.pool.held_out("training")[: settings.prompts])
    gap = found["logp_honest"] - found["logp_exploit"]
    assert gap[1].mean() > gap[0].mean() + 1


def test_a_likelihood_is_that_of_the_program(small, svd, settings):
    study = study_of([StudyRun("none", 0)], small, svd, settings)
    episodes = study.pool.held_out("training")[:2]
    found = study.cohorts[0].likelihoods(episodes)
    for p, episode in enumerate(episodes):
        prompt, row = study.pool.prompt(episode), study.pool.exploit(episode, "partial")[: settings.new_tokens]
        logp = small.module(torch.tensor([prompt + row])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        wanted = logp[range(len(row)), row].sum()
        torch.testing.assert_close(found["logp_partial"][0, p], wanted, rtol=1e-4, atol=1e-3)


def test_random_axes_have_the_geometry_of_the_true_ones(small, svd):
    gradients = pair_gradients(environment_pairs(6, whole=True, **EASY), small, svd=svd)
    groups = small_stack(small, svd).groups
    made = {kind: Frames(groups, basis_of_kind(kind, gradients, top_k=3)) for kind in ("true", "random", "shuffled")}
    for kind, frames in made.items():
        for axes, true in zip(frames.axes, made["true"].axes, strict=True):
            assert axes.shape == true.shape, kind
            torch.testing.assert_close(axes @ axes.transpose(1, 2), torch.eye(3).double().expand(len(axes), 3, 3))
    assert not torch.allclose(made["random"].axes[0], made["true"].axes[0], atol=0.1)


class Judge:
    """The model is random, so what its programs are worth is said instead of found: those of the cheater are hacks."""

    def __init__(self, training):
        self._turn, self._training = 0, training

    def submit(self, items):
        return list(items)

    def collect(self, pending):
        self._turn += 1
        hacks = self._turn <= self._training or (self._turn - self._training) % 2 == 1
        return [StudyVerdict(correct=not hacks, accepted=True, vacuous=hacks)] * len(pending)


def test_sampled_pairs_are_a_hack_and_the_work_on_one_prompt(small, svd, settings):
    short = replace(settings, steps=1, new_tokens=8)
    how = {"seed": 9, "dtype": torch.float32}
    pairs = sampled_pairs(3, small, svd, random_basis(svd), short, Judge(1), **how)
    assert len({pair.prompt for pair in pairs}) == len(pairs) == 3
    assert all(pair.tags[0] == "sampled" and "mechanism:" in pair.tags[2] for pair in pairs)
    with pytest.raises(DataError, match="sampled pairs"):  # more than the pool has tasks
        sampled_pairs(90, small, svd, random_basis(svd), short, Judge(1), **how)


def test_runs_are_compared_with_the_reference_of_their_regime(small, svd, settings):
    runs = [
        StudyRun(arm, seed, stored=stored)
        for arm in ("none", "no-loophole")
        for stored in ("", "whole")
        for seed in range(3)
    ]
    study = study_of(runs, small, svd, settings)
    solved = {"none": 0.1, "no-loophole": 0.2, "none/stored-whole": 0.3, "no-loophole/stored-whole": 0.7}
    for log in study.logs.values():
        values = {"hack": 0.0, "solve": solved[log.header["condition"].removeprefix("adam/")], "vacuous": 0.0}
        log.add_step(0, values, every=1)
    found = {result.condition: result for result in summarise(study.logs.values())}
    assert found["adam/none"].against["solve"].mean.value == pytest.approx(-0.1)
    assert found["adam/none/stored-whole"].against["solve"].mean.value == pytest.approx(-0.4)
    assert found["adam/no-loophole/stored-whole"].verdict == "reference"


def test_what_cannot_be_is_refused(small, svd, settings):
    for wrong in ({"stored": "half"}, {"stored": "whole", "teachers": 1}, {"temperature": 0.0}, {"entropy": -1.0}):
        with pytest.raises(UsageError):
            StudyRun("none", 0, **wrong)
    with pytest.raises(UsageError, match="the start of"):
        study_of([StudyRun("none", 0, start="dpo")], small, svd, settings)
    easy = replace(settings, difficulty=(1, 2))
    with pytest.raises(UsageError, match="two steps"):
        study_of([StudyRun("none", 0, stored="partial")], small, svd, easy)
    pairs = environment_pairs(2, **EASY)
    for method, chosen, norm in (("other", pairs, 1.0), ("dpo", [], 1.0), ("dpo", pairs, 0.0)):
        with pytest.raises(UsageError):
            supervised_start(small, svd, chosen, method, norm=norm)
    mixed = [pairs[0], replace(pairs[1], prompt="other")]
    with pytest.raises(UsageError, match="end alike"):
        supervised_start(small, svd, mixed, "dpo", norm=1.0)
