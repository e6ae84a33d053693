"""Laws of machines: fitted to pairs, predicted for a machine left out, and never an accusation of
an honest one.
"""

import math
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

from assay import stats
from assay.models import load_model
from assay.poc import Build, Calibration, Noise, calibrate, prove
from assay.poc.verdict import fit_machines, noise_for
from assay.poc.verdict.build_noise import LeftOut, Sizes
from assay.poc.verdict.machine_fit import PRIOR, leave_out
from assay.poc.verdict.sample_plan import sequential_test
from assay.stats import LogNoise
from assay.stats.noise_laws import Spread, fit_log_noise


def pairs(machines: int, nonces: int = 400, *, sd: float = 0.0, noisy: float = 1.0, seed: int = 0):
    """Distances between machines; the last one is ``noisy`` times as far off."""
    rng = np.random.default_rng(seed)
    found = {}
    for i, j in combinations(range(machines), 2):
        scale = 0.2 * math.exp(sd * rng.normal()) * (noisy if j == machines - 1 else 1.0)
        found[i, j] = np.minimum(scale * np.exp(0.4 * rng.normal(size=nonces)), 2.0)
    return found


def test_machines_alike_have_the_spread_of_the_prior():
    noise = fit_machines(pairs(5, 2000), ["a"] * 5, fit_log_noise)
    assert noise.sizes.typical == pytest.approx(0.2, rel=0.05)
    assert noise.law.size == pytest.approx(noise.sizes.typical, rel=1e-6)
    assert noise.known.sd < noise.spread.sd < 1.7 * PRIOR.sd
    assert noise.spread.dof == PRIOR.dof + 4


def test_machines_that_differ_widen_the_law():
    spreads = [
        fit_machines(pairs(5, sd=sd), ["a"] * 5, fit_log_noise).spread.sd for sd in (0.0, 0.1, 0.3)
    ]
    assert spreads[0] < spreads[1] < spreads[2]
    assert spreads[2] > 2 * PRIOR.sd


def test_machines_that_agree_to_the_bit():
    noise = fit_machines(
        {(0, 1): np.zeros(64), (0, 2): np.zeros(64), (1, 2): np.zeros(64)}, ["a"] * 3, fit_log_noise
    )
    assert noise.law.size == pytest.approx(1e-4)
    assert noise.sizes.predict("a", 1) == noise.law.size


def test_a_size_is_predicted_by_the_validator_and_by_noisier_machines_of_the_kind():
    sizes = Sizes(
        {(0, 1): 1.0, (0, 2): 2.0, (1, 2): 3.0, (0, 3): 8.0, (1, 3): 9.0, (2, 3): 9.5},
        ("a", "a", "b", "c"),
    )
    assert sizes.predict("new", 0) == 5.0, (
        "the median of 2 and 8: the other machine of its kind agrees more closely"
    )
    assert sizes.predict("c", 0) == 8.0, "its kind is noisier"
    assert sizes.predict("b", 0) == 5.0, "that its kind was quieter is no promise"
    assert sizes.predict("a", 0) == 5.0
    assert sizes.predict("") == pytest.approx(np.median([np.median([2, 3, 8, 9]), 3, 9]))
    lonely = Sizes({(0, 1): 1.0}, ("a", "a", "b"))
    assert lonely.predict("b", 2) == lonely.typical, "a validator that was not measured"
    assert lonely.predict("b", 0) == 1.0, "nothing but its own kind was measured"


def test_many_machines_of_one_kind_are_one_voice():
    """Three machines agree closely with each other: that says nothing of the two others, nor widens
    their law.
    """
    sizes = {(i, j): 0.16 if j < 3 else 0.3 for i, j in combinations(range(5), 2)}
    kinds = ("a", "a", "a", "b", "c")
    assert Sizes(sizes, kinds).predict("b", 0) == 0.3
    assert max(Sizes(sizes, kinds).deviations()) == 0
    unknown = Sizes(sizes, ("",) * 5)
    assert max(unknown.deviations()) > 0.2, "without kinds it cannot be known"


def test_leaving_out_needs_three_machines():
    assert leave_out(pairs(2), ["a"] * 2, fit_log_noise) == (None, None)


def test_honest_machines_left_out_are_not_accused():
    seen = []
    effect, found = leave_out(
        pairs(4, sd=0.03), ["a"] * 4, fit_log_noise, audits=20, progress=lambda *at: seen.append(at)
    )
    assert effect == 1.25
    assert isinstance(found, LeftOut)
    assert (found.accused, found.worst, found.pairs, found.audits, found.checked) == (
        0.0,
        0.0,
        12,
        20,
        300,
    )
    assert (found.low, found.high) == pytest.approx(stats.proportion_interval(0, 4)), (
        "of four machines, not 240 audits"
    )
    assert found.holds
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_a_usual_machine_is_called_honest_where_machines_differ():
    """Its noise is also that of a quiet machine that computes something else."""
    apart = pairs(3)
    effect, _ = leave_out(apart, ["a"] * 3, fit_log_noise, audits=5, between_blocks=0.1)
    noise = fit_machines(apart, ["a"] * 3, fit_log_noise, between_blocks=0.1)
    test = sequential_test(Noise(noise.law, "measured", noise.spread, effect))
    usual = noise.law.size * np.exp(0.4 * np.random.default_rng(1).normal(size=2000))
    assert test.update(usual).result.verdict == "honest"


@pytest.mark.slow
def test_a_machine_unlike_all_others_raises_the_effect(monkeypatch):
    far = pairs(4, noisy=1.7)
    with monkeypatch.context() as patch:
        patch.setattr("assay.poc.verdict.machine_fit.EFFECTS", [1.25])
        _, at_least = leave_out(far, ["a"] * 4, fit_log_noise, audits=20)
    assert at_least is not None
    assert not at_least.holds
    assert at_least.worst == 1.0
    effect, left_out = leave_out(far, ["a"] * 4, fit_log_noise, audits=20)
    assert effect is not None
    assert effect > 1.25
    assert left_out is not None
    assert left_out.accused < at_least.accused


def test_machines_drawn_from_the_predicted_spread_are_accused_at_most_at_the_stated_rate(fewer):
    """The promise of a predictive law: over machines, not for the machine that happens to be as
    predicted.
    """
    rng = np.random.default_rng(0)
    law = LogNoise(math.log(0.2), 0.4)
    alpha = 0.05
    machines = 600 // fewer
    test = sequential_test(Noise(law, "predicted", Spread(0.06, PRIOR.dof), 1.25), alpha=alpha)
    z = np.array([law.standard_quantile(p) for p in rng.uniform(1e-9, 0.5, machines * 200)])
    shapes = (law.sd * z * rng.choice([-1.0, 1.0], z.size)).reshape(machines, 200)
    scales = 0.06 * rng.standard_t(PRIOR.dof, (machines, 1))
    accused = test.accusations(0.2 * np.exp(shapes + scales))[:, -1].mean()
    assert accused <= alpha
    known = sequential_test(Noise(law, "as if known", effect=1.25), alpha=alpha)
    assert known.accusations(0.2 * np.exp(shapes + scales))[:, -1].mean() > accused


def test_three_engines_judge_a_fourth(small_checkpoint: Path, round_, tmp_path: Path):
    models = [
        load_model(small_checkpoint, dtype=dtype, device="cpu")
        for dtype in ("float32", "bfloat16", "float16")
    ]
    proofs = [
        prove(model, round_, range(40), batch_size=4 * (i + 1)) for i, model in enumerate(models)
    ]
    seen = []
    measured = calibrate(
        *proofs, hidden_size=models[0].hidden_size, progress=lambda *at: seen.append(at)
    )
    (build,) = measured.builds
    assert len(build.machines) == 3
    assert build.hidden_size == models[0].hidden_size
    assert build.left_out is not None
    assert (build.left_out.pairs, build.left_out.checked) == (6, 40)
    assert seen[-1] == (3, 3)
    fourth = prove(models[1], round_, range(40), batch_size=10)
    measured.find_build(fourth.header)
    measured.save(tmp_path / "c.json")
    assert Calibration.load(tmp_path / "c.json") == measured


def test_the_kind_of_a_machine_is_that_of_its_pins_and_never_of_its_header(proof):
    """Cards of one kind are three times as noisy, and any prover may say that it has one."""
    rng = np.random.default_rng(0)
    made = []
    for device, size in (("card A", 1e-5), ("card B", 1e-5), ("card C", 1e-5), ("card D", 9e-5)):
        engine = replace(proof.header.fingerprint, device=device, batch_size=8 + len(made))
        moved = [
            replace(one, distance=one.distance + x)
            for one, x in zip(
                proof.records, rng.normal(size=len(proof.records)) * size, strict=True
            )
        ]
        made.append(
            replace(proof, header=replace(proof.header, fingerprint=engine), records=tuple(moved))
        )
    known = calibrate(*made)
    validator = made[0].header.fingerprint
    quiet = made[1].header
    loud = made[3].header
    alone = {noise_for(header, validator, known).size for header in (quiet, loud)}
    assert len(alone) == 1
    pinned = Build.of(loud.fingerprint), Build.of(quiet.fingerprint)
    wide, narrow = (noise_for(loud, validator, known, builds=[one]).size for one in pinned)
    assert wide > 1.5 * narrow
    assert noise_for(loud, validator, known, builds=pinned).size in alone
