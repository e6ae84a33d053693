"""Every value that a node may lie about, in a callback and in the header of a proof: refused, by
its name.
"""

import json
import re
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from threading import Event

import pytest

from assay.poc import Proof, get_pipeline
from assay.poc.net.signatures import Signatures
from assay.poc.protocol.records import describe_packing
from tests.poc.service.conftest import signed
from tests.poc.validator.conftest import (
    API,
    BLOCK,
    HEIGHT,
    KEYS,
    NODE_COUNT,
    R_TARGET,
    Running,
    body_of,
    nodes_text,
    pins_text,
    proof_of,
    secret_of,
)

HONEST = {
    "public_key": "node_A",
    "block_hash": BLOCK,
    "block_height": HEIGHT,
    "node_id": 0,
    "r_target": R_TARGET,
}
HONEST |= {"nonces": [0, 3, 6], "dist": [1.41, 1.40, 1.39]}
VECTORS = {name: HONEST[name] for name in ("public_key", "block_hash", "block_height", "node_id")}
VECTORS |= {
    "artifacts": [{"nonce": 0, "vector_b64": "A" * 32}],
    "encoding": {"dtype": "f16", "endian": "le", "k_dim": 12},
}


@pytest.fixture(scope="module")
def running(small_model, tmp_path_factory):
    """One validator for all lies: none of them leaves a trace."""
    directory = tmp_path_factory.mktemp("lies")
    (directory / "pins.toml").write_text(pins_text(small_model))
    (directory / "nodes.toml").write_text(nodes_text())
    made = Running(small_model, directory, {"positions": 1000}, {})
    made.announce()
    yield made
    made.close()


@pytest.fixture(scope="module")
def honest(small_model) -> Proof:
    return proof_of(small_model, "node_A")


def text_of(proof: Proof, directory) -> str:
    proof.save(directory / "proof.jsonl", overwrite=True)
    return (directory / "proof.jsonl").read_text()


LIES = {
    "block_hash": ("another", 7),
    "block_height": ("7", None),
    "node_id": (1, NODE_COUNT, "0", True),
    "r_target": (2.0, None),
    "nonces": (
        *([0, 3, 5], [1, 4, 7], [3, 0, 6], [0, 0, 3], [0, 3, 6.0], [0, 3, True], [0, 3, 2**53]),
        [0, 3, 3 * 1000],  # so far out that seeds could be chosen to collide
    ),
    "dist": ([1.41, 1.40], *([1.41, 1.40, wrong] for wrong in (R_TARGET, -0.1, None, "1.39"))),
}


@pytest.mark.parametrize(
    ("change", "name"),
    [
        *(({name: value}, name) for name, values in LIES.items() for value in values),
        ({"block_height": HEIGHT + 1}, "block_hash"),
        ({"nonces": 5}, "dist"),
        *(
            ({"nonces": [3 * i for i in range(n)], "dist": [1.4] * n}, "nonces")
            for n in (0, 2**16 + 1)
        ),
    ],
)
def test_a_callback_that_lies_is_refused_by_name(running, change, name):
    answer = running.send(HONEST | change, status=422)
    assert answer["fields"] == [name]
    assert {"detail", "wanted", "do"} <= answer.keys()


def test_vectors_where_distances_are_pinned_are_another_preset(running):
    assert running.send(VECTORS, status=422)["fields"] == ["preset"]


def test_vectors_that_are_not_as_published_are_refused_by_name(validating):
    encodings = (None, *(VECTORS["encoding"] | wrong for wrong in ({"k_dim": 1}, {"dtype": "f32"})))
    artifacts = (
        "x",
        [7],
        [{"nonce": 0}],
        *([{"nonce": 0, "vector_b64": text}] for text in ("AAAA", 12, "é" * 32)),
    )
    with validating(preset="artifact") as running:
        for name, values in (("encoding", encodings), ("artifacts", artifacts)):
            for value in values:
                assert running.send(VECTORS | {name: value}, status=422)["fields"] == [name], value
        foreign = VECTORS | {"artifacts": [{"nonce": 1, "vector_b64": "A" * 32}]}
        assert running.send(foreign, status=422)["fields"] == ["nonces"]
        assert running.send(HONEST, status=422)["fields"] == ["preset"]
        assert running.send(VECTORS)["new"] is True


@pytest.mark.parametrize(
    "body",
    [
        '{"public_key":"node_A","dist":[NaN]}',
        '{"public_key":"node_A","dist":[1e400]}',
        '{"public_key":"node_A","public_key":"node_B"}',
        '{"public_key":"node_A","a":' + "[" * 40_000 + "]" * 40_000 + "}",
        r'{"public_key":"\ud800"}',
        "[]",
        "",
    ],
)
def test_poisoned_bodies_are_refused(running, body):
    assert running.send(body, key="node_A", status=400)["fields"] == ["body"]


def test_strangers_and_forgeries_are_refused(running):
    assert running.send(HONEST | {"public_key": "stranger"}, status=403)["fields"] == ["public_key"]
    assert running.send(HONEST | {"public_key": 7}, key="node_A", status=403)["fields"] == [
        "public_key"
    ]
    running.send(HONEST, key="node_B", status=401)  # one node's work under the key of another one
    running.send(HONEST, key="node_A", id="x" * 200, status=400)
    text = json.dumps(HONEST)
    late = str(int((datetime.now(UTC) - timedelta(minutes=6)).timestamp()))
    good = signed(secret_of("node_A"), text, "m")
    changes = [("id", "n"), ("timestamp", late), ("signature", "v1,!!!"), ("signature", "nonsense")]
    for wrong in ({}, *(good | {f"webhook-{name}": value} for name, value in changes)):
        answer = running.client.post(f"{API}/generated", content=text, headers=wrong)
        assert answer.status_code in (400, 401), wrong
    assert (
        running.client.post(f"{API}/generated", content=text + " ", headers=good).status_code == 401
    )
    skewed = running.client.post(
        f"{API}/generated", content=text, headers=good | {"webhook-timestamp": late}
    )
    assert re.search(r"signed 36\d s ago", skewed.json()["detail"]), skewed.text
    assert "NTP" in skewed.json()["do"]


@pytest.mark.parametrize("unknown", ["v1", "v1,a,b", "v1a,AAAA", "v2,é", "v1,é", "v1,!!!", "v1,A"])
def test_forms_of_a_signature_that_are_not_known_are_passed_over(unknown):
    headers = signed(secret_of("node_A"), "{}")
    headers["webhook-signature"] = f"{unknown} {headers['webhook-signature']}"
    Signatures([secret_of("node_A")]).check("{}", headers)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"block_hash": "another"}, "block_hash"),
        ({"block_height": 8}, "block_hash"),
        ({"node_id": 1}, "node_id"),
        *(
            ({"preset": preset}, "preset")
            for preset in ("end-normalize", "layer-normalize", "permutation", "artifact")
        ),
        *(({"seq_len": seq_len}, "seq_len") for seq_len in (1, 4)),
        ({"strength": 256}, "strength"),
        ({"r_target": 2.0}, "r_target"),
        ({"node_count": 1, "node_id": 0}, "node_count"),
    ],
)
def test_a_proof_of_another_round_is_refused_by_name(running, small_model, tmp_path, change, name):
    """The work of these proofs was done, and it is less, or another node's, or was chosen."""
    proof = proof_of(
        small_model,
        "node_A",
        **({"block": change["block_hash"]} if "block_hash" in change else change),
    )
    answer = running.send(text_of(proof, tmp_path), key="node_A", path="proofs", status=422)
    assert answer["fields"] == [name], answer


def test_a_header_that_states_another_engine_or_checkpoint_is_refused_by_name(
    running, honest, tmp_path
):
    header = honest.header
    for change, name in (
        ({"digest": "0" * 64}, "digest"),
        ({"weights": "random-all"}, "weights"),
        ({"fingerprint": replace(header.fingerprint, dtype="bfloat16")}, "prover_dtype"),
        ({"fingerprint": replace(header.fingerprint, dtype="float8")}, "prover_dtype"),
        ({"fingerprint": replace(header.fingerprint, engine="vllm")}, "builds"),
    ):
        text = text_of(Proof.build(replace(header, **change), honest.records, 1.0), tmp_path)
        assert running.send(text, key="node_A", path="proofs", status=422)["fields"] == [name]


def test_few_or_chosen_nonces_are_refused_by_name(running, honest, tmp_path):
    for runs in (((0, 12, 3),), ((0, 60, 3), (90, 150, 3)), ((0, 240, 6),)):
        kept = [nonce for run in runs for nonce in range(*run)]
        records = [replace(honest.records[0], nonce=nonce) for nonce in kept]
        text = text_of(Proof.build(replace(honest.header, nonces=runs), records, 1.0), tmp_path)
        answer = running.send(text, key="node_A", path="proofs", status=422)
        assert answer["fields"] == ["fewest_nonces"], (runs, answer)


def test_a_node_of_the_nodes_file_alone_sends_proofs_as_well(validating, small_model, tmp_path):
    """Its callbacks were taken, and its proofs refused as those of an unknown key."""
    with validating() as running:
        (tmp_path / "nodes.toml").write_text(nodes_text((*KEYS, "node_D")))
        running.controller.tend()
        proof = proof_of(small_model, "node_D")
        running.send(body_of(proof))
        running.send(text_of(proof, tmp_path), key="node_D", path="proofs")


def test_another_nodes_proof_is_refused(running, small_model, tmp_path):
    text = text_of(proof_of(small_model, "node_B"), tmp_path)
    running.send(text, key="node_A", path="proofs", status=401)
    text = text_of(proof_of(small_model, "stranger"), tmp_path)
    assert running.send(text, key="node_A", path="proofs", status=403)["fields"] == ["public_key"]


def test_a_proof_is_no_nearer_to_chosen_seeds_than_a_callback(running, small_model, tmp_path):
    """Many of eight nonces each, chosen far out, saved one pass of every eight."""
    text = text_of(proof_of(small_model, "node_A", range(993, 1001)), tmp_path)
    answer = running.send(text, key="node_A", path="proofs", status=422)
    assert answer["fields"] == ["nonces"]


def test_points_have_32_bit_seeds_whatever_the_pins_say(validating, small_model):
    pins = pins_text(small_model, preset="chain-decode", strength=256)
    points = [0] * (1 + get_pipeline("chain-decode").steps)
    with validating(pins=pins, positions=10) as running:
        body = VECTORS | {"encoding": describe_packing(get_pipeline("chain-decode"))}
        for nonce, status in ((27, 200), (30, 422)):
            artifact = {"nonce": nonce, "vector_b64": "", "k_points_steps": points}
            running.send(body | {"artifacts": [artifact]}, status=status)


@pytest.mark.parametrize("preset", ["hardened", "poc-2.0"])
def test_far_nonces_are_taken_where_seeds_cannot_collide(validating, small_model, preset):
    pins = pins_text(small_model, preset=preset, strength=256)
    with validating(pins=pins, positions=10) as running:
        pipeline = get_pipeline(preset)
        body = VECTORS | {"artifacts": [{"nonce": 3 * 10**9, "vector_b64": "A" * 86 + "=="}]}
        body["encoding"] = body["encoding"] | {"k_dim": 32}
        running.send(
            body if pipeline.output == "vector" else HONEST | {"nonces": [0, 3, 3 * 10**9]}
        )


def test_nothing_of_the_lies_was_kept(running, small_model):
    assert running.get("/status")["inbox"]["messages"] == 0
    text = running.client.get("/metrics").text
    counts = {
        line.split("{")[1].split('"')[1]: float(line.split()[-1])
        for line in text.splitlines()
        if "refused_total{" in line
    }
    for name in (
        "nonces",
        "seq_len",
        "preset",
        "digest",
        "prover_dtype",
        "builds",
        "public_key",
        "signature",
        "body",
    ):
        assert counts[name] > 0, name
    running.send(body_of(proof_of(small_model, "node_A")))


def test_closed_blocks_are_refused(validating):
    with validating(open_blocks=2) as running:
        for odd in (
            "",
            "a\u2028b",
            "\u202e",
            "x" * 1025,
        ):  # no round could have them, and messages would be dropped
            body = {"block_hash": odd, "block_height": 8}
            assert running.client.post(f"{API}/blocks", json=body).status_code == 422
        running.announce("b2", 8)
        again = running.client.post(f"{API}/blocks", json={"block_hash": "b2", "block_height": 9})
        assert again.status_code == 409
        assert "height 8" in again.json()["wanted"]
        running.send(HONEST | {"block_hash": "b2", "block_height": 8})
        running.announce("b3", 9)
        assert running.send(HONEST, status=422)["fields"] == ["block_hash"]
        assert [block["block_hash"] for block in running.get("/blocks")["blocks"]] == ["b3", "b2"]


def test_blocks_that_are_announced_at_once_are_both_open(running, monkeypatch):
    """The first read the blocks before the second was there, and put them in place after it."""
    inbox = running.controller.inbox
    read = inbox.blocks
    between = Event()

    def read_slowly(limit):
        blocks = read(limit)
        if "block_a" in blocks and "block_b" not in blocks:
            between.set()
            time.sleep(0.3)
        return blocks

    monkeypatch.setattr(inbox, "blocks", read_slowly)
    with ThreadPoolExecutor() as threads:
        threads.submit(running.announce, "block_a", 20)
        assert between.wait(30)
        running.announce("block_b", 21)
    assert {"block_a", "block_b"} <= running.controller.open_blocks.keys()


def test_a_block_of_the_pins_is_the_only_one(validating, small_model):
    pins = pins_text(small_model, block_hash="pinned", block_height=3)
    with validating(pins=pins) as running:
        assert running.send(HONEST, status=422)["fields"] == ["block_hash"]
        running.send(HONEST | {"block_hash": "pinned", "block_height": 3})
        answer = running.client.post(f"{API}/blocks", json={"block_hash": "b", "block_height": 1})
        assert (answer.status_code, "leave block_hash out" in answer.json()["do"]) == (422, True)
