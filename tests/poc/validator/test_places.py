"""A machine that is wrong at fixed places of its batches is faulty, and one that computes something else is not."""

import pytest

from tests.poc.validator.conftest import body_of, pins_text, proof_of
from tests.waiting import until


def _wrong_at(body: dict, places: range, batch: int) -> dict:
    """Distances of a node that are off where the position in its sequence falls on some places of the batch."""
    first = body["node_id"]
    wrong = [((nonce - first) // 3) % batch in places for nonce in body["nonces"]]
    return body | {"dist": [d - 0.004 * out for d, out in zip(body["dist"], wrong, strict=True)]}


@pytest.fixture
def pins(small_model) -> str:
    return pins_text(small_model).replace('batch_size = "*"', "batch_size = 8")


def test_wrong_places_are_a_fault_and_no_fraud(validating, small_model, pins):
    with validating(pins=pins) as running:
        running.send(_wrong_at(body_of(proof_of(small_model, "node_A", range(300))), range(2), 8))
        until(lambda: running.node("node_A")["recorded"] >= 64)
        node = running.node("node_A")
        assert node["verdict"] == "faulty"
        assert node["fault"].startswith("position mod 8 in 0")
        assert node["checked"] < node["recorded"]
        # A pass takes what the budget allows: which entry holds the nonces at bad places depends on the secret sample.
        entries = running.get(f"/evidence/{node['account']}")["entries"]
        assert {reason for entry in entries for _, reason in entry["excluded"]} == {"faulty place"}
        *_, change = running.get("/verdicts")["verdicts"]  # a first draw that meets no bad place may have been honest
        assert (change["verdict"], change["fault"]) == ("faulty", node["fault"])
        assert 'assay_validator_nodes{verdict="faulty"}' in running.client.get("/metrics").text


def test_a_share_of_lies_at_any_place_is_fraud(validating, small_model, pins):
    body = body_of(proof_of(small_model, "node_A", range(300)))
    lies = [d - 0.004 * (i * 2654435761 % 97 < 40) for i, d in enumerate(body["dist"])]
    with validating(pins=pins) as running:
        running.send(body | {"dist": lies})
        until(lambda: running.verdict("node_A") == "fraud")
        assert running.node("node_A")["fault"] is None


def test_a_short_message_is_judged_by_what_it_has(validating, small_model, pins):
    body = body_of(proof_of(small_model, "node_A", range(20)))
    with validating(pins=pins) as running:
        running.send(body | {"dist": [d - 0.004 for d in body["dist"]]})
        until(lambda: running.verdict("node_A") == "fraud")
        assert running.node("node_A")["recorded"] == len(body["nonces"])


def test_short_messages_do_not_hide_lies_at_half_of_the_places(validating, small_model, pins):
    """So few nonces show no fault of the place: what is set aside must not leave the other half to speak for all."""
    body = body_of(proof_of(small_model, "node_A", range(300)))
    of_parity = [[p for p in zip(body["nonces"], body["dist"], strict=True) if p[0] // 3 % 2 == odd] for odd in (0, 1)]
    with validating(pins=pins) as running:
        for start in range(0, 48, 8):
            found = sorted(pair for parity in of_parity for pair in parity[start : start + 8])
            lies = [[nonce, dist - 0.004 * (nonce // 3 % 2)] for nonce, dist in found]
            running.send(body | {"nonces": [nonce for nonce, _ in lies], "dist": [dist for _, dist in lies]})
        until(lambda: running.node("node_A")["recorded"] == 96, said=lambda: running.node("node_A"))
        node = running.node("node_A")
        entries = running.get(f"/evidence/{node['account']}")["entries"]
    assert {reason for entry in entries for _, reason in entry["excluded"]} == {"suspected place"}
    assert (node["verdict"], node["fault"], node["checked"]) == ("undecided", None, 48)
