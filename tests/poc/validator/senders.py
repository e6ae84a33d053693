"""Many nodes at once: signed requests, made beforehand, and clients that send them as fast as they are answered."""

import asyncio
import json
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from standardwebhooks import Webhook

from tests.end_to_end.server import Server
from tests.poc.validator.conftest import API, BLOCK, HEIGHT, NODE_COUNT, R_TARGET, nodes_text, pins_text, secret_of


class ValidatorServer(Server):
    """A real ``assay poc validator`` in a process of its own."""

    def __init__(self, directory: Path, *arguments: str, model: str | Path, fork: bool = True) -> None:
        super().__init__(directory, model=model, fork=fork)
        pins, nodes = directory / "pins.toml", directory / "nodes.toml"
        self.arguments = [
            *("poc", "validator", "--model", str(model), "--port", str(self.port), "--data-dir", str(self.data_dir)),
            *("--pins", str(pins), "--nodes", str(nodes), "--log-format", "json", *arguments),
        ]

    def announce(self, block: str = BLOCK, height: int = HEIGHT) -> None:
        status, answer = self.call("POST", f"{API}/blocks", {"block_hash": block, "block_height": height})
        assert status == 200, answer


def keys_of(count: int) -> list[str]:
    return [f"node_{i:04d}" for i in range(count)]


def write_network(directory: Path, model: Any, keys: Sequence[str], **round: Any) -> None:
    """Write pins and secrets of some nodes."""
    (directory / "pins.toml").write_text(pins_text(model, keys=keys, **round))
    (directory / "nodes.toml").write_text(nodes_text(keys))


def made_up(key: str, place: int, number: int, nonces: int, block: str = BLOCK) -> dict[str, Any]:
    """A callback of a node with invented distances of nonces that it has not named before."""
    node_id = place % NODE_COUNT
    chosen = [node_id + NODE_COUNT * (number * nonces + i) for i in range(nonces)]
    distances = [1.40 + (nonce * 7919 % 1500) / 1e5 for nonce in chosen]
    shared = {"public_key": key, "block_hash": block, "block_height": HEIGHT, "node_id": node_id}
    return {**shared, "nonces": chosen, "dist": distances, "r_target": R_TARGET}


def request_of(body: str, id: str, key: str, *, path: str = "generated") -> bytes:
    """A whole HTTP request with the signature of a node."""
    now = datetime.now(UTC)
    content = body.encode()
    signature = Webhook(secret_of(key)).sign(id, now, body)
    head = (
        f"POST {API}/{path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nUser-Agent: assay\r\n"
        f"Content-Length: {len(content)}\r\nwebhook-id: {id}\r\nwebhook-timestamp: {int(now.timestamp())}\r\n"
        f"webhook-signature: {signature}\r\n\r\n"
    )
    return head.encode() + content


@dataclass
class Sent:
    """What became of requests."""

    seconds: float = 0.0
    statuses: Counter = field(default_factory=Counter)
    latencies: list[float] = field(default_factory=list)

    def quantile(self, share: float) -> float:
        ordered = sorted(self.latencies)
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


async def flood(port: int, requests: Sequence[bytes], connections: int) -> Sent:
    """Send requests over some connections, each of which waits for its answer before it sends the next."""
    sent, waiting = Sent(), iter(requests)
    started = time.perf_counter()

    async def client() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for request in waiting:
            begun = time.perf_counter()
            writer.write(request)
            sent.statuses[await _status(reader)] += 1
            sent.latencies.append(time.perf_counter() - begun)
        writer.close()

    await asyncio.gather(*(client() for _ in range(connections)))
    sent.seconds = time.perf_counter() - started
    return sent


async def _status(reader: asyncio.StreamReader) -> int:
    head = await reader.readuntil(b"\r\n\r\n")
    length = int(head.lower().partition(b"content-length:")[2].partition(b"\r\n")[0])
    await reader.readexactly(length)
    return int(head[9:12])


def dumps(body: dict[str, Any]) -> str:
    return json.dumps(body, separators=(",", ":"))
