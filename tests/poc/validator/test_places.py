"""A machine that is wrong at fixed places of its batches is faulty, and one that computes something
else is not.
"""

import random

import pytest

from tests.poc.validator.conftest import NODE_COUNT, body_of, pins_text, proof_of
from tests.waiting import until


def _wrong_at(body: dict, places: range, batch: int) -> dict:
    """Distances of a node that are off where the position in its sequence falls on some places of
    the batch.
    """
    first = body["node_id"]
    wrong = [((nonce - first) // 3) % batch in places for nonce in body["nonces"]]
    return body | {"dist": [d - 0.004 * out for d, out in zip(body["dist"], wrong, strict=True)]}


@pytest.fixture
def pins(small_model) -> str:
    return pins_text(small_model).replace('batch_size = "*"', "batch_size = 8")


def test_wrong_places_are_a_fault_and_no_fraud(validating, small_model, pins):
    with validating(pins=pins) as running:
        running.send(_wrong_at(body_of(proof_of(small_model, "node_A", range(300))), range(2), 8))
        running.send_lies("node_A", lambda body: _wrong_at(body, range(2), 8), range(300, 600))
        until(lambda: running.verdict("node_A") == "faulty", said=lambda: running.node("node_A"))
        node = running.node("node_A")
        assert node["fault"].startswith("position mod 8 in 0")
        *_, change = running.get("/verdicts")[
            "verdicts"
        ]  # a first draw that meets no bad place may have been honest
        entries = running.get(f"/evidence/{change['account']}")[
            "entries"
        ]  # further draws may have refined the fault
        found = next(
            entry["fault"] for entry in entries if entry["outcome"]["n"] == change["nonces"]
        )
        assert (change["verdict"], change["fault"]) == ("faulty", found)
        assert 'assay_validator_nodes{verdict="faulty"}' in running.client.get("/metrics").text


@pytest.mark.slow
def test_a_share_of_lies_at_any_place_is_fraud(validating, pins):
    # Drawn, for a rule of arithmetic may come close to a period of the batch.
    drawn = random.Random(0)

    def lying(body: dict) -> dict:
        return body | {"dist": [d - 0.004 * (drawn.random() < 0.4) for d in body["dist"]]}

    with validating(pins=pins) as running:
        running.send_lies("node_A", lying, range(300))
        until(lambda: running.verdict("node_A") == "fraud")
        assert running.node("node_A")["fault"] is None


def test_lies_in_one_block_are_no_fraud_yet(validating, small_model, pins):
    body = body_of(proof_of(small_model, "node_A", range(300)))
    with validating(pins=pins) as running:
        running.send(body | {"dist": [d - 0.004 for d in body["dist"]]})
        until(lambda: running.node("node_A")["recorded"] == len(body["nonces"]))
        assert running.verdict("node_A") == "undecided"
        assert running.node("node_A")["log_e_value"] > 100


@pytest.mark.slow
def test_short_messages_do_not_hide_a_fault_at_half_of_the_places(validating, small_model, pins):
    """So few nonces show no fault of the place each, but together they do."""
    body = body_of(proof_of(small_model, "node_A", range(600)))
    pairs = list(zip(body["nonces"], body["dist"], strict=True))
    with validating(pins=pins) as running:
        for start in range(0, 160, 16):
            lies = [
                [nonce, dist - 0.004 * (nonce // 3 % 2)]
                for nonce, dist in pairs[start : start + 16]
            ]
            running.send(
                body | {"nonces": [nonce for nonce, _ in lies], "dist": [dist for _, dist in lies]}
            )
        until(
            lambda: running.node("node_A")["recorded"] == 160, said=lambda: running.node("node_A")
        )
        node = running.node("node_A")
    assert (node["verdict"], node["fault"], node["checked"]) == (
        "faulty",
        "position mod 2 in 1",
        160,
    )


def test_nonce_0_of_the_last_machine_numbered_from_1_stops_nobody(validating, small_model, pins):
    """Its position before the first was refused by the ledger, in every pass anew."""
    numbered = pins.replace("node_id = 0", f"node_id = {NODE_COUNT}")
    first = body_of(proof_of(small_model, "node_A", range(40)))
    if first["nonces"][0] != 0:
        first |= {"nonces": [0, *first["nonces"]], "dist": [1.4, *first["dist"]]}
    with validating(pins=numbered) as running:
        running.send(first | {"node_id": NODE_COUNT})
        other = body_of(proof_of(small_model, "node_B", range(40)))
        running.send(other)
        for key, body in {"node_A": first, "node_B": other}.items():
            until(lambda key=key, body=body: running.node(key)["recorded"] == len(body["nonces"]))
