"""The published surface, field for field, and a recorded session."""

import json

import pytest

from assay.poc.service.request_bodies import (
    ArtifactInit,
    GenerateRequest,
    InitRequest,
    ValidateRequest,
)
from tests.poc.service.conftest import BLOCK, ROUND
from tests.poc.service.session import PATH, replay
from tests.waiting import until

PUBLISHED = json.loads(PATH.with_name("published.json").read_text())
"""The fields of requests. The two flags have the library's defaults."""


def same(found, recorded) -> bool:
    """Compare two JSON values; another processor may round the last digits of a float otherwise."""
    if isinstance(recorded, dict):
        return found.keys() == recorded.keys() and all(
            same(found[name], recorded[name]) for name in recorded
        )
    if isinstance(recorded, list):
        return len(found) == len(recorded) and all(map(same, found, recorded))
    if isinstance(recorded, float):
        return found == pytest.approx(recorded, rel=1e-3, abs=1e-6)
    return type(found) is type(recorded) and found == recorded


def test_the_recorded_session_is_replayed(service):
    found = json.loads(json.dumps(replay(service)))
    recorded = json.loads(PATH.read_text())
    for ours, theirs in zip(found, recorded, strict=True):
        assert same(ours, theirs), (ours, theirs)


@pytest.mark.parametrize("model", [InitRequest, ArtifactInit, GenerateRequest, ValidateRequest])
def test_requests_have_the_published_fields_and_defaults(model):
    published = PUBLISHED[model.__name__]
    fields = model.model_fields
    assert {name for name, field in fields.items() if field.is_required()} == set(
        published["required"]
    )
    defaults = {name: field.default for name, field in fields.items() if not field.is_required()}
    assert published["defaults"].items() <= defaults.items()


def test_the_callback_of_a_round_has_the_published_fields(service):
    from tests.end_to_end.receiver import FlakyReceiver

    with FlakyReceiver(trouble=0) as receiver:
        service.post("/init/generate", ROUND | {"callback_url": receiver.url})
        until(lambda: receiver.taken)
        service.post("/phase/validate")
        service.post("/validate", BLOCK | {"nonces": [0, 1], "dist": [1.4, None], "node_id": 0})
        until(lambda: any(path == "/validated" for path, _, _ in receiver.requests))
        service.post("/stop")
        until(lambda: service.controller.outbox.counts()["pending"] == 0)
    bodies = {path: json.loads(body) for path, _, body in receiver.requests}
    fields = "public_key block_hash block_height node_id nonces dist r_target"
    assert bodies["/generated"].keys() == set(fields.split())
    assert set(bodies["/generated"]["dist"]) <= {
        d for d in bodies["/generated"]["dist"] if d < ROUND["r_target"]
    }
    fields = (
        "nonces computed_distances received_distances valid fraud_detected public_key block_hash "
        "block_height"
    )
    assert bodies["/validated"].keys() >= set(fields.split())
    assert bodies["/validated"]["received_distances"] == [1.4, None]
