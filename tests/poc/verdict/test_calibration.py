"""Calibrations of two engines: measured, stored, and refused where they do not belong."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from assay.errors import CalibrationError, ProofMismatch
from assay.models import load_model, precision
from assay.poc import Calibration, Noise, Proof, calibrate, prove, verify
from assay.poc.verdict.calibration_file import find_build_noise
from assay.poc.verdict.entries import round_identity
from assay.poc.verdict.sample_plan import sequential_test
from tests.wordings import refuses


@pytest.fixture(scope="module", autouse=True)
def with_fast_products() -> Iterator[None]:
    """A CPU with fast products of 16-bit numbers, whatever this machine has: two engines differ in
    dtype alone.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(precision, "has_fast_products", lambda dtype: True)
        yield


@pytest.fixture(scope="module")
def narrow_model(small_checkpoint: Path):
    return load_model(small_checkpoint, dtype="bfloat16", device="cpu")


@pytest.fixture(scope="module")
def narrow(narrow_model, round_) -> Proof:
    return prove(narrow_model, round_, range(40), batch_size=8)


def test_noise_between_two_dtypes(
    proof: Proof, narrow: Proof, narrow_model, small_model, tmp_path: Path
):
    measured = calibrate(proof, narrow)
    (build,) = measured.builds
    assert build.n == 40
    assert 1e-6 < build.law.sigma < 1e-3
    assert build.left_out is None, "two machines do not show how machines differ"
    path = tmp_path / "calibration.json"
    measured.save(path)
    assert Calibration.load(path) == measured
    for made, validator in ((narrow, small_model), (proof, narrow_model)):
        verdict = verify(made, validator, calibration=measured)
        assert verdict.honest, verdict.reason
        assert verdict.noise.source == "calibration on 40 nonces"


def test_a_calibration_of_other_engines_is_refused(
    proof: Proof, narrow: Proof, small_model, small_checkpoint: Path
):
    with refuses(CalibrationError, "a calibration of other engines is refused") as refused:
        verify(narrow, small_model, calibration=calibrate(proof, proof))
    assert refused.value.wanted == "dtype bfloat16"
    with refuses(CalibrationError, "a calibration of other engines is refused, 2"):
        verify(proof, small_model, calibration=calibrate(proof, narrow))
    vectors = changed(calibrate(proof, proof), output="vector")
    plain = load_model(small_checkpoint, dtype="float32", device="cpu")
    plain.module.set_attn_implementation("eager")
    by_kernels = calibrate(proof, prove(plain, proof.round, range(40), batch_size=8))
    assert verify(proof, small_model, calibration=by_kernels).honest, (
        "an engine equal to the prover's differs less"
    )
    with refuses(CalibrationError, "a calibration of other engines is refused, 3"):
        verify(proof, small_model, calibration=vectors)


def test_a_calibration_of_another_model_or_preset_is_refused(proof: Proof, small_model, round_):
    """The noise of one model gives cheaters on a quieter one room: the two are told apart by their
    digests.
    """
    measured = calibrate(proof, proof)
    assert (measured.builds[0].digest, measured.builds[0].preset) == (small_model.digest, "poc-2.0")
    with refuses(CalibrationError, "a calibration of another model or preset is refused"):
        verify(proof, small_model, calibration=changed(measured, digest="0" * 64))
    artifact = prove(small_model, replace(round_, preset="permutation"), range(40), batch_size=8)
    with refuses(
        CalibrationError, "a calibration of another model or preset is refused, 2"
    ) as refused:
        verify(artifact, small_model, calibration=measured)
    assert refused.value.wanted == "preset permutation"


def test_a_calibration_is_of_one_mode_of_weights(proof: Proof):
    for change in ({"weights": "random-all"}, {"frame": "0" * 64}):
        other = Proof.build(replace(proof.header, **change), proof.records, 1.0)
        with refuses(ProofMismatch, "a calibration is of one mode of weights"):
            calibrate(proof, other)


def test_a_path_a_height_and_another_name_of_the_preset_make_no_other_round(
    proof: Proof, narrow: Proof
):
    round = replace(narrow.round, model="/data/small", block_height=5, preset="sign-flips")
    other = Proof.build(replace(narrow.header, round=round), narrow.records, 1.0)
    assert calibrate(proof, other) == calibrate(proof, narrow)
    assert round_identity(round) == round_identity(narrow.round)


def test_messages_are_judged_by_laws_of_the_validators_own_engine_and_length(
    proof: Proof, narrow: Proof
):
    measured = [calibrate(proof, narrow)]
    own = proof.header.fingerprint
    known = {
        "digest": proof.header.digest,
        "preset": "poc-2.0",
        "formats": ("bfloat16", own.dtype),
        "round": None,
    }
    assert find_build_noise(measured, None, **known, validator=own) is not None
    for other in ({"attention": "eager"}, {"seq_len": 256}):
        assert find_build_noise(measured, None, **known, validator=replace(own, **other)) is None


def test_a_law_of_machines_with_equal_bits_convicts_cheats_in_some_nonces(proof: Proof):
    noise = calibrate(proof, proof).builds[0].noise_between("", None)
    rng = np.random.default_rng(0)
    residuals = np.where(
        rng.random((200, 128)) < 0.2, 1e-3 * np.abs(rng.standard_normal((200, 128))), 0
    )
    assert sequential_test(noise).accusations(residuals)[:, -1].mean() > 0.95
    assert not sequential_test(noise).accusations(np.zeros((1, 512))).any()


def test_proofs_that_do_not_belong_together_are_refused(
    proof: Proof, narrow: Proof, small_model, round_
):
    other = prove(small_model, replace(round_, block_hash="other"), range(40), batch_size=8)
    with refuses(ProofMismatch, "proofs that do not belong together are refused"):
        calibrate(proof, other)
    few = prove(small_model, round_, range(8), batch_size=8)
    with refuses(ProofMismatch, "proofs that do not belong together are refused, 2"):
        calibrate(few, narrow)


def test_files_of_several_builds(proof: Proof, narrow: Proof, small_model, tmp_path: Path):
    path = tmp_path / "calibration.json"
    both = calibrate(proof, proof).merged(calibrate(proof, narrow)).merged(calibrate(proof, proof))
    assert len(both.builds) == 2, "a build that was there already is not added again"
    both.save(path)
    read = Calibration.load(path)
    assert read == both
    assert verify(proof, small_model, calibration=read).noise.size < 1e-6
    assert verify(narrow, small_model, calibration=read).noise.size > 1e-6


def test_the_laws_of_known_cheats_in_older_files_are_ignored(proof: Proof, tmp_path: Path):
    path = tmp_path / "calibration.json"
    measured = calibrate(proof, proof)
    measured.save(path)
    law = {"kind": "scale", "sigma": 0.001}
    former = '"mixture":true,"named":' + json.dumps({"int4": law})
    path.write_text(path.read_text().replace('"named":{}', former))
    assert Calibration.load(path) == measured
    noise = measured.builds[0].noise_between("", None)
    assert Noise.from_dict(noise.as_dict() | {"named": {"int4": law}}) == noise, "in a ledger"
    with refuses(CalibrationError, "the laws of known cheats in older files are ignored"):
        Noise.from_dict(noise.as_dict() | {"test": 1})


def changed(calibration: Calibration, **values) -> Calibration:
    return Calibration(builds=tuple(replace(build, **values) for build in calibration.builds))


def test_a_broken_calibration_file_is_refused(proof: Proof, tmp_path: Path):
    path = tmp_path / "calibration.json"
    calibrate(proof, proof).save(path)
    good = json.loads(path.read_text())

    def build(**values: object) -> dict[str, object]:
        return good | {"builds": [good["builds"][0] | values]}

    def engine(**values: object) -> dict[str, object]:
        return {"name": "a", "kind": "", "fingerprint": proof.header.fingerprint.as_dict() | values}

    nested = json.loads("[" * 500 + "]" * 500)
    without = {name: value for name, value in good["builds"][0].items() if name != "machines"}
    law = good["builds"][0]["law"]
    logarithmic = {"kind": "log", "mu": -5.0, "sd": 0.5}
    changes = (
        {"library": "\x1b[2J"},
        {"threads": nested},
        {"torch": "9" * 2000},
        {"batch_size": 10**40},
    )
    fingerprints = [
        {"name": "a", "kind": "", "fingerprint": made} for made in ({"engine": "hf"}, {})
    ]
    control = {"of": "a", "dtypes": ["b"], "usual": [1.0, 1.0], "sizes": [1.0], "powers": [0.5]}
    wrong = {
        "law": (
            {"kind": "other", "sigma": 1.0}, *({"kind": "scale", "sigma": sigma} for sigma in (-1.0, "1", 10**400)), 7,
            logarithmic, law | {"dof": 1e300},
        ),
        "output": ("vector", ["distance"]),
        "n": (3, "40"),
        "surplus": (1,),
        "digest": (5,),
        "preset": (["poc-2.0"],),
        "machines": (
            [], [{"name": "\u202e", "kind": "", "fingerprint": None}] * 2, *([made] * 2 for made in fingerprints),
            *([engine(**change)] * 2 for change in changes),
        ),
        "sizes": ([], [[0, 5, 1.0]], [[1, 0, 1.0]], [[0, 1]], *([[0, 1, x]] for x in (-1.0, float("nan"), 1e308))),
        "spread": ({"sd": 2.0, "dof": 30.0}, {"sd": "0", "dof": 30.0}),
        "known": ({}, {"sd": 0.1}, {"sd": 0.1, "dof": 10**40}),
        "effect": (1.0, "2"),
        "hidden_size": (-1, True),
        "left_out": ({"accused": 0.0},),
        **dict.fromkeys(("scores", "widest"), ("no base64", "AA", "AHwAfA==", "ADwAAA==")),
        "control": (
            {}, control | {"dtypes": []}, *(control | {one: [-1.0]} for one in ("sizes", "usual", "powers")),
            *(control | {one: []} for one in ("sizes", "usual", "powers")),
            *(control | {"powers": one} for one in ([0.0], [1.5])), control | {
                "dtypes": ["b", "c"], "usual": [1.0] * 3, "sizes": [1.0] * 3, "powers": [0.5] * 3
            },
        ),
    }  # fmt: skip
    tops = (
        {"kind": "assay.poc.proof"},
        {"schema": 1},
        {"schema": 3},
        *({"builds": builds} for builds in ([], 7, [without])),
    )
    broken = [
        {},
        *(good | top for top in tops),
        *(build(**{name: value}) for name in wrong for value in wrong[name]),
    ]
    for text in (*map(json.dumps, broken), "", "[]", "NaN", "{"):
        path.write_text(text)
        with pytest.raises(CalibrationError) as refused:
            Calibration.load(path)
        assert refused.value.seen.startswith(str(path))
    with pytest.raises(CalibrationError):
        Calibration.load(tmp_path / "missing")
