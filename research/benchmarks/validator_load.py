"""Callbacks per second that a validator acknowledges durably.

A real ``assay poc validator`` on a small model takes signed callbacks of a thousand nodes over
loopback while it recomputes. Every answer comes after the message is on disk
(``synchronous=FULL``). Senders and validator share the machine; the processor time per callback is
that of the validator's process alone.

    python research/benchmarks/validator_load.py -o research/results/validator_load.json
"""

import asyncio
import gc
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import psutil
from _common import note, parser, publish, save_small_checkpoint
from standardwebhooks import Webhook

from tests.poc.validator.conftest import API, BLOCK, HEIGHT, NODE_COUNT, R_TARGET, secret_of
from tests.poc.validator.senders import ValidatorServer, dumps, keys_of, write_network

WANTED = 2000  # callbacks a second
LONGEST = 600  # seconds in which a round must be prepared, and again in which it must be answered


def made_up(key: str, place: int, number: int, nonces: int) -> dict[str, Any]:
    """A callback of a node with invented distances of nonces that it has not named before."""
    node_id = place % NODE_COUNT
    chosen = [node_id + NODE_COUNT * (number * nonces + i) for i in range(nonces)]
    distances = [1.40 + (nonce * 7919 % 1500) / 1e5 for nonce in chosen]
    shared = {"public_key": key, "block_hash": BLOCK, "block_height": HEIGHT, "node_id": node_id}
    return {**shared, "nonces": chosen, "dist": distances, "r_target": R_TARGET}


def request_of(body: str, id: str, key: str) -> bytes:
    """A whole HTTP request with the signature of a node."""
    now = datetime.now(UTC)
    content = body.encode()
    signature = Webhook(secret_of(key)).sign(id, now, body)
    head = (
        f"POST {API}/generated HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: "
        f"application/json\r\nUser-Agent: assay\r\n"
        f"Content-Length: {len(content)}\r\nwebhook-id: {id}\r\nwebhook-timestamp: "
        f"{int(now.timestamp())}\r\n"
        f"webhook-signature: {signature}\r\n\r\n"
    )
    return head.encode() + content


async def flood(
    port: int, requests: Sequence[bytes], connections: int
) -> tuple[Counter[int], list[float]]:
    """Send requests over some connections, each of which waits for its answer before it sends the
    next.

    Returns how often each status came, and the latencies.
    """
    statuses = Counter[int]()
    latencies = []
    waiting = iter(requests)

    async def client() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for request in waiting:
            begun = time.perf_counter()
            writer.write(request)
            statuses[await _status(reader)] += 1
            latencies.append(time.perf_counter() - begun)
        writer.close()

    await asyncio.gather(*(client() for _ in range(connections)))
    return statuses, latencies


async def _status(reader: asyncio.StreamReader) -> int:
    head = await reader.readuntil(b"\r\n\r\n")
    length = int(head.lower().partition(b"content-length:")[2].partition(b"\r\n")[0])
    await reader.readexactly(length)
    return int(head[9:12])


def sender(port, keys, first, count, nonces, connections, ready, go, results):
    """Make signed requests, wait for the others, and send them."""
    requests = []
    for i in range(count):
        place = (first + i) % len(keys)
        body = dumps(made_up(keys[place], place, (first + i) // len(keys), nonces))
        requests.append(request_of(body, f"msg_{first + i}", keys[place]))
    gc.collect()
    ready.release()
    go.wait()
    begun = time.process_time()
    statuses, latencies = asyncio.run(flood(port, requests, connections))
    results.put((statuses, latencies, time.process_time() - begun))


def measured(port, process, keys, chosen, first):
    """Send one round of callbacks from several processes; return the figures."""
    context = get_context("fork")
    ready = context.Semaphore(0)
    go = context.Event()
    results = context.Queue()
    per_sender = chosen.callbacks // chosen.senders
    children = [
        context.Process(
            target=sender,
            args=(
                port,
                keys,
                first + i * per_sender,
                per_sender,
                chosen.nonces,
                chosen.connections,
                ready,
                go,
                results,
            ),
            daemon=True,
        )
        for i in range(chosen.senders)
    ]
    for child in children:
        child.start()
    if not all(ready.acquire(timeout=LONGEST) for _ in children):
        raise TimeoutError(f"a sender was not ready in {LONGEST} s")
    before = process.cpu_times()
    begun = time.perf_counter()
    go.set()
    found = [results.get(timeout=LONGEST) for _ in children]  # a sender that died answers never
    seconds = time.perf_counter() - begun
    after = process.cpu_times()
    for child in children:
        child.join()
    statuses = sum((part for part, _, _ in found), Counter())
    latencies = sorted(latency for _, part, _ in found for latency in part)
    total = statuses.total()
    return {
        "callbacks": total,
        "statuses": {str(status): count for status, count in statuses.items()},
        "seconds": round(seconds, 2),
        "callbacks_per_second": round(total / seconds),
        "validator_user_microseconds": round((after.user - before.user) / total * 1e6),
        "validator_system_microseconds": round((after.system - before.system) / total * 1e6),
        "senders_microseconds": round(sum(used for _, _, used in found) / total * 1e6),
        "latency_milliseconds": {
            name: round(1e3 * latencies[int(share * (len(latencies) - 1))], 1)
            for name, share in (("median", 0.5), ("p99", 0.99), ("most", 1.0))
        },
    }


def main():
    options = parser(__doc__)
    options.add_argument("--nodes", type=int, default=1000)
    options.add_argument("--callbacks", type=int, default=20_000)
    options.add_argument("--nonces", type=int, default=50, help="nonces of a callback")
    options.add_argument("--senders", type=int, default=2, help="processes that send")
    options.add_argument("--connections", type=int, default=64, help="connections of each")
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--nonces-per-hour", type=int, default=36_000)
    chosen = options.parse_args()
    from assay.models import load_model

    with tempfile.TemporaryDirectory() as directory:
        checkpoint = Path(directory) / "small"
        save_small_checkpoint(checkpoint)
        keys = keys_of(chosen.nodes)
        model = load_model(checkpoint, dtype="float32", device="cpu")
        write_network(Path(directory), model, keys)
        server = ValidatorServer(
            Path(directory),
            "--nonces-per-hour",
            str(chosen.nonces_per_hour),
            model=checkpoint,
            fork=False,
        )
        server.start()
        try:
            server.wait_for()
            server.announce()
            process = psutil.Process(server.pid)
            rounds = []
            for turn in range(chosen.rounds):
                note(f"round {turn + 1} of {chosen.rounds}")
                rounds.append(measured(server.port, process, keys, chosen, turn * chosen.callbacks))
                rounds[-1]["resident_mebibytes"] = round(process.memory_info().rss / 2**20)
            time.sleep(2.0)  # figures of /status are up to a second old
            status = server.get(f"{API}/status")
            inbox = status["inbox"]
            server.terminate()
        finally:
            server.close()
    accepted = sum(part["callbacks"] for part in rounds)
    best = max(part["callbacks_per_second"] for part in rounds)
    figures = {
        "nodes": chosen.nodes,
        "nonces_per_callback": chosen.nonces,
        "senders": chosen.senders,
        "connections": chosen.senders * chosen.connections,
        "wanted_per_second": WANTED,
        "best_per_second": best,
        "acknowledged": accepted,
        "on_disk": inbox["messages"],
        "lost": accepted - inbox["messages"],
        "recomputed": status["recomputed"],
        "load_average": [round(value, 1) for value in psutil.getloadavg()],
        "rounds": rounds,
    }
    publish("validator_load", figures, chosen.output)
    refused = sum(
        count for part in rounds for code, count in part["statuses"].items() if code != "200"
    )
    return int(bool(refused or figures["lost"] or best < WANTED))


if __name__ == "__main__":
    sys.exit(main())
