"""Pulling from the services of nodes: what they have found since the last time, held against the
same pins.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from urllib.parse import parse_qs, urlsplit

import pytest

from assay.errors import UsageError
from assay.poc import NetworkPins
from assay.poc.net.refusals import Refusal
from assay.poc.service import ServiceSettings
from assay.poc.validator.registry import NodeEntry, Registry, Sender
from tests.end_to_end.receiver import Answering
from tests.poc.service.conftest import PREFIX, ROUND, rig, serving  # noqa: F401  # the last two are fixtures
from tests.poc.validator.conftest import body_of, nodes_text, pins_text, proof_of
from tests.waiting import until
from tests.wordings import refuses

READ_KEY = "read-key-of-the-node"


class Node(Answering):
    """The /status of a service that has found some nonces, and more of them later."""

    def __init__(self, proof) -> None:
        valid = [record for record in proof.records if proof.header.is_valid(record)]
        self.found = [(record.nonce, record.distance) for record in valid]
        round = proof.round
        names = ("block_hash", "block_height", "public_key", "node_id", "node_count", "seq_len")
        self.config = {name: getattr(round, name) for name in names} | {
            "group_id": 0,
            "n_groups": 1,
            "k_dim": 0,
        }
        self.r_target = round.r_target
        self.most = 1000
        self.asked = []
        self.answer = None
        self.spaces = 0  # before an answer, each in a chunk of its own
        super().__init__()

    def handle(self, handler) -> None:
        parts = urlsplit(handler.path)
        self.asked.append((parts.path, parse_qs(parts.query), handler.headers.get("Authorization")))
        status, body = self.found_after(parse_qs(parts.query))
        headers = {"Location": body.decode()} if status == 302 else {}
        if self.spaces:
            headers["Transfer_Encoding"] = "chunked"
            body = b"1\r\n \r\n" * self.spaces + b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
        self.respond(handler, status, body, **headers)

    def found_after(self, query: dict) -> tuple[int, bytes]:
        if self.answer is not None:
            return self.answer
        after = int(query.get("after", ["-1"])[0])
        found = [pair for pair in self.found if pair[0] > after][
            : min(self.most, int(query.get("limit", ["256"])[0]))
        ]
        values = {"config": self.config, "r_target": self.r_target, "state": "GENERATING"}
        values |= {"valid_nonces": [n for n, _ in found], "valid_distances": [d for _, d in found]}
        return 200, json.dumps(values).encode()


@pytest.fixture
def node(small_model) -> Iterator[Node]:
    with Node(proof_of(small_model, "node_A", range(60))) as made:
        yield made


@pytest.fixture
def polling(validating, node, tmp_path, monkeypatch) -> Callable:
    """A validator that polls the node, as if over https."""

    @contextmanager
    def run(*, proven: bool = True):
        monkeypatch.setattr(Sender, "is_proven", proven, raising=False)
        with validating(poll_interval=0.05, service={"allow_private_callbacks": True}) as running:
            text = nodes_text(("node_B", "node_C"))
            text += (
                f'[[nodes]]\npublic_key = "node_A"\nurl = "{node.url}"\nread_key = "{READ_KEY}"\n'
            )
            (tmp_path / "nodes.toml").write_text(text)
            running.controller.tend()
            yield running

    return run


def _outcomes(running) -> dict[str, float]:
    lines = running.client.get("/metrics").text.splitlines()
    return {line.split('"')[1]: float(line.split()[-1]) for line in lines if "polls_total{" in line}


def test_what_a_node_found_is_pulled_once_and_judged(polling, node):
    node.most = 7
    with polling() as running:
        until(lambda: running.node("node_A")["claimed"] == len(node.found))
        until(lambda: running.verdict("node_A") == "honest")
        until(lambda: _outcomes(running)["empty"] > 0)
        state = running.node("node_A")
        assert state["claimed"] == len(node.found)
        assert state["messages"] == -(-len(node.found) // 7)
    path, query, key = [each for each in node.asked if "after" in each[1]][
        -1
    ]  # the end may cut a poll in two
    assert (path, key) == (f"{PREFIX}/status", f"Bearer {READ_KEY}")
    assert query["after"] == [str(node.found[-1][0])]


def test_how_far_a_node_was_pulled_is_kept_while_its_block_is_open(polling, node):
    """It was kept for ever, a row for every machine and block."""
    with polling() as running:
        until(lambda: running.node("node_A")["claimed"] == len(node.found))
        inbox, block = running.controller.inbox, node.config["block_hash"]
        place = ("node_A", block, 0)
        until(lambda: _outcomes(running)["empty"] > 0)
        node.answer = 503, b""  # else it would be pulled again in between
        inbox.prune(-1, [block])
        assert inbox.pulled(*place) == node.found[-1][0]
        inbox.prune(-1)
        assert inbox.pulled(*place) == -1


def test_what_anyone_on_the_path_may_have_written_convicts_nobody(polling, node):
    node.found = [(nonce, 1.0 + nonce / 1000) for nonce, _ in node.found]  # invented
    with polling(proven=False) as running:
        until(lambda: _outcomes(running)["empty"] > 0)
        running.send(body_of(proof_of(running.model, "node_B")))
        until(
            lambda: (
                running.node("node_B")["checked"] >= 8 and not running.controller.inbox.waiting()
            )
        )
        assert running.node("node_A")["messages"] > 0
        assert (running.verdict("node_A"), running.node("node_A")["checked"]) == ("undecided", 0)


def test_a_restart_pulls_only_what_is_new(polling, node):
    everything = node.found
    node.found = node.found[:10]
    with polling() as running:
        until(lambda: running.node("node_A")["claimed"] == 10)
        running.restart()
        node.found = everything
        until(lambda: running.node("node_A")["claimed"] == len(everything))
        assert running.node("node_A")["messages"] == 2


@pytest.mark.parametrize(
    "change",
    [
        *({name: 1} for name in ("seq_len", "node_count", "node_id", "r_target", "block_height")),
        {"block_hash": "x"},
    ],
)
def test_a_node_that_says_something_else_than_the_pins_is_refused(polling, node, change):
    node.r_target = change.pop("r_target", node.r_target)
    node.config |= change
    with polling() as running:
        until(lambda: _outcomes(running)["refused"] > 0)
        assert running.node("node_A")["messages"] == 0


def test_another_keys_round_is_no_evidence_about_this_node(polling, node):
    node.config["public_key"] = "node_B"
    with polling() as running:
        until(lambda: _outcomes(running)["empty"] > 0)
        assert running.get("/status")["inbox"]["messages"] == 0


@pytest.mark.parametrize(
    "answer",
    [
        (500, b""),
        (302, b"http://127.0.0.1:1/"),
        (302, b"http://xn--a"),  # httpx raises an error that is none of its own
        (200, b"no JSON"),
        (200, b"x" * (2**20 + 1)),
        (200, b'{"config":{"node_id":[NaN]}}'),
    ],
)
def test_answers_that_cannot_be_used_are_bounded_and_counted(polling, node, answer):
    node.answer = answer
    with polling() as running:
        until(lambda: _outcomes(running)["failed"] + _outcomes(running)["refused"] > 1)
        assert running.get("/status")["inbox"]["messages"] == 0
        assert all(path == f"{PREFIX}/status" for path, *_ in node.asked)


@pytest.mark.parametrize(("spaces", "outcome"), [(900, "taken"), (2000, "failed")])
def test_an_answer_in_tiny_chunks_is_cut_off(polling, node, spaces, outcome):
    """Each takes the one loop of the validator as long as a request."""
    node.spaces = spaces
    with polling() as running:
        until(lambda: _outcomes(running)[outcome] > 0)
        assert outcome == "taken" or running.node("node_A")["messages"] == 0


def test_a_private_address_needs_permission(small_model, tmp_path):
    (tmp_path / "pins.toml").write_text(pins_text(small_model))
    network = NetworkPins.load(tmp_path / "pins.toml")
    for url in (
        "http://127.0.0.1:1",
        "http://10.0.0.1",
        "file:///etc/passwd",
        "http://user:password@example.com",
    ):
        with pytest.raises(Refusal):
            Registry(network, None, [NodeEntry(public_key="node_A", url=url)], ServiceSettings())


def test_nodes_that_publish_vectors_are_not_polled(small_model, tmp_path):
    """/status has no vectors, so nothing of such a node could be recomputed."""
    (tmp_path / "pins.toml").write_text(pins_text(small_model, preset="artifact"))
    entry = NodeEntry(public_key="node_A", url="https://example.com")
    with refuses(UsageError, "nodes that publish vectors are not polled"):
        Registry(NetworkPins.load(tmp_path / "pins.toml"), None, [entry], ServiceSettings())
