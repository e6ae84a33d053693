"""Verdicts: the residual test of a node's whole round, beside the published rule."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from assay import stats
from assay.errors import CalibrationError
from assay.poc import Calibration, bundled_noise
from assay.poc.service import ServiceSettings
from assay.poc.service.distance_judge import HonestNoise, check_calibration
from assay.poc.verdict import Ledger
from assay.poc.verdict.build_noise import BuildNoise, Sizes, describe_machines
from assay.poc.verdict.sample_plan import sequential_test
from assay.stats.noise_laws import Spread
from tests.laws import QWEN3
from tests.poc.service.conftest import BLOCK, PREFIX, ROUND
from tests.poc.service.test_pins import pins
from tests.waiting import until
from tests.wordings import refuses

CLAIM = BLOCK | {"node_id": 0}


def truth(service, nonces: int | list[int], key: str = "node_A") -> list[float]:
    """The distances that an honest node of this key has, computed beside the service."""
    round = replace(service.controller.progress.stored.round, public_key=key)
    chosen = range(nonces) if isinstance(nonces, int) else nonces
    batches = service.rig.deployment().compute(round.inputs(chosen), 4)
    return [record.distance for batch in batches for record in batch]


def ask(service, nonces: list[int], dist: list[float], key: str = "node_A") -> dict:
    return service.post("/validate", CLAIM | {"public_key": key, "nonces": nonces, "dist": dist})[
        "residual_test"
    ]


@pytest.fixture
def judging(service):
    service.post("/init/validate", ROUND)
    return service


def test_many_small_requests_decide_like_one_large_one(judging):
    right = truth(judging, 40)
    for start in range(0, 40, 8):
        parts = ask(judging, list(range(start, start + 8)), right[start : start + 8])
    judging.post("/init/validate", ROUND | {"public_key": "another validator"})
    whole = ask(judging, list(range(40)), right)
    assert whole["verdict"] == "honest"
    assert parts == whole


def test_asking_twice_proves_nothing(judging):
    right = truth(judging, 3)
    first = ask(judging, [0, 1, 2], right)
    assert first["verdict"] == "undecided"
    for _ in range(20):
        again = ask(judging, [2, 0, 1], right[2:] + right[:2])
    assert again == first


def test_other_computation_is_fraud_and_one_nodes_fraud_is_not_anothers(judging):
    wrong = [d + (0.002 if i % 2 else -0.002) for i, d in enumerate(truth(judging, 12, "cheat"))]
    assert ask(judging, list(range(12)), wrong, key="cheat")["verdict"] == "fraud"
    assert (
        ask(judging, list(range(12)), truth(judging, 12, "honest"), key="honest")["verdict"]
        == "honest"
    )


@pytest.mark.slow
@pytest.mark.parametrize("share", [{}, {"node_id": 1, "node_count": 8}])
def test_a_machine_that_is_wrong_at_fixed_places_is_faulty_and_neither_honest_nor_fraud(
    serving, tmp_path, share
):
    """In the reply, on the page's summary and in the ledger alike, by places of its own sequence."""
    path = tmp_path / "ledger.sqlite3"
    with serving(ledger=path) as service:
        service.post("/init/validate", ROUND | {"node_id": 0, "node_count": 1} | share)
        step = share.get("node_count", 1)
        nonces = list(range(share.get("node_id", 0), 160 * step, step))
        right = dict(zip(nonces, truth(service, nonces), strict=True))
        # The first two rows of every batch of 16, on this machine.
        claimed = [right[n] + (0.002 if n // step % 16 < 2 else 0.0) for n in nonces]
        body = {**CLAIM, **share, "public_key": "node_A"}
        body.pop("node_count", None)
        for part in (slice(0, 100), slice(100, 160)):
            sent = {"nonces": nonces[part], "dist": claimed[part]}
            reply = service.post("/validate", body | sent)["residual_test"]
        assert (reply["verdict"], reply["fault"]) == ("faulty", "position mod 16 in 0 to 1")
        shown = service.controller.judge.last()[0]
        assert (shown["verdict"], shown["fault"]) == ("faulty", reply["fault"])
        with Ledger(path, read_only=True) as ledger:
            (standing,) = ledger.standings()
        assert (standing.verdict, standing.fault) == ("faulty", reply["fault"])
        service.restart()
        sent = {"nonces": nonces[:1], "dist": claimed[:1]}
        assert service.post("/validate", body | sent)["residual_test"] == reply


def test_lies_at_fixed_places_and_elsewhere_are_fraud(judging):
    right = truth(judging, 160)
    wrong = [d + (0.002 if n % 16 < 2 or n % 5 == 0 else 0.0) for n, d in enumerate(right)]
    assert ask(judging, list(range(160)), wrong)["verdict"] == "fraud"


def test_evidence_survives_a_restart(judging):
    right = truth(judging, 30)
    ask(judging, list(range(15)), right[:15])
    judging.restart()
    after = ask(judging, list(range(15, 30)), right[15:])
    whole = (
        sequential_test(bundled_noise(QWEN3, "distance", "float32", "float32"))
        .update([0.0] * 30)
        .result
    )
    assert (after["checked"], after["log_evidence_honest"]) == (30, whole.log_evidence_honest)


@pytest.mark.parametrize(
    ("preset", "verdict"), [("poc-2.0", "honest"), ("permutation", "undecided")]
)
def test_the_calibration_that_the_pins_name_is_used(serving, rig, tmp_path, preset, verdict):
    """Measured noise of another preset is not replaced by the stated default, under which this node
    is a fraud.
    """
    digest = rig.deployment().digest
    build = replace(calibration(rig, digest).builds[0], preset=preset)
    Calibration(builds=(build,)).save(tmp_path / "noise.json")
    with serving(pins=pins(digest=digest, measured=tmp_path / "noise.json")) as service:
        service.post("/init/validate", ROUND)
        noisy = [d + (4e-4 if i % 2 else -4e-4) for i, d in enumerate(truth(service, 30))]
        assert ask(service, list(range(30)), noisy)["verdict"] == verdict


@pytest.mark.parametrize("digest", ["1" * 64, None])
def test_a_calibration_of_another_model_is_refused(rig, digest):
    with refuses(CalibrationError, "a calibration of another model is refused"):
        check_calibration(calibration(rig, digest), rig.deployment())
    check_calibration(calibration(rig, "0" * 64), rig.deployment())


def noise_of(
    fingerprint, digest: str | None, sigma: float, effective_dimension: float | None = None
) -> BuildNoise:
    """The measured noise of a build."""
    law = stats.ScaleNoise(sigma=sigma)
    exact = Spread()
    about = {"output": "distance", "preset": "poc-2.0", "digest": digest, "n": 100}
    measured = {
        "law": law,
        "sizes": Sizes({(0, 1): law.size}, ("", "")),
        "spread": exact,
        "known": exact,
    }
    about["effective_dimension"] = effective_dimension
    return BuildNoise(**about, machines=describe_machines([fingerprint, fingerprint]), **measured)


def calibration(rig, digest: str | None, effective_dimension: float | None = None) -> Calibration:
    fingerprint = rig.deployment().engine(4, 4).fingerprint
    return Calibration(builds=(noise_of(fingerprint, digest, 5e-4, effective_dimension),))


def test_an_empty_request_is_no_fraud(judging):
    answer = judging.post("/validate", CLAIM | {"nonces": [], "dist": []})
    assert (answer["n_invalid"], answer["probability_honest"], answer["fraud_detected"]) == (
        0,
        -1.0,
        False,
    )
    assert answer["computed_distances"] == []


def test_verdicts_are_in_the_snapshot(judging):
    ask(judging, [0, 1], [1.4, 1.4])
    until(lambda: judging.client.get(f"{PREFIX}/snapshot").json()["verdicts"])
    (verdict,) = judging.client.get(f"{PREFIX}/snapshot").json()["verdicts"]
    fields = "time public_key block_hash n n_invalid probability_honest fraud_detected verdict"
    assert list(verdict) == fields.split()
    assert verdict["public_key"] == "node_A"


def test_an_engine_that_fails_is_not_the_clients_fault(judging):
    judging.rig.fail = RuntimeError("the device is gone")
    body = CLAIM | {"nonces": [0], "dist": [1.4]}
    assert "device is gone" in judging.post("/validate", body, status=503)["detail"]
    judging.rig.fail = None
    judging.post("/validate", body)


def test_a_round_that_ends_ends_its_validations(judging):
    judging.rig.open.clear()
    judging.rig.entered.clear()
    with ThreadPoolExecutor() as pool:
        sent = pool.submit(
            judging.post, "/validate", CLAIM | {"nonces": list(range(20)), "dist": [1.4] * 20}, 409
        )
        assert judging.rig.entered.wait(10)
        judging.post("/stop")
        judging.rig.open.set()
    assert sent.result()["state"] == "STOPPED"
    assert judging.rig.batches == 1  # cancelled between two batches


def test_the_calibration_of_another_format_is_not_taken(proof, small_model):
    """A file may hold builds of several formats; the first one is not that of every service."""
    known = proof.header.fingerprint
    sigmas = {"float16": 0.02, "float32": 0.001}
    builds = [
        noise_of(replace(known, dtype=dtype), small_model.digest, sigma)
        for dtype, sigma in sigmas.items()
    ]
    noise = HonestNoise(ServiceSettings(calibration=Calibration(builds=tuple(builds))))
    for dtype, sigma in sigmas.items():
        found = noise.of(
            proof.header.pipeline,
            replace(known, dtype=dtype),
            small_model.digest,
            proof.header.round,
        )
        assert found.law.sigma == pytest.approx(sigma, rel=0.5)
    other = replace(known, dtype="bfloat16")
    assert noise.of(proof.header.pipeline, other, small_model.digest, proof.header.round) is None
