"""Parameters for a chain's count rule: exact, within their bound, and better than the defaults."""

import math
from dataclasses import replace

import numpy as np
import pytest
import scipy

from assay import stats
from assay.errors import CalibrationError
from assay.poc import Calibration, Fingerprint
from assay.poc.verdict.build_noise import BuildNoise, Sizes, describe_machines
from assay.poc.verdict.chain_rule import CHEATS, DEFAULTS, TARGET, ChainRule, export_rule
from assay.poc.verdict.honest_noise import pack_scores, unpack_scores
from assay.stats.noise_laws import Spread
from tests.wordings import refuses

ENGINE = Fingerprint(
    engine="hf",
    device="cpu",
    dtype="bfloat16",
    attention="sdpa",
    batch_size=32,
    seq_len=256,
    threads=1,
    torch="2",
    library="transformers 5",
)


def build(median=0.05, sd=0.35, *, spread=0.05, n=4000, seed=0, **changed):
    """The noise of a build whose residuals are log-normal."""
    rng = np.random.default_rng(seed)
    law = stats.LogNoise(math.log(median), sd)
    drawn = median * np.exp(sd * rng.standard_normal(n))
    values = {"output": "vector", "preset": "artifact", "digest": "0" * 64, "n": n, "law": law}
    values |= {"machines": describe_machines([ENGINE, ENGINE])}
    values |= {"sizes": Sizes({(0, 1): median}, ("", "")), "known": Spread(), "widest": ""}
    values |= {"spread": Spread(spread), "scores": pack_scores(drawn, law)}
    return BuildNoise(**values | changed)


def exported(*builds, **options):
    return export_rule(Calibration(builds=builds), **options)


def of(found, rule):
    return [cost for cost in found.costs if cost.rule == rule]


@pytest.mark.parametrize("n", [1, 7, 200, 1000])
@pytest.mark.parametrize("rule", [(0.1, 0.05), (0.001, 0.01), (0.03, 0.001)])
def test_the_fewest_mismatches_are_those_of_the_exact_test(n, rule):
    p_mismatch, alpha = rule
    fewest = ChainRule(dist_threshold=0.1, p_mismatch=p_mismatch, p_value_threshold=alpha).fewest(n)
    accused = [stats.count_test(count, n, p_mismatch, alpha).fraud for count in range(n + 1)]
    assert accused == [count >= fewest for count in range(n + 1)]


@pytest.mark.parametrize("checked", [200, 20_000])
def test_honest_machines_are_accused_within_the_bound_and_cheats_are_caught(checked):
    found = exported(build(), checked=checked, alpha=0.001)
    (measured,) = of(found, "measured")
    assert found.parameters.p_value_threshold == 0.001
    assert 0 <= measured.low <= measured.false_accusation <= measured.high <= 0.001
    assert measured.power[str(TARGET)] > 0.95
    assert list(measured.power) == [str(cheat) for cheat in CHEATS]


def test_the_costs_are_those_of_simulated_audits():
    """Of machines with a scale of their own, each audit counted by the exact test."""
    found = exported(build(spread=0.1))
    rule = found.parameters
    (cost,) = of(found, "measured")
    rng = np.random.default_rng(3)
    audits, n = 4000, found.checked
    caught = {}
    for cheat in CHEATS[:2]:
        scale = np.exp(0.1 * rng.standard_t(30, (audits, 1)))
        sizes = 0.05 * scale * np.exp(0.35 * rng.standard_normal((audits, n)))
        sizes = np.where(rng.random((audits, n)) < cheat.share, cheat.multiple * sizes, sizes)
        counts = (sizes > rule.dist_threshold).sum(axis=1)
        caught[cheat] = np.mean(counts >= rule.fewest(n))
        margin = 4 * math.sqrt(0.25 / audits) + 0.03  # of the simulation, and of 1024 scores
        assert abs(caught[cheat] - cost.power[str(cheat)]) < margin


def test_the_measured_parameters_beat_the_defaults():
    """A quiet model, to which a threshold of 0.4 is blind, and a noisy one that 0.02 accuses."""
    quiet = exported(build(median=0.02))
    client, vllm = (
        of(quiet, name)[0] for name in ("default of the chain's client", "default of its vLLM")
    )
    assert client.power[str(TARGET)] < 0.01
    assert vllm.false_accusation > 0.99
    assert of(quiet, "measured")[0].power[str(TARGET)] > 0.95


@pytest.mark.slow
def test_one_set_of_parameters_holds_for_the_noisiest_build():
    found = exported(build(), build(median=0.1, seed=1))
    costs = of(found, "measured")
    assert len(costs) == 2
    assert all(cost.high <= 0.001 for cost in costs)
    alone = exported(build()).parameters.dist_threshold
    assert found.parameters.dist_threshold > alone


@pytest.mark.slow
def test_quiet_builds_leave_the_parameters_of_the_noisiest_as_they_are():
    """As where a model was measured in several number formats, which is the usual calibration."""
    alone = exported(build())
    beside = exported(build(), build(median=0.005, seed=1), build(median=0.0001, seed=2))
    assert beside.parameters == alone.parameters
    assert of(beside, "measured")[0].power == of(alone, "measured")[0].power


@pytest.mark.slow
def test_few_measured_nonces_ask_for_a_wider_rate():
    few = exported(build(n=200))
    many = exported(build(n=20_000))
    assert of(few, "measured")[0].power[str(TARGET)] <= of(many, "measured")[0].power[str(TARGET)]
    assert of(few, "measured")[0].high <= 0.001


@pytest.mark.slow
def test_without_scores_the_law_is_believed():
    found = exported(build(scores=""))
    assert of(found, "measured")[0].high <= 0.001


def test_of_more_nonces_than_there_are_scores_no_more_count():
    """1024 quantiles of 20 000 say nothing of what one in 10 000 does."""
    many = build(n=20_000)
    assert exported(many).costs == exported(replace(many, n=1024)).costs


def test_the_interval_is_that_of_the_residuals_above_the_threshold():
    """Of 200, one more was counted: 200 times 1 − 198/200 is a little more than 2."""
    measured = build(median=0.0105, n=200, spread=0.0)
    above = int((unpack_scores(measured.scores) * measured.law.size > 0.02).sum())
    (cost,) = of(exported(measured), "default of its vLLM")
    rule = DEFAULTS[cost.rule]
    fewest = rule.fewest(200)
    ends = scipy.stats.binom.sf(fewest - 1, 200, stats.proportion_interval(above, 200))
    assert above > 0
    assert (cost.low, cost.high) == tuple(ends)


def test_a_quick_law_is_refused():
    with refuses(CalibrationError, "a quick law is refused"):
        exported(build(), build(limits="a quick law: it is of few nonces"))


def test_a_calibration_of_another_preset_is_refused():
    with pytest.raises(CalibrationError):
        exported(build(preset="tokens-1"))
