"""A second computation of every nonce: it sharpens the test, and no node gains by it."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from assay.errors import CalibrationError, ProofMismatch
from assay.models import load_model
from assay.poc import Calibration, Noise, Pins, Round, calibrate_model, cheats, prove, verify
from assay.poc.verdict import Ledger, audit_ledger
from assay.poc.verdict.noise import sequential_test

ROUND = Round(block_hash="b", public_key="k", seq_len=16, preset="artifact")
AGREED = {"expect": replace(Pins.of(ROUND), prover_dtype="float16"), "seed": 1}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A bundled model in three formats, its law as read from a file, and the honest proof of a node in float16."""
    path = tmp_path_factory.mktemp("law") / "law.json"
    shape = {"preset": "artifact", "seq_len": 16, "blocks": 2, "nonces": 128, "device": "cpu"}
    calibrate_model("reference:qwen3", **shape).save(path)
    names = ("float16", "float32", "bfloat16")
    node, own, control = (load_model("reference:qwen3", dtype=name, device="cpu") for name in names)
    proof = prove(node, ROUND, range(96))
    return SimpleNamespace(law=Calibration.load(path), node=node, own=own, control=control, proof=proof)


def test_a_control_raises_the_power_of_a_sample(made, tmp_path):
    plain = verify(made.proof, made.own, calibration=made.law, **AGREED)
    beside = verify(made.proof, made.own, calibration=made.law, control=made.control, **AGREED)
    assert (plain.verdict, beside.verdict, beside.exit_code) == ("honest", "honest", 0)
    assert beside.power > plain.power + 0.1
    assert (plain.noise.control, beside.noise.control.dtype) == (None, "bfloat16")
    assert Noise.from_dict(beside.noise.as_dict()) == beside.noise
    path = tmp_path / "ledger.sqlite3"
    with Ledger(path) as ledger:
        ledger.record(beside, proof=made.proof.footer.sha256)
    assert audit_ledger(path).clean
    cheat = prove(cheats.rounded(made.node, 4), ROUND, range(96))
    assert verify(cheat, made.own, calibration=made.law, control=made.control, **AGREED).fraud


@pytest.mark.parametrize("control", [np.nan, np.inf, 0.0])
def test_nonces_on_which_the_own_machines_differ_without_bound_excuse_no_node(made, control):
    noise = next(build for build in made.law.builds if build.control).between("", None)
    rng = np.random.default_rng(0)
    honest, invented = noise.size * np.exp(0.3 * rng.normal(size=96)), rng.uniform(1.0, 2.0, 96)
    assert sequential_test(noise).update(noise.control.scores(invented, np.full(96, control))).verdict == "fraud"
    few = noise.control.scores(honest, np.where(np.arange(96) < 1, control, noise.control.size))
    assert np.isfinite(few).all()
    assert sequential_test(noise).update(few).verdict != "fraud", "nor do they accuse one"


def test_a_law_by_a_control_is_of_the_size_of_scores_in_every_block(made):
    noise = next(build for build in made.law.builds if build.control).between("", None)
    residuals, controls = np.array([0.01, 0.02]), np.array([0.004, 0.03])
    there = noise.scaled(1.2)
    scores = noise.control.scores(residuals, controls) / noise.size
    assert there.control.scores(1.2 * residuals, 1.2 * controls) / there.size == pytest.approx(scores)


def test_a_control_of_another_checkpoint_or_in_another_format_is_refused(made):
    with pytest.raises(ProofMismatch, match="a control with") as refused:
        verify(made.proof, made.own, calibration=made.law, control=replace(made.control, digest="0" * 64), **AGREED)
    assert "checkpoint of the proof" in refused.value.wanted
    with pytest.raises(CalibrationError, match="again in float32"):
        verify(made.proof, made.own, calibration=made.law, control=made.own, **AGREED)
