"""The kill loop: a service that dies again and again, a receiver that misbehaves, and what must
hold afterwards.
"""

import random
import sqlite3
import time
from pathlib import Path
from typing import Any

from assay.poc.service.outbox import open_outbox
from tests.end_to_end.receiver import FlakyReceiver
from tests.end_to_end.server import Server
from tests.waiting import until

BLOCK = {"block_hash": "block_alpha", "block_height": 7, "public_key": "node_A", "r_target": 1.416}
SHAPE = {"node_id": 1, "node_count": 3, "batch_size": 4, "seq_len": 4}
QUICK = (
    *("--callback-interval", "0.05", "--callback-timeout", "0.5", "--callback-attempts", "1000"),
    *("--callback-backoff", "0.02", "--callback-backoff-max", "0.2", "--max-pending", "20"),
)


def kill_loop(
    directory: Path, model: Path, *, kills: int, seed: int, longest: float = 1.0
) -> dict[str, Any]:
    """Kill a generating service ``kills`` times, then let it deliver what it owes, and count."""
    rng = random.Random(seed)
    receiver = FlakyReceiver(trouble=0.5, patience=0.5, seed=seed)
    server = Server(directory, *QUICK, model=model)
    began = time.monotonic()
    starts = 0.0
    try:
        server.start()
        server.wait_for()
        server.post("/init/generate", BLOCK | SHAPE | {"callback_url": receiver.url})
        for _ in range(kills):
            # Some kills come while the service starts, most while it generates.
            if rng.random() < 0.8:
                _wait_for_progress(server)
            time.sleep(rng.uniform(0.0, longest))
            server.kill()
            server.start()
            start = time.monotonic()
            server.wait_for("/health")
            starts += time.monotonic() - start
        server.wait_for()
        _wait_for_progress(server)
        server.post("/stop")
        receiver.trouble = 0.2
        _drain(server)
        assert server.terminate() == 0, server.log.read_text()[-2000:]
    finally:
        server.close()
        receiver.close()
    return _count(
        server.data_dir / "service.sqlite3",
        receiver,
        kills,
        time.monotonic() - began,
        starts / kills,
    )


def _wait_for_progress(server: Server) -> None:
    server.wait_for()
    before = server.status()["total_checked"]
    until(
        lambda: server.status()["total_checked"] != before,
        60,
        said=lambda: server.log.read_text()[-2000:],
    )


def _drain(server: Server) -> None:
    """Wait until nothing is owed. Asks the database: a snapshot of the service may be older than
    the last batch.
    """
    with open_outbox(server.data_dir) as outbox:
        said = lambda: server.log.read_text()[-2000:]  # noqa: E731
        until(lambda: not outbox.counts()["pending"], 120, pause=0.2, said=said)


def _count(
    path: Path, receiver: FlakyReceiver, kills: int, seconds: float, start_seconds: float
) -> dict[str, Any]:
    with sqlite3.connect(path) as database:
        assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        rows = database.execute(
            "SELECT nonce, distance, valid FROM records ORDER BY nonce"
        ).fetchall()
        states = dict(
            database.execute("SELECT status, count(*) FROM outbox GROUP BY status").fetchall()
        )
        next_nonce, checked = database.execute("SELECT next_nonce, checked FROM rounds").fetchone()
    database.close()
    nonces = [row[0] for row in rows]
    wanted = list(range(SHAPE["node_id"], next_nonce, SHAPE["node_count"]))
    assert checked == len(rows)
    valid = {nonce: distance for nonce, distance, is_valid in rows if is_valid}
    received = receiver.nonces()
    assert receiver.distances().items() <= valid.items()
    return {
        "kills": kills,
        "seconds": round(seconds, 1),
        "start_seconds": round(start_seconds, 2),
        "records": len(nonces),
        "lost_records": len(set(wanted) - set(nonces)),
        "repeated_records": len(nonces) - len(set(nonces)) + len(set(nonces) - set(wanted)),
        "valid": len(valid),
        "callbacks": len(receiver.taken),
        "sent_more_than_once": sum(count > 1 for count in receiver.copies.values()),
        "undelivered_nonces": len(set(valid) - set(received)),
        "nonces_in_two_callbacks": len(received) - len(set(received)),
        "callbacks_that_changed": len(receiver.changed),
        "dead_letters": states.get("dead", 0),
        "receiver": dict(receiver.moods),
    }
