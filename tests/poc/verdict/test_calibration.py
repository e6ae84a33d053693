"""Calibrations: measured, stored, and refused where they do not belong."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from assay.errors import CalibrationError, ProofMismatch
from assay.models import load_model
from assay.poc import Calibration, Proof, calibrate, prove, verify
from assay.stats import RESOLUTION


@pytest.fixture(scope="module")
def narrow_model(small_checkpoint: Path):
    return load_model(small_checkpoint, dtype="bfloat16", device="cpu")


@pytest.fixture(scope="module")
def narrow(narrow_model, round_) -> Proof:
    return prove(narrow_model, round_, range(40), batch_size=8)


def test_noise_between_two_dtypes(proof: Proof, narrow: Proof, narrow_model, small_model, tmp_path: Path):
    measured = calibrate(proof, narrow)
    assert measured.n == 40
    assert 1e-6 < measured.law.sigma < 1e-3
    path = tmp_path / "calibration.json"
    measured.save(path)
    assert Calibration.load(path) == measured
    for made, validator in ((narrow, small_model), (proof, narrow_model)):
        verdict = verify(made, validator, calibration=measured)
        assert verdict.honest, verdict.reason
        assert verdict.noise.source == "calibration on 40 nonces"


def test_equal_engines_give_the_resolution(proof: Proof):
    """Bits that agree leave only the resolution of a distance, widened to its confidence bound."""
    assert RESOLUTION <= calibrate(proof, proof).law.sigma < 2 * RESOLUTION


def test_a_calibration_of_other_engines_is_refused(proof: Proof, narrow: Proof, small_model):
    with pytest.raises(CalibrationError, match="another dtype than the prover's: float32") as refused:
        verify(narrow, small_model, calibration=calibrate(proof, proof))
    assert refused.value.wanted == "dtype bfloat16"
    with pytest.raises(CalibrationError, match="another dtype than this validator's: bfloat16"):
        verify(proof, small_model, calibration=calibrate(proof, narrow))
    vectors = replace(calibrate(proof, proof), output="vector")
    with pytest.raises(CalibrationError, match="another output than the proof's: vector"):
        verify(proof, small_model, calibration=vectors)


def test_a_calibration_of_another_model_or_preset_is_refused(proof: Proof, small_model, round_):
    """The noise of one model gives cheaters on a quieter one room: the two are told apart by their digests."""
    measured = calibrate(proof, proof)
    assert (measured.digest, measured.preset) == (small_model.digest, "poc-2.0")
    with pytest.raises(CalibrationError, match="another checkpoint than the proof's"):
        verify(proof, small_model, calibration=replace(measured, digest="0" * 64))
    artifact = prove(small_model, replace(round_, preset="permutation"), range(40), batch_size=8)
    with pytest.raises(CalibrationError, match=r"another preset than the proof's: poc-2\.0") as refused:
        verify(artifact, small_model, calibration=measured)
    assert refused.value.wanted == "preset permutation"


def test_a_calibration_of_the_first_version_opens_but_judges_nothing(proof: Proof, small_model, tmp_path: Path):
    path = tmp_path / "calibration.json"
    calibrate(proof, proof).save(path)
    old = {name: value for name, value in json.loads(path.read_text()).items() if name not in ("digest", "preset")}
    path.write_text(json.dumps(old))
    read = Calibration.load(path)
    assert (read.digest, read.preset, read.n) == (None, None, 40)
    with pytest.raises(CalibrationError, match="does not say of which model and preset") as refused:
        verify(proof, small_model, calibration=read)
    assert "assay poc calibrate" in refused.value.do


def test_a_calibration_is_of_one_mode_of_weights(proof: Proof):
    other = Proof.build(replace(proof.header, weights="random-all"), proof.records, 1.0)
    with pytest.raises(ProofMismatch, match="different rounds"):
        calibrate(proof, other)


def test_proofs_that_do_not_belong_together_are_refused(proof: Proof, narrow: Proof, small_model, round_):
    other = prove(small_model, replace(round_, block_hash="other"), range(40), batch_size=8)
    with pytest.raises(ProofMismatch, match="different rounds"):
        calibrate(proof, other)
    few = prove(small_model, round_, range(8), batch_size=8)
    with pytest.raises(ProofMismatch, match="8 nonces in common"):
        calibrate(few, narrow)


def test_a_broken_calibration_file_is_refused(proof: Proof, tmp_path: Path):
    path = tmp_path / "calibration.json"
    calibrate(proof, proof).save(path)
    good = json.loads(path.read_text())
    broken = [
        {},
        good | {"kind": "assay.poc.proof"},
        good | {"schema": 2},
        good | {"law": {"kind": "scale", "sigma": -1.0}},
        good | {"law": {"kind": "other", "sigma": 1.0}},
        good | {"law": {"kind": "scale", "sigma": "1"}},
        good | {"law": 7},
        good | {"law": {"kind": "scale", "sigma": 10**400}},
        good | {"law": {"kind": "log", "mu": -5.0, "sd": 0.5}},
        good | {"output": "vector"},
        good | {"output": ["distance"]},
        good | {"n": 3},
        good | {"n": "40"},
        good | {"surplus": 1},
        good | {"digest": 5},
        good | {"preset": ["poc-2.0"]},
        {k: v for k, v in good.items() if k != "prover"},
        good | {"prover": {"engine": "hf"}},
    ]
    for values in broken:
        path.write_text(json.dumps(values))
        with pytest.raises(CalibrationError):
            Calibration.load(path)
    for text in ("", "[]", "NaN", "{"):
        path.write_text(text)
        with pytest.raises(CalibrationError):
            Calibration.load(path)
    with pytest.raises(CalibrationError):
        Calibration.load(tmp_path / "missing")
