"""Other computations of every nonce: they sharpen the test, and no node gains by them."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from assay.errors import CalibrationError, ProofMismatch, UsageError
from assay.models import load_model
from assay.poc import (
    Calibration,
    Noise,
    Pins,
    Round,
    calibrate,
    calibrate_model,
    cheats,
    prove,
    verify,
)
from assay.poc.verdict import Ledger, audit_ledger
from assay.poc.verdict.control import Control
from assay.poc.verdict.residuals import residuals
from assay.poc.verdict.sample_plan import sequential_test
from tests.wordings import refuses

ROUND = Round(block_hash="b", public_key="k", seq_len=16, preset="artifact")
AGREED = {"expect": replace(Pins.of(ROUND), prover_dtype="float16"), "seed": 1}


# A control is a rarer setting, whose proofs take half a minute.
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A bundled model in three formats, its law as read from a file, and the honest proof of a node
    in float16.
    """
    path = tmp_path_factory.mktemp("law") / "law.json"
    shape = {"preset": "artifact", "seq_len": 16, "blocks": 2, "nonces": 128, "device": "cpu"}
    calibrate_model("reference:qwen3", **shape).save(path)
    names = ("float16", "float32", "bfloat16")
    node, own, control = (load_model("reference:qwen3", dtype=name, device="cpu") for name in names)
    proof = prove(node, ROUND, range(96))
    return SimpleNamespace(
        law=Calibration.load(path), node=node, own=own, control=control, proof=proof
    )


def _noise(made):
    """Return a law whose control is one more computation."""
    return next(
        one for one in made.law.builds if one.control and len(one.control.dtypes) == 1
    ).noise_between("", None)


def test_a_control_raises_the_power_of_a_sample(made, tmp_path):
    plain = verify(made.proof, made.own, calibration=made.law, **AGREED)
    beside = verify(made.proof, made.own, calibration=made.law, controls=[made.control], **AGREED)
    assert (plain.verdict, beside.verdict, beside.exit_code) == ("honest", "honest", 0)
    assert beside.power > plain.power + 0.1
    assert (plain.noise.control, beside.noise.control.dtypes) == (None, ("bfloat16",))
    assert Noise.from_dict(beside.noise.as_dict()) == beside.noise
    path = tmp_path / "ledger.sqlite3"
    with Ledger(path) as ledger:
        ledger.record(beside, proof=made.proof.footer.sha256)
    assert audit_ledger(path).clean
    cheat = prove(cheats.rounded(made.node, 4), ROUND, range(96))
    assert verify(cheat, made.own, calibration=made.law, controls=[made.control], **AGREED).fraud


def test_where_three_formats_are_at_hand_a_nonce_is_computed_three_times(made):
    others = [made.control, made.own]
    plain, found = (
        verify(made.proof, made.node, calibration=made.law, controls=controls, **AGREED)
        for controls in ([], others)
    )
    assert (found.verdict, found.noise.control.dtypes) == ("honest", ("bfloat16", "float32"))
    # Kernels of CPUs differ: .72 on an Intel one, below .7 on others.
    assert found.noise.law.sd < 0.75 * plain.noise.law.sd
    own = [prove(model, ROUND, range(96), batch_size=32).records for model in (made.node, *others)]
    first, second, third = ([side[nonce] for nonce in found.nonces] for side in own)
    received = [made.proof.records[nonce] for nonce in found.nonces]
    control = found.noise.control
    node_EN = (
        np.stack([residuals(received, one) for one in (first, second, third)])
        / np.array(control.usual)[:, None]
    )
    between = [
        residuals(one, other) for one, other in ((first, second), (first, third), (second, third))
    ]
    between_PN = np.stack(between) / np.array(control.sizes)[:, None]
    first, coarse, exact = control.usual
    assert coarse > 2 * min(first, exact), "bfloat16 says only how hard a nonce is"
    mean = np.prod(np.maximum(node_EN[[0, 2]], 1 / 16), axis=0) ** (1 / 2)
    hard = np.prod(np.clip(between_PN, 1 / 16, 16) ** np.array(control.powers)[:, None], axis=0)
    wanted = control.usual[0] * mean / hard
    assert found.residuals == pytest.approx(wanted.tolist(), rel=0.1)
    cheat = prove(cheats.rounded(made.node, 4), ROUND, range(96))
    assert verify(cheat, made.node, calibration=made.law, controls=others, **AGREED).fraud


def test_to_copy_one_computation_excuses_little(made):
    control = _noise(made).control
    far = np.full(8, 1.0)
    typical = np.full((1, 8), control.sizes[0])
    copied, honest = ([one, far] for one in (np.zeros(8), np.full(8, control.usual[0])))
    np.testing.assert_allclose(
        control.scores(copied, typical), control.scores(honest, typical) / 4, rtol=1e-12
    )
    assert np.isnan(control.scores([np.full(8, np.nan), far], typical)).all(), (
        "what is missing stays missing"
    )


def test_a_coarser_computation_does_not_hide_how_far_off_a_node_is():
    sizes = (1e-3, 8e-3, 8e-3)
    powers = (0.5, 0.2, 0.0)
    control = Control(
        of="float16",
        dtypes=("float32", "bfloat16"),
        usual=(1.4e-3, 1e-3, 8e-3),
        sizes=sizes,
        powers=powers,
    )
    honest = np.array(control.usual)[:, None]
    between = np.array(sizes)[:, None]
    ratio = control.scores(honest * [[5.0], [5.0], [1.2]], between) / control.scores(
        honest, between
    )
    assert ratio == pytest.approx([5.0])


@pytest.mark.parametrize("control", [np.nan, np.inf, 0.0])
def test_nonces_on_which_the_own_machines_differ_without_bound_excuse_no_node(made, control):
    noise = _noise(made)
    rng = np.random.default_rng(0)
    honest = np.exp(0.3 * rng.normal(size=96))
    invented = rng.uniform(1.0, 2.0, 96)
    scores = noise.control.scores([invented, invented], [np.full(96, control)])
    assert sequential_test(noise).update(scores).verdict == "fraud"
    usual = np.outer(noise.control.usual, noise.size / noise.control.usual[0] * honest)
    few = noise.control.scores(
        usual, [np.where(np.arange(96) < 1, control, noise.control.sizes[0])]
    )
    assert np.isfinite(few).all()
    assert sequential_test(noise).update(few).verdict != "fraud", "nor do they accuse one"


def test_a_law_by_a_control_is_of_the_size_of_scores_in_every_block(made):
    noise = _noise(made)
    own = np.array([[0.01, 0.02], [0.03, 0.01]])
    between = np.array([[0.004, 0.03]])
    there = noise.scaled(1.2)
    found = noise.control.scores(own, between) / noise.size
    assert there.control.scores(1.2 * own, 1.2 * between) / there.size == pytest.approx(found)


def test_a_control_of_another_checkpoint_or_in_another_format_is_refused(made):
    with refuses(
        ProofMismatch, "a control of another checkpoint or in another format is refused"
    ) as refused:
        verify(
            made.proof,
            made.own,
            calibration=made.law,
            controls=[replace(made.control, digest="0" * 64)],
            **AGREED,
        )
    assert "checkpoint of the proof" in refused.value.wanted
    with refuses(
        CalibrationError, "a control of another checkpoint or in another format is refused, 2"
    ):
        verify(made.proof, made.own, calibration=made.law, controls=[made.own], **AGREED)


@pytest.fixture(scope="module")
def machines(made):
    """Honest proofs of two nodes, and of a validator in two formats."""
    rounds = [replace(ROUND, block_hash=f"calibration {block}") for block in range(2)]
    engines = [(made.node, 32), (made.node, 8), (made.own, 32), (made.control, 32)]
    return [
        prove(model, round, range(128), batch_size=size)
        for model, size in engines
        for round in rounds
    ]


def test_proofs_of_validators_in_another_format_give_a_law_of_scores(made, machines, tmp_path):
    beside = calibrate(*machines, controls=["bfloat16"])
    plain, *scored = beside.builds
    assert plain == calibrate(*machines[:6]).builds[0], (
        "the law without a control does not know of it"
    )
    build = next(one for one in scored if one.control.of == "float32")
    assert (build.control.dtypes, build.formats, len(build.machines)) == (
        ("bfloat16",),
        [["float16", "float32"]] * 2,
        3,
    )
    node, own, again = (
        [record for proof in some for record in proof.records]
        for some in (machines[:2], machines[4:6], machines[6:])
    )
    first = build.control.scores(
        [residuals(node, own), residuals(node, again)], [residuals(own, again)]
    )
    assert build.sizes.pairs[0, 2] == pytest.approx(np.median(first)), "as a verdict has them"
    beside.save(tmp_path / "law.json")
    law = Calibration.load(tmp_path / "law.json")
    assert law == beside
    # Twice as many nonces as elsewhere: a law of two blocks leaves some processors undecided.
    proof = prove(made.node, ROUND, range(192))
    found = verify(proof, made.own, calibration=law, controls=[made.control], **AGREED)
    assert (found.verdict, found.noise.control) == ("honest", build.control)
    assert verify(proof, made.own, calibration=law, **AGREED).noise.control is None
    cheat = prove(cheats.rounded(made.node, 4), ROUND, range(96))
    assert verify(cheat, made.own, calibration=law, controls=[made.control], **AGREED).fraud
    assert law.fixes_format(made.proof.header), "as without a control"
    assert law.control_of(made.proof.header, "float32") == ("bfloat16",)
    for change in ({"digest": "a" * 64}, {"preset": "another"}):
        elsewhere = Calibration(builds=(replace(build, **change),))
        with refuses(CalibrationError, "a control of another model or preset is refused"):
            elsewhere.control_of(made.proof.header, "float32")


def test_controls_that_no_validator_computed_are_refused(machines):
    elsewhere = replace(
        machines[-1].header, fingerprint=replace(machines[-1].header.fingerprint, device="another")
    )
    strangers = [*machines[:6], replace(machines[-1], header=elsewhere)]
    for proofs, controls in (
        (strangers, ["bfloat16"]),
        (machines[:6], ["bfloat16"]),
        (machines, ["bfloat16", "x", "y"]),
    ):
        with refuses(UsageError, "controls that no validator computed are refused"):
            calibrate(*proofs, controls=controls)
    with refuses(ProofMismatch, "controls that no validator computed are refused, 2"):
        calibrate(*machines, controls=["bfloat16", "float16", "float32"])
