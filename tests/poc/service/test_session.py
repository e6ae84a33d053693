"""The published surface, field for field, and a recorded session."""

import json

import pytest

from assay.poc.service.bodies import ArtifactInit, GenerateRequest, InitRequest, ValidateRequest
from tests.poc.service.conftest import ARTIFACTS, BLOCK, PREFIX, ROUND
from tests.poc.service.session import PATH, replay
from tests.waiting import until

# The fields of requests with their defaults; ... is required. The two flags have the library's defaults.
PUBLISHED_INIT = {
    "block_hash": ...,
    "block_height": ...,
    "public_key": ...,
    "r_target": ...,
    "fraud_threshold": 0.01,
    "node_id": -1,
    "node_count": -1,
    "batch_size": 32,
    "seq_len": 256,
    "callback_url": None,
    "use_layer_hooks": False,
    "use_sign_flips": True,
}
PUBLISHED_ARTIFACT_INIT = {
    **dict.fromkeys(("block_hash", "block_height", "public_key", "node_id", "node_count", "params"), ...),
    "group_id": 0,
    "n_groups": 1,
    "batch_size": 32,
    "url": None,
    "poc_stronger_rng": False,
}
PUBLISHED_GENERATE = {
    **dict.fromkeys(("block_hash", "block_height", "public_key", "node_id", "node_count", "nonces", "params"), ...),
    "batch_size": 32,
    "wait": False,
    "url": None,
    "validation": None,
    "stat_test": None,
    "poc_stronger_rng": False,
}
PUBLISHED_VALIDATE = dict.fromkeys(("public_key", "block_hash", "block_height", "nonces", "dist", "node_id"), ...)
STATUS = {
    "state",
    "valid_nonces",
    "valid_distances",
    "total_checked",
    "total_valid",
    "elapsed_seconds",
    "rate_per_second",
}


def same(found, recorded) -> bool:
    """Compare two JSON values; another processor may round the last digits of a float otherwise."""
    if isinstance(recorded, dict):
        return found.keys() == recorded.keys() and all(same(found[name], recorded[name]) for name in recorded)
    if isinstance(recorded, list):
        return len(found) == len(recorded) and all(map(same, found, recorded))
    if isinstance(recorded, float):
        return found == pytest.approx(recorded, rel=1e-3, abs=1e-6)
    return type(found) is type(recorded) and found == recorded


def test_the_recorded_session_is_replayed(service):
    found, recorded = json.loads(json.dumps(replay(service))), json.loads(PATH.read_text())
    for ours, theirs in zip(found, recorded, strict=True):
        assert same(ours, theirs), (ours, theirs)


@pytest.mark.parametrize(
    ("model", "published"),
    [
        (InitRequest, PUBLISHED_INIT),
        (ArtifactInit, PUBLISHED_ARTIFACT_INIT),
        (GenerateRequest, PUBLISHED_GENERATE),
        (ValidateRequest, PUBLISHED_VALIDATE),
    ],
)
def test_requests_have_the_published_fields_and_defaults(model, published):
    fields = {name: ... if field.is_required() else field.default for name, field in model.model_fields.items()}
    assert published.items() <= fields.items()
    assert ... not in [fields[name] for name in fields.keys() - published.keys()]


def test_responses_have_the_published_fields(service):
    assert service.status().keys() >= STATUS
    for path, body in (("/init", ROUND), ("/init/generate", ROUND), ("/phase/validate", None)):
        answer = service.post(path, body)
        assert answer["status"] == "OK"
        assert answer["pow_status"].keys() >= STATUS | {"r_target"}
    verdict = service.post("/validate", BLOCK | {"nonces": [0], "dist": [1.4], "node_id": 0})
    assert verdict["status"] == "OK"
    assert isinstance(verdict["fraud_detected"], bool)
    assert len(verdict["computed_distances"]) == 1
    assert service.post("/stop")["pow_status"]["state"] == "STOPPED"


def test_the_artifact_form_of_the_status(service):
    status = service.status()
    assert (status["status"], status["config"], status["stats"]) == ("IDLE", None, None)
    service.post("/init/generate", ARTIFACTS)
    until(lambda: service.status()["stats"]["total_processed"] > 0)
    status = service.status()
    assert status["status"] == "GENERATING"
    names = "block_hash block_height public_key node_id node_count group_id n_groups seq_len k_dim"
    assert list(status["config"]) == names.split()
    assert status["stats"].keys() == {"total_processed", "nonces_per_second"}
    assert service.post("/init/generate", ARTIFACTS, status=409)["state"] == "GENERATING"


def test_the_callback_of_a_round_has_the_published_fields(service):
    from tests.end_to_end.receiver import FlakyReceiver

    receiver = FlakyReceiver(trouble=0)
    try:
        service.post("/init/generate", ROUND | {"callback_url": receiver.url})
        until(lambda: receiver.taken)
        service.post("/phase/validate")
        service.post("/validate", BLOCK | {"nonces": [0, 1], "dist": [1.4, None], "node_id": 0})
        until(lambda: any(path == "/validated" for path, _, _ in receiver.requests))
        service.post("/stop")
        until(lambda: service.controller.outbox.counts()["pending"] == 0)
    finally:
        receiver.close()
    bodies = {path: json.loads(body) for path, _, body in receiver.requests}
    fields = "public_key block_hash block_height node_id nonces dist r_target"
    assert bodies["/generated"].keys() == set(fields.split())
    assert set(bodies["/generated"]["dist"]) <= {d for d in bodies["/generated"]["dist"] if d < ROUND["r_target"]}
    fields = "nonces computed_distances received_distances valid fraud_detected public_key block_hash block_height"
    assert bodies["/validated"].keys() >= set(fields.split())
    assert bodies["/validated"]["received_distances"] == [1.4, None]


def test_pulling_gives_every_valid_nonce_once(service):
    service.post("/init/generate", ROUND)
    until(lambda: service.status()["total_valid"] > 40)
    service.post("/stop")
    pulled, after = [], -1
    while True:
        page = service.client.get(f"{PREFIX}/status", params={"after": after, "limit": 7}).json()["valid_nonces"]
        if not page:
            break
        pulled += page
        after = page[-1]
    assert len(pulled) == len(set(pulled)) == service.status()["total_valid"]
