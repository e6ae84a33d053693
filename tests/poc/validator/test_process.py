"""A real ``assay poc validator``: killed with its senders, and flooded. The benchmarks do the same for longer."""

import asyncio
import sqlite3

import pytest

from tests.poc.validator.conftest import API
from tests.poc.validator.killing import MUST_BE_ZERO, kill_loop
from tests.poc.validator.senders import ValidatorServer, dumps, flood, keys_of, made_up, request_of, write_network

pytestmark = pytest.mark.slow


def test_kills_of_validator_and_senders_lose_and_repeat_nothing(tmp_path, small_model, small_checkpoint):
    """`benchmarks/validator_soak.py` does this 200 times with a thousand nodes."""
    outcome = kill_loop(
        tmp_path, small_model, small_checkpoint, nodes=40, kills=4, each=3, senders=2, nonces_per_hour=20_000_000
    )
    assert {name: getattr(outcome, name) for name in MUST_BE_ZERO} == dict.fromkeys(MUST_BE_ZERO, 0), outcome
    assert outcome.acknowledged == outcome.messages > 100
    assert outcome.liars_convicted == outcome.liars == 2
    assert outcome.nonces_counted > 1000


def test_every_answer_of_a_flood_is_on_disk(tmp_path, small_model, small_checkpoint):
    """`benchmarks/validator_load.py` measures how many a second."""
    keys = keys_of(50)
    write_network(tmp_path, small_model, keys)
    server = ValidatorServer(tmp_path, model=small_checkpoint)
    try:
        server.start()
        server.wait_for("/health")
        server.announce()
        bodies = [(keys[i % 50], dumps(made_up(keys[i % 50], i % 50, i // 50, 20))) for i in range(600)]
        requests = [request_of(body, f"msg_{i}", key) for i, (key, body) in enumerate(bodies)]
        sent = asyncio.run(flood(server.port, requests, connections=32))
        assert sent.statuses == {200: 600}
        again = asyncio.run(flood(server.port, requests[:100], connections=8))
        assert again.statuses == {200: 100}
        server.kill()
        with sqlite3.connect(server.data_dir / "validator.sqlite3") as database:
            kept = {row[0] for row in database.execute("SELECT id FROM inbox")}
            (commits,) = database.execute("SELECT count(DISTINCT at) FROM inbox").fetchone()
            (repeated,) = database.execute("SELECT sum(repeated) FROM senders").fetchone()
        database.close()
        assert kept == {f"msg_{i}" for i in range(600)}
        assert repeated == 100
        assert commits < 600, "one transaction for each message"
        server.start()
        server.wait_for()
        assert server.get(f"{API}/status")["inbox"]["messages"] == 600
        assert server.terminate() == 0, server.log.read_text()[-2000:]
    finally:
        server.close()
