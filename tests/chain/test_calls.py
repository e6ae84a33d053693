"""Every recorded call, with the status and the fields of the chain's own servers."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.chain.client import LEVELS, PATH, callback_url
from tests.chain.mlnode import PUBLISHED
from tests.chain.services import Participant
from tests.poc.service.conftest import rig, serving  # noqa: F401
from tests.usual import usual
from tests.waiting import until

CALLS = json.loads(Path(__file__).with_name("calls.json").read_text())
SHARED = {
    "block_hash": "B7",
    "block_height": 7,
    "public_key": "02ab",
    "node_id": "$number",
    "node_count": "$count",
    "params": {"model": "fake", "seq_len": 4},
}
OF_MLNODE = {"batch_size": 32, "poc_stronger_rng": False}
"""What MLNode adds to a request, with a null for what the client left out."""
GATEWAYS = {"node": (PATH, None), "server": (PUBLISHED, "gonka"), "both": (PATH, "gonka")}
MODEL = "organisation/a model"


def filled(value: Any, values: dict[str, Any]) -> Any:
    """Return a recorded value with its placeholders replaced."""
    if isinstance(value, dict):
        return {name: filled(item, values) for name, item in value.items()}
    if isinstance(value, list):
        return [filled(item, values) for item in value]
    return values.get(value, value) if isinstance(value, str) else value


def matches(reply: Any, recorded: Any) -> bool:
    """Compare a reply with a recorded one, in which the name of a type stands for any value."""
    if isinstance(recorded, dict):
        return reply.keys() == recorded.keys() and all(
            matches(reply[name], recorded[name]) for name in recorded
        )
    if isinstance(recorded, list):
        return len(reply) == len(recorded) and all(map(matches, reply, recorded))
    return recorded in (type(reply).__name__, reply)


def send(client: Any, prefix: str, call: dict[str, Any], values: dict[str, Any]) -> Any:
    """Return the answer to a recorded call: as MLNode passes it on, or as the client sends it."""
    if call["method"] == "GET":
        return client.get(prefix + call["path"])
    body = call["raw"] if "raw" in call else SHARED | call["body"]
    headers = {}
    if prefix == PUBLISHED:
        headers["Content-Type"] = "application/json"
        if "raw" not in call:
            body = OF_MLNODE | body | {"params": {"k_dim": 12} | body["params"]}
            body = {"url": None} | body
    content = json.dumps(filled(body, values)).encode()
    return client.post(prefix + call["path"], content=content, headers=headers)


@pytest.mark.parametrize("gateway", GATEWAYS)
@pytest.mark.parametrize("place", usual([(1, 1), (1, 2), (2, 2), (8, 8), (3, 2)], (1, 2), (2, 2)))
def test_every_call_is_answered_as_by_the_servers_of_the_chain(serving, gateway, place):  # noqa: F811
    number, count = place
    prefix, compatibility = GATEWAYS[gateway]
    form = "server" if prefix == PUBLISHED else "node"
    with Participant() as participant, serving(compatibility=compatibility) as service:
        url = callback_url(participant.url, MODEL)
        values: dict[str, Any] = {"$number": number, "$count": count, "$url": url}
        for call in CALLS:
            answer = send(service.client, prefix, call, values)
            assert answer.status_code == call["status"], (call["name"], answer.text)
            reply = answer.json()
            recorded = filled(call[form], values)
            if answer.status_code == 200:
                for name in call.get("added", ()):
                    reply.pop(name)
            else:  # a refusal says what to do as well
                reply = {name: reply[name] for name in recorded}
            assert matches(reply, recorded), (call["name"], reply)
            if "artifacts" in reply:
                values["$artifacts"] = reply["artifacts"]
            if call["name"] == "begin":
                until(lambda: participant.artifacts["B7", number])
        until(lambda: participant.verdicts)
        service.client.post(f"{prefix}/stop")
    # The share of a number from 1, and the path with every escape as it was sent.
    nonces = sorted(participant.artifacts["B7", number])
    assert nonces[:3] == [number, number + count, number + 2 * count]
    escaped = "/v2/poc-batches/organisation%252Fa%2520model"
    assert participant.paths == {f"{escaped}/generated", f"{escaped}/validated"}
    (verdict,) = participant.verdicts
    told = {"request_id", "block_hash", "block_height", "public_key", "node_id"}
    told |= {"n_total", "n_mismatch", "mismatch_nonces", "p_value", "fraud_detected"}
    assert verdict.keys() == told
    assert (verdict["node_id"], verdict["fraud_detected"]) == (number, False)


def test_nonces_of_all_groups_of_a_machine_are_checked_together(service_of_chain):
    groups = []
    for group in range(3):
        body = share(1, 2) | {"group_id": group, "n_groups": 3, "block_hash": f"B{group}"}
        service_of_chain.client.post(f"{PUBLISHED}/init/generate", json=body).raise_for_status()
        until(lambda: service_of_chain.checked_nonces())
        service_of_chain.client.post(f"{PUBLISHED}/stop")
        groups.append(service_of_chain.checked_nonces()[:2])
    assert groups == [[1, 7], [3, 9], [5, 11]]
    nonces = [nonce for group in groups for nonce in group]
    made = service_of_chain.client.post(
        f"{PUBLISHED}/generate", json=share(1, 2) | {"nonces": nonces, "wait": True}
    ).json()["artifacts"]
    check = {"nonces": nonces, "wait": True, "validation": {"artifacts": made}}
    reply = service_of_chain.client.post(f"{PUBLISHED}/generate", json=share(2, 5) | check).json()
    assert (reply["n_total"], reply["n_mismatch"]) == (6, 0)


@pytest.mark.parametrize(
    ("sent", "level"),
    [
        ({}, (0.01, "fraud_threshold")),
        ({"fraud_threshold": 0.02}, (0.02, "fraud_threshold")),
        ({"p_value_threshold": 0.05}, (0.05, "p_value_threshold")),
        ({"p_value_threshold": 0.05, "fraud_threshold": 0.02}, (0.05, "p_value_threshold")),
    ],
)
@pytest.mark.parametrize("compatibility", ["gonka", None])
def test_both_names_of_the_level_are_read_and_the_reply_says_which(
    serving,  # noqa: F811
    compatibility,
    sent,
    level,
):
    wrong = [{"nonce": nonce, "vector_b64": "A" * 32} for nonce in range(40)]
    honest = 37
    with serving(compatibility=compatibility) as service:
        shared = share(0, 1) | {"nonces": list(range(40)), "wait": True}
        made = service.post("/generate", shared)["artifacts"]
        mixed = made[:honest] + wrong[honest:]
        rule = LEVELS | {"p_mismatch": 0.02} | sent
        if "p_value_threshold" not in sent:
            del rule["p_value_threshold"]
        body = shared | {"validation": {"artifacts": mixed}, "stat_test": rule}
        reply = service.post("/generate", body)
    assert (reply["level"], reply["level_field"]) == level
    assert reply["n_mismatch"] == 3
    assert 0.02 < reply["p_value"] < 0.05
    assert reply["fraud_detected"] == (level[0] == 0.05)


def test_a_validation_has_no_share_in_the_published_form_either(serving):  # noqa: F811
    with serving() as service:
        made = service.post("/generate", share(0, 1) | {"nonces": [0, 1, 2], "wait": True})
        check = {"nonces": [0, 1, 2], "validation": {"artifacts": made["artifacts"]}}
        reply = service.post("/generate", share(1, 2) | check | {"wait": True})
        assert (reply["n_total"], reply["n_mismatch"]) == (3, 0)
        service.post("/generate", share(1, 2) | {"nonces": [0, 1, 2]}, status=422)


def test_a_served_name_is_a_name_of_the_model(serving):  # noqa: F811
    names = ("organisation/model", "short")
    with serving(served_model_names=names) as service:
        for prefix in (PATH, PUBLISHED):
            for name in (*names, "fake"):
                params = {"params": SHARED["params"] | {"model": name}}
                body = share(1, 1) | params | {"nonces": [1], "wait": True}
                assert service.client.post(f"{prefix}/generate", json=body).status_code == 200
        refused = share(1, 1) | {"params": SHARED["params"] | {"model": "short2"}, "nonces": [1]}
        service.post("/generate", refused, status=409)


def test_a_prefill_request_may_name_the_fields_of_the_other_scheme(serving):  # noqa: F811
    plain = {"decode": False, "max_tokens": 256, "route_window": 256, "scheme": "prefill"}
    with serving() as service:
        body = share(1, 1) | {"nonces": [1], "params": SHARED["params"] | plain}
        service.post("/generate", body)


def test_one_client_may_fill_the_whole_queue_where_the_operator_says_that_it_is_alone(serving):  # noqa: F811
    keys = ("first-" + "x" * 20,)
    header = {"Authorization": f"Bearer {keys[0]}"}
    dead = "http://127.0.0.1:9/v2"
    limits = {"validate_keys": keys, "max_queued_nonces": 20, "max_pending_jobs": 1}
    with serving(compatibility="gonka", **limits) as service:
        service.rig.open.clear()
        artifacts = [{"nonce": nonce, "vector_b64": ""} for nonce in range(5)]
        body = share(1, 1) | {"nonces": list(range(5)), "url": dead}
        body |= {"validation": {"artifacts": artifacts}}
        answers = [
            service.client.post(f"{PUBLISHED}/generate", json=body, headers=header).status_code
            for _ in range(5)
        ]
        service.rig.open.set()
    assert answers == [200] * 4 + [429]


def share(number: int, count: int) -> dict[str, Any]:
    """Return the shared fields of the requests of a machine."""
    return filled(SHARED, {"$number": number, "$count": count})


@pytest.fixture
def service_of_chain(serving):  # noqa: F811
    with serving(compatibility="gonka") as service:

        def checked_nonces() -> list[int]:
            stored = service.controller.progress.stored
            found = service.controller.rounds.recent_valid(stored.id, after=-1, limit=50)
            return [nonce for nonce, _ in found]

        service.checked_nonces = checked_nonces
        yield service
