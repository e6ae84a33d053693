"""The kill loop of a validator: it and its senders die again and again, and what must hold
afterwards.
"""

import json
import random
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from assay.poc import Input, Round
from assay.poc.net.deployment import Deployment
from assay.poc.protocol.records import is_valid
from assay.poc.validator.recomputer import recompute
from assay.poc.verdict import Ledger
from tests.poc.validator.conftest import BLOCKS, NODE_COUNT, R_TARGET, SEQ_LEN, secret_of
from tests.poc.validator.senders import ValidatorServer, dumps, keys_of, write_network
from tests.waiting import until

SENDER = Path(__file__).with_name("sender_process.py")
LIARS = 20  # of which one lies: every twentieth node


MUST_BE_ZERO = (
    "lost_messages",
    "messages_kept_twice",
    "evidence_lost",
    "evidence_counted_twice",
    "draws_left_open",
    "honest_accused",
)


def write_messages(
    directory: Path, model: Any, keys: Sequence[str], *, each: int, nonces: int, senders: int
) -> int:
    """Write the messages of every sender: callbacks of honest nodes, and of some that lie; return
    how many.
    """
    deployment = Deployment.of(model, compiled=False)
    shared = {"node_count": NODE_COUNT, "seq_len": SEQ_LEN, "r_target": R_TARGET}
    files = [(directory / f"messages_{i}.jsonl").open("w") for i in range(senders)]
    total = 0
    blocks = list(BLOCKS.items())
    for place, key in enumerate(keys):
        lie = 0.003 if place % LIARS == 0 else 0.0
        own = {"public_key": key, "node_id": place % NODE_COUNT}
        rounds = [
            Round(block_hash=block, block_height=height, **own, **shared)
            for block, height in blocks
        ]
        parts = [
            list(rounds[0].nonces(number * nonces, (number + 1) * nonces)) for number in range(each)
        ]
        wanted = [(rounds[number % len(rounds)], part) for number, part in enumerate(parts)]
        inputs = [Input(round, nonce) for round, part in wanted for nonce in part]
        computed = iter(recompute(deployment, 64, inputs))
        for number, part in enumerate(parts):
            records = [next(computed) for _ in part]
            distances = [
                (nonce, r.distance) for nonce, r in zip(parts[number], records, strict=True)
            ]
            valid = [(nonce, d - lie) for nonce, d in distances if is_valid(d, R_TARGET)]
            if not valid:
                continue
            block, height = blocks[number % len(blocks)]
            body = own | {"block_hash": block, "block_height": height, "r_target": R_TARGET}
            body |= {"nonces": [n for n, _ in valid], "dist": [d for _, d in valid]}
            message = {"id": f"msg_{place}_{number}", "secret": secret_of(key), "body": dumps(body)}
            files[place % senders].write(json.dumps(message) + "\n")
            total += 1
    for file in files:
        file.close()
    return total


class Senders:
    """Processes that send the messages of a directory, and can be killed and started again."""

    def __init__(self, directory: Path, port: int, count: int, pause: float) -> None:
        self._directory = directory
        self._port = port
        self._pause = pause
        self._started = 0
        self.processes = [self._start(i) for i in range(count)]

    def _start(self, number: int) -> subprocess.Popen:
        self._started += 1
        paths = (
            self._directory / f"messages_{number}.jsonl",
            self._directory / f"acknowledged_{number}",
        )
        arguments = (self._port, *paths, self._started, self._pause)
        command = [sys.executable, "-S", str(SENDER), *map(str, arguments)]
        with (self._directory / "senders.log").open("ab") as log:
            return subprocess.Popen(command, stdout=log, stderr=log)

    def kill(self, number: int) -> None:
        process = self.processes[number]
        assert process.poll() is None, (self._directory / "senders.log").read_text()[-2000:]
        process.kill()
        process.wait()
        self.processes[number] = self._start(number)

    def acknowledged(self) -> set[str]:
        found: set[str] = set()
        for number in range(len(self.processes)):
            path = self._directory / f"acknowledged_{number}"
            found |= set(path.read_text().split()) if path.exists() else set()
        return found

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()


def kill_loop(
    directory: Path,
    model: Any,
    checkpoint: Path,
    *,
    nodes: int,
    kills: int,
    each: int = 4,
    nonces: int = 20,
    senders: int = 4,
    seed: int = 20,
    longest: float = 1.0,
    nonces_per_hour: int = 2_000_000,
    pause: float = 0.01,
) -> dict[str, Any]:
    """Kill a validator ``kills`` times, and its senders as often; let it finish, and count."""
    rng = random.Random(seed)
    keys = keys_of(nodes)
    write_network(directory, model, keys)
    total = write_messages(directory, model, keys, each=each, nonces=nonces, senders=senders)
    budget = ("--nonces-per-hour", str(nonces_per_hour), "--sample", "16", "--epoch", "20")
    server = ValidatorServer(directory, *budget, model=checkpoint)
    began = time.monotonic()
    sending = None
    try:
        server.start()
        server.wait_for("/health")
        for block, height in BLOCKS.items():
            server.announce(block, height)
        sending = Senders(directory, server.port, senders, pause)
        for _ in range(kills):
            time.sleep(rng.uniform(0.0, longest))
            sending.kill(rng.randrange(senders))
            time.sleep(rng.uniform(0.0, longest / 4))
            server.kill()
            server.start()
            if rng.random() < 0.85:  # the others die while the process starts
                server.wait_for("/health")
        server.wait_for()
        known = sending.acknowledged
        until(
            lambda: len(known()) == total,
            600,
            pause=0.5,
            said=lambda: (len(known()), total, server.log.read_text()[-2000:]),
        )
        sending.close()
        until(
            lambda: not _open_draws(server),
            600,
            pause=0.5,
            said=lambda: server.log.read_text()[-2000:],
        )
        assert server.terminate() == 0, server.log.read_text()[-2000:]
        return _count(server.data_dir, sending, kills, time.monotonic() - began, keys)
    finally:
        if sending is not None:
            sending.close()
        server.close()


def _open_draws(server: ValidatorServer) -> int:
    """Count messages of nodes that are not convicted, of which a nonce was not recomputed."""
    with sqlite3.connect(server.data_dir / "validator.sqlite3", timeout=30) as database:
        tables = "inbox JOIN senders ON senders.id = sender"
        query = f"SELECT DISTINCT public_key FROM {tables} WHERE drawn < inbox.nonces"
        rows = database.execute(query).fetchall()
    database.close()
    convicted = {key for key, verdict in _verdicts(server.data_dir).items() if verdict == "fraud"}
    return sum(row[0] not in convicted for row in rows)


def _verdicts(data_dir: Path) -> dict[str, str]:
    if not (data_dir / "ledger.sqlite3").exists():
        return {}
    with Ledger(data_dir / "ledger.sqlite3", read_only=True) as ledger:
        return {
            standing.account.public_key: str(standing.verdict) for standing in ledger.standings()
        }


def _count(
    data_dir: Path, sending: Senders, kills: int, seconds: float, keys: Sequence[str]
) -> dict[str, Any]:
    acknowledged = sending.acknowledged()
    with sqlite3.connect(data_dir / "validator.sqlite3") as database:
        assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        columns = "inbox.id, public_key, body, inbox.nonces, drawn, planned"
        rows = database.execute(
            f"SELECT {columns} FROM inbox JOIN senders ON senders.id = sender"
        ).fetchall()
        (repeated,) = database.execute("SELECT sum(repeated) FROM senders").fetchone()
    database.close()
    claimed: dict[str, set[int]] = {key: set() for key in keys}
    for _, key, body, *_ in rows:
        claimed[key] |= set(json.loads(body)["nonces"])
    counted: dict[str, Counter] = {key: Counter() for key in keys}
    with Ledger(data_dir / "ledger.sqlite3", read_only=True) as ledger:
        standings = {standing.account.public_key: standing for standing in ledger.standings()}
        names: Counter = Counter()
        for standing in standings.values():
            for entry in ledger.entries(standing.account):
                names[entry.name] += 1
                excluded = dict(entry.excluded)
                counted[entry.account.public_key].update(
                    nonce for place, nonce in enumerate(entry.nonces) if place not in excluded
                )
        entries = ledger.head[0]
    verdicts = {key: str(standing.verdict) for key, standing in standings.items()}
    watched = [key for key in keys if verdicts.get(key) != "fraud"]
    drawn = {
        key: sum(row[4] for row in rows if row[1] == key) for key in keys if key not in watched
    }
    ids = Counter((row[1], row[0]) for row in rows)
    liars = keys[::LIARS]
    return {
        "nodes": len(keys),
        "validator_kills": kills,
        "sender_kills": kills,
        "seconds": round(seconds, 1),
        "messages": len(rows),
        "acknowledged": len(acknowledged),
        "lost_messages": len(acknowledged - {row[0] for row in rows}),
        "messages_kept_twice": sum(count - 1 for count in ids.values()),
        "repeated_deliveries": int(repeated),
        "nonces_claimed": sum(map(len, claimed.values())),
        "nonces_counted": sum(standing.evidence.n for standing in standings.values()),
        # Of a node that is not convicted every nonce was drawn; of a convicted one, as many as the
        # inbox says.
        "evidence_lost": sum(len(claimed[key] - set(counted[key])) for key in watched)
        + sum(max(0, count - counted[key].total()) for key, count in drawn.items()),
        "evidence_counted_twice": sum(
            count - 1 for nonces in counted.values() for count in nonces.values()
        )
        + sum(standings[key].evidence.n != counted[key].total() for key in standings),
        "repeated_updates": sum(count - 1 for count in names.values()),
        "draws_left_open": sum(row[5] != row[4] for row in rows),
        "honest_accused": sum(verdicts.get(key) == "fraud" for key in keys if key not in liars),
        "liars": len(liars),
        "liars_convicted": sum(verdicts.get(key) == "fraud" for key in liars),
        "ledger_entries": entries,
    }
