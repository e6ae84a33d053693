"""The verifier: who is believed, and what is refused."""

import json
import math
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest

from assay.errors import CalibrationError, ProofMismatch, UsageError
from assay.files.jsonl import dumps
from assay.poc import (
    Header,
    HFEngine,
    Noise,
    Pins,
    Proof,
    Record,
    Round,
    bundled_noise,
    calibrate,
    cheats,
    judging_batch,
    prove,
    verify,
)
from assay.poc.engines.hf.shapes import peak_bytes
from assay.poc.verdict import judge
from assay.poc.verdict.residuals import count_mismatches, published_rule, residuals
from assay.poc.verdict.sample_plan import plan_sample
from assay.stats import LogNoise, ScaleNoise, SequentialTest
from tests.laws import QWEN3
from tests.wordings import refuses


def test_the_same_engine_finds_no_residual(proof: Proof, small_model, round_: Round):
    verdict = verify(proof, small_model, expect=round_)
    assert verdict.honest
    assert verdict.exit_code == 0
    assert verdict.residuals == (0.0,) * 40
    assert verdict.count.mismatches == 0
    assert verdict.noise.source == "measured on the bundled models, float32/float32"


def test_a_sample_is_drawn_by_its_seed(proof: Proof, small_model):
    first, again, other = (verify(proof, small_model, sample=10, seed=seed) for seed in (1, 1, 2))
    assert first.nonces == again.nonces != other.nonces
    assert len(set(first.nonces)) == first.checked == 10
    unseeded = {verify(proof, small_model, sample=3).nonces for _ in range(4)}
    assert len(unseeded) > 1


def test_too_small_a_sample_is_undecided(proof: Proof, small_model):
    verdict = verify(proof, small_model, sample=1)
    assert verdict.verdict == "undecided"
    assert verdict.exit_code == 2
    assert "too few" in verdict.reason


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("sample", value) for value in (0, -3, 41, 2.5, True, "3")),
        *(("seed", value) for value in (-1, 1.5, "x")),
        *(("alpha", value) for value in (0.0, 1.0)),
        ("beta", 0.0),
    ],
)
def test_what_is_out_of_range_is_refused_before_the_work(
    name: str, value, proof: Proof, small_model
):
    def progress(done: int, total: int) -> None:
        raise AssertionError("nothing should be computed")

    with pytest.raises(UsageError, match=name):
        verify(proof, small_model, progress=progress, **{name: value})


def test_a_header_does_not_choose_the_validators_work(proof: Proof, small_model, monkeypatch):
    from assay.poc import verifier as _verifier

    monkeypatch.setattr(_verifier, "LARGEST_BATCH", 4)
    shapes = []
    real = _verifier.HFEngine
    monkeypatch.setattr(
        _verifier, "HFEngine", lambda *a, **k: shapes.append(k["batch_size"]) or real(*a, **k)
    )
    assert verify(proof, small_model).honest
    assert shapes == [4]


def test_a_header_does_not_keep_a_small_validator_from_a_verdict(
    proof: Proof, small_model, monkeypatch
):
    """With its batch of 1024 the validator had no room, and a cheat no verdict."""
    fingerprint = replace(proof.header.fingerprint, batch_size=1024)
    large = Proof.build(replace(proof.header, fingerprint=fingerprint), proof.records, 1.0)
    rows = peak_bytes(small_model, 1, proof.round.seq_len)
    monkeypatch.setattr("assay.poc.engines.hf.shapes.free_bytes", lambda device: 16 * rows)
    assert verify(large, small_model).honest


def test_a_validator_on_vllm_takes_the_batch_with_which_it_was_measured(proof: Proof):
    def by(engine: str, batch_size: int) -> Header:
        fingerprint = replace(proof.header.fingerprint, engine=engine, batch_size=batch_size)
        return replace(proof.header, fingerprint=fingerprint)

    far = [replace(one, distance=one.distance + (-1) ** one.nonce * 1e-5) for one in proof.records]
    node = by("hf", 8)
    law = calibrate(Proof.build(node, far, 1.0), Proof.build(by("vllm", 32), proof.records, 1.0))
    assert judging_batch(node, engine="vllm", calibration=law) == 32
    assert (
        judging_batch(node, engine="hf", calibration=law) == judging_batch(node, engine="vllm") == 8
    )
    judged = by(
        "vllm", 32
    )  # a batch of its own kind and size was measured too, but as the prover's
    law = calibrate(Proof.build(by("vllm", 8), far, 1.0), Proof.build(judged, proof.records, 1.0))
    assert judging_batch(judged, engine="vllm", calibration=law) == 8
    law = calibrate(
        Proof.build(node, far, 1.0), Proof.build(by("vllm", 10**12), proof.records, 1.0)
    )
    assert judging_batch(node, engine="vllm", calibration=law) == 1024
    with refuses(
        CalibrationError, "a validator on vllm takes the batch with which it was measured"
    ):
        judging_batch(
            replace(node, fingerprint=replace(node.fingerprint, device="another")), calibration=law
        )


def test_the_power_of_a_large_sample_is_not_simulated_nonce_by_nonce(monkeypatch):
    """A sample of 4096 took a core 19 seconds before anything was recomputed."""
    simulated = []
    accusations = SequentialTest.accusations

    def counted(test, values_RC):
        simulated.append(values_RC.shape[1])
        return accusations(test, values_RC)

    monkeypatch.setattr(SequentialTest, "accusations", counted)
    noise = Noise(ScaleNoise(1e-4, 4.0))
    assert plan_sample(noise, 4096, 4096, 1e-3, 1e-2) == (4096, 1.0)
    assert simulated == [1024]


def test_an_engine_for_another_length_is_refused_and_no_fraud_is_found(proof: Proof, small_model):
    with refuses(UsageError, "an engine for another length is refused and no fraud is found"):
        verify(proof, small_model, engine=HFEngine(small_model, batch_size=4, seq_len=8))


def test_a_preset_has_two_names_and_is_one(small_model):
    round = Round(block_hash="b", public_key="k", seq_len=16, preset="sign-flips")
    made = prove(small_model, round, range(32))
    assert verify(made, small_model, expect=round).honest
    assert Pins(preset="decode").differing(replace(round, preset="decode-256")) == ()
    assert Pins(preset="decode").differing(round) == ("preset",)


def of_another(model, round, nonces, **changed):
    return cheats.replayed(prove(model, replace(round, **changed), nonces), round)


CHEATS = {
    "int4": lambda model, round, nonces: prove(cheats.rounded(model), round, nonces),
    "one layer skipped": lambda model, round, nonces: prove(
        cheats.without_last_layers(model, 1), round, nonces
    ),
    "invented": lambda model, round, nonces: cheats.invented(prove(model, round, nonces)),
    "replayed": lambda *given: of_another(*given, public_key="other"),
    "replayed block": lambda *given: of_another(*given, block_hash="older"),
}


@pytest.mark.parametrize("name", CHEATS)
def test_cheaters_are_caught(name: str, reference_model):
    round = Round(block_hash="b", public_key="k", seq_len=64)
    claimed = CHEATS[name](reference_model, round, range(32))
    verdict = verify(claimed, reference_model, expect=round)
    assert verdict.fraud, verdict.reason
    assert verdict.exit_code == 1


def test_an_honest_node_in_another_dtype_passes(reference_model):
    from assay.models import load_model

    round = Round(block_hash="b", public_key="k", seq_len=64)
    wide = load_model(reference_model.reference, dtype="float32", device="cpu")
    for prover, validator in ((reference_model, wide), (wide, reference_model)):
        verdict = verify(prove(prover, round, range(32)), validator)
        assert verdict.honest, verdict.reason
        assert 0 < max(map(abs, verdict.residuals)) < 2e-3


def test_artifacts_are_verified_the_same_way(reference_model):
    round = Round(block_hash="b", public_key="k", seq_len=64, preset="artifact")
    honest = prove(reference_model, round, range(32))
    assert verify(honest, reference_model).honest
    cheat = prove(cheats.rounded(reference_model), round, range(32))
    verdict = verify(cheat, reference_model)
    assert verdict.fraud, verdict.reason
    assert verdict.count.mismatches > 20


def test_one_invented_value_among_honest_ones_shows(proof: Proof, small_model):
    records = list(proof.records)
    records[7] = Record(7, distance=proof.records[7].distance + 0.01)
    verdict = verify(Proof.build(proof.header, records, 1.0), small_model)
    assert verdict.sequential.gross == 1
    assert verdict.fraud, verdict.reason


def test_another_checkpoint_is_refused(proof: Proof, small_model):
    with refuses(ProofMismatch, "another checkpoint is refused"):
        verify(proof, replace(small_model, digest="0" * 64))
    with refuses(ProofMismatch, "another checkpoint is refused"):
        verify(proof, replace(small_model, weights="random-all"))


def stating(proof: Proof, dtype: str) -> Proof:
    """Records under a header that says they were made in another number format."""
    header = replace(proof.header, fingerprint=replace(proof.header.fingerprint, dtype=dtype))
    return Proof.build(header, proof.records, proof.footer.seconds)


TOLD = (("poc-2.0", "reference:qwen3"), ("hardened", "reference:llama"))
LIES = product(("poc-2.0", "artifact", "hardened"), ("reference:qwen3", "reference:llama"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("preset", "reference_model"),
    [pytest.param(*lie, marks=() if lie in TOLD else pytest.mark.soak) for lie in LIES],
    indirect=["reference_model"],
)
def test_a_node_does_not_choose_the_law_by_what_it_states(preset: str, reference_model):
    """int8 weights stand out in float16. A node that states bfloat16 has the wider law, if the
    verifier lets it.
    """
    from assay.models import load_model

    half, wide = (
        load_model(reference_model.reference, dtype=d, device="cpu") for d in ("float16", "float32")
    )
    round = Round(block_hash="b", public_key="k", seq_len=64, preset=preset)
    honest = prove(half, round, range(32))
    agreed = {
        "expect": Pins(prover_dtype="float16"),
        "seed": 1,
    }  # the order may decide the verdict of few nonces
    assert verify(honest, wide, **agreed).honest
    cheat = prove(cheats.rounded(half, 8), round, range(32))
    assert verify(cheat, wide, **agreed).fraud
    lie = stating(cheat, "bfloat16")
    assert not verify(lie, wide, expect=Pins(prover_dtype="bfloat16"), seed=1).fraud
    with refuses(ProofMismatch, "a node does not choose the law by what it states"):
        verify(lie, wide, **agreed)
    assert verify(
        stating(prove(reference_model, round, range(64)), "float16"), wide, **agreed
    ).fraud


def test_hardened_is_made_in_float16_unless_a_network_says_otherwise(
    proof: Proof, small_model, tmp_path: Path
):
    hardened = prove(small_model, replace(proof.round, preset="hardened"), range(64), batch_size=8)
    assert verify(hardened, small_model).honest  # float32 is as good
    assert verify(
        stating(proof, "bfloat16"), small_model
    ).honest  # the published presets name no format
    wider = stating(hardened, "bfloat16")
    with refuses(
        ProofMismatch, "hardened is made in float16 unless a network says otherwise"
    ) as refused:
        verify(wider, small_model)
    assert "wanted: one made in float16 or float32" in str(refused.value)
    assert refused.value.do.endswith("pin bfloat16")
    assert verify(wider, small_model, expect=Pins(prover_dtype="bfloat16")).honest
    measured = calibrate(wider, hardened)  # is of engines, and so of one format
    assert verify(wider, small_model, calibration=measured).honest
    several = measured.merged(calibrate(hardened, hardened))
    with refuses(ProofMismatch, "hardened is made in float16 unless a network says otherwise"):
        verify(wider, small_model, calibration=several)  # the prover would choose its law
    assert verify(
        wider, small_model, calibration=several, expect=Pins(prover_dtype="bfloat16")
    ).honest
    path = tmp_path / "hardened.jsonl"
    hardened.save(path)
    assert "number_formats" not in path.read_text()


def test_published_rule_is_kept_exactly():
    """Mismatch: received ≥ r_target or recomputed > r_target; a value equal to the target differs
    by side.
    """
    assert published_rule([1.0], [1.4], 1.4).mismatches == 0
    assert published_rule([1.4], [1.0], 1.4).mismatches == 1
    assert published_rule([1.0], [math.nextafter(1.4, 2)], 1.4).mismatches == 1
    assert published_rule([math.nan, 1.0, math.inf], [1.0, math.nan, 1.0], 1.4).mismatches == 3
    none = published_rule([], [], 1.4)
    assert (none.n, none.p_value, none.fraud) == (0, 1.0, False)
    # One mismatch of 20 has p = 0.00995, of 21 it is 0.01045: the published threshold lies between.
    assert published_rule([1.0] * 20, [2.0] + [1.0] * 19, 1.4).fraud
    assert not published_rule([1.0] * 21, [2.0] + [1.0] * 20, 1.4).fraud


def test_count_rule_of_vectors():
    clean = count_mismatches(np.array([0.0, 0.02, 0.001]))
    assert (clean.mismatches, clean.fraud) == (0, False)
    assert count_mismatches(np.array([0.0201, np.nan, np.inf, 0.0])).mismatches == 3
    assert count_mismatches(np.array([0.5] * 3 + [0.0] * 197)).fraud
    assert not count_mismatches(np.array([0.5] * 2 + [0.0] * 198)).fraud


def test_missing_and_non_finite_values_never_match(proof: Proof):
    received = [Record(0, distance=math.nan), Record(1, distance=math.inf)]
    recomputed = [Record(0, distance=1.4), Record(1, distance=1.4)]
    assert not np.isfinite(residuals(received, recomputed)).any()
    verdict = judge(proof, received, recomputed, Noise(ScaleNoise(1e-4), "test"))
    assert verdict.fraud
    assert verdict.sequential.gross == 2
    assert verdict.as_dict()["residuals"] == [None, None]
    vector = np.zeros(12, np.float16)
    odd = [
        Record(0, distance=1.4),
        Record(1, vector=vector[:5]),
        Record(2, vector=vector + np.float16(np.nan)),
    ]
    errors = residuals(odd, [Record(n, vector=vector) for n in range(3)])
    assert not np.isfinite(errors).any()
    assert count_mismatches(errors).mismatches == 3


def test_defaults_exist_for_every_pair_of_dtypes():
    for one in ("float32", "float16", "bfloat16"):
        for two in ("float32", "float16", "bfloat16"):
            assert isinstance(bundled_noise(QWEN3, "distance", one, two).law, ScaleNoise)
            assert isinstance(bundled_noise(QWEN3, "vector", one, two).law, LogNoise)
            assert bundled_noise(QWEN3, "distance", one, two) == bundled_noise(
                QWEN3, "distance", two, one
            )


def test_a_machine_that_is_wrong_at_fixed_places_is_faulty_and_not_a_fraud(small_model, round_):
    honest = prove(small_model, round_, range(128), batch_size=8)

    def shifted(places: set[int]) -> Proof:
        """The proof of a node whose distances are off at these places of every batch of eight."""
        records = [
            Record(r.nonce, distance=float(np.float32(r.distance + 2e-3))) if i % 8 in places else r
            for i, r in enumerate(honest.records)
        ]
        return Proof.build(honest.header, records, 1.0)

    verdict = verify(shifted({0, 1}), small_model, expect=round_, seed=1)
    assert (verdict.verdict, verdict.exit_code) == ("faulty", 2)
    assert (verdict.places.modulus, verdict.places.places) == (8, (0, 1))
    assert "position mod 8 in 0 to 1 (25% of the places)" in verdict.reason
    assert json.loads(dumps(verdict.as_dict()))["places"]["share"] == 0.25
    # A cheat does not become a fault by being worse at some places.
    everywhere = verify(shifted(set(range(8))), small_model, expect=round_, seed=1)
    assert (everywhere.verdict, everywhere.exit_code) == ("fraud", 1)
