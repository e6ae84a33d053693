"""The chain's client, written anew from its fields: what it sends, and what it makes of answers.

It announces no content type, takes every status below 400 for a success, asks for the status before
it begins a round, and gives a participant up after 25 tries.
"""

import http.client
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote, urlsplit

PATH = "/api/v1/inference/pow"
TRIES = 25
LEVELS = {"dist_threshold": 0.4, "p_mismatch": 0.1, "p_value_threshold": 0.05}


class Failed(Exception):
    """An answer that the client takes for a failure."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(f"{status}: {text}")
        self.status = status


def callback_url(base: str, model: str) -> str:
    """Return the URL of a model's callbacks, whose name is escaped twice."""
    return f"{base}/v2/poc-batches/{quote(quote(model, safe=''), safe='')}"


@dataclass
class Node:
    """A machine as the chain's client knows it: an address, and its number from 1."""

    url: str
    number: int
    calls: list[tuple[str, int]] = field(default_factory=list)

    def call(self, method: str, path: str, body: object = None) -> dict[str, Any]:
        """Return the reply to a call; Failed where the status is 400 or more."""
        connection = http.client.HTTPConnection(urlsplit(self.url).netloc, timeout=60)
        try:
            sent = None if body is None else json.dumps(body).encode()
            connection.request(method, PATH + path, body=sent, headers={"User-Agent": "client"})
            answer = connection.getresponse()
            text = answer.read().decode()
        finally:
            connection.close()
        self.calls.append((path, answer.status))
        if answer.status >= 400:
            raise Failed(answer.status, text)
        return json.loads(text)

    def status(self) -> str:
        """Return the state that the client reads."""
        return self.call("GET", "/status")["status"]

    def stop(self) -> None:
        """Stop generating; the client sends an empty object."""
        self.call("POST", "/stop", {})


@dataclass(frozen=True)
class Stage:
    """A round of the chain."""

    block_hash: str
    height: int
    model: str
    seq_len: int
    callbacks: str

    def shared(self, key: str) -> dict[str, Any]:
        """Return the fields that every request of the stage has."""
        params = {"model": self.model, "seq_len": self.seq_len}
        block = {"block_hash": self.block_hash, "block_height": self.height, "public_key": key}
        return block | {"params": params, "url": callback_url(self.callbacks, self.model)}


def start(node: Node, stage: Stage, key: str, count: int) -> bool:
    """Begin a stage on a machine as the broker does; return whether a round was begun."""
    with suppress(Failed):  # a status that fails is logged, and the round begun
        if node.status() == "GENERATING":
            return False
    body = stage.shared(key) | {"node_id": node.number, "node_count": count}
    node.call("POST", "/init/generate", body)
    return True


class Validator:
    """Sends samples of participants to machines of its own in turn, and counts its votes."""

    def __init__(
        self,
        nodes: Sequence[Node],
        stage: Stage,
        pause: Callable[[], object],
        rule: Mapping[str, float] = LEVELS,
    ) -> None:
        self._nodes = nodes
        self._rule = dict(rule)
        self._stage = stage
        self._pause = pause
        self._turn = 0
        self.reported: list[str] = []

    def begin(self) -> None:
        """Stop generating on every machine; a failure is logged and no more."""
        for node in self._nodes:
            with suppress(Failed, OSError):
                node.stop()

    def check(self, key: str, artifacts: Sequence[dict[str, Any]]) -> bool:
        """Send artifacts of a participant; report it where no machine takes them."""
        body = self._stage.shared(key) | {
            "node_count": len(self._nodes),
            "nonces": [artifact["nonce"] for artifact in artifacts],
            "validation": {"artifacts": list(artifacts)},
            "stat_test": self._rule,
        }
        for _ in range(TRIES):
            node = self._nodes[self._turn % len(self._nodes)]
            self._turn += 1
            try:
                node.call("POST", "/generate", body | {"node_id": node.number})
            except (Failed, OSError):
                self._pause()
            else:
                return True
        self.reported.append(key)
        return False

    def vote(self, verdict: dict[str, Any]) -> int:
        """Take the callback of a verdict: the weight of the vote, below 1 for a fraud."""
        weight = -1 if verdict["fraud_detected"] or verdict["n_total"] <= 0 else verdict["n_total"]
        if weight <= 0:
            self.reported.append(verdict["public_key"])
        return weight
