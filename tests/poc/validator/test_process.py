"""A real ``assay poc validator``: killed with its senders, and flooded. The benchmarks do the same for longer."""

import asyncio
import sqlite3

import pytest

from tests.end_to_end.server import Server
from tests.poc.validator.conftest import API, BLOCK, HEIGHT, NODE_COUNT, R_TARGET, SEQ_LEN, secret_of
from tests.poc.validator.killing import MUST_BE_ZERO, kill_loop
from tests.poc.validator.senders import ValidatorServer, dumps, flood, keys_of, made_up, request_of, write_network
from tests.waiting import until

pytestmark = pytest.mark.slow


def test_a_service_and_a_validator_agree(tmp_path, small_model, small_checkpoint):
    """Two real processes: what the service sends is taken, recomputed, and called honest."""
    key = "node_A"
    write_network(tmp_path, small_model, [key])
    (tmp_path / "service").mkdir()
    quick = ("--callback-interval", "0.1", "--callback-backoff", "0.05", "--callback-secret", secret_of(key))
    service = Server(tmp_path / "service", *quick, model=small_checkpoint)
    validator = ValidatorServer(tmp_path, "--nonces-per-hour", "1000000", model=small_checkpoint)
    try:
        service.start()
        validator.start()
        validator.wait_for()
        validator.announce()
        service.wait_for()
        round = {
            "block_hash": BLOCK,
            "block_height": HEIGHT,
            "public_key": key,
            "r_target": R_TARGET,
            "seq_len": SEQ_LEN,
        }
        round |= {"node_id": 0, "node_count": NODE_COUNT, "batch_size": 8, "callback_url": f"{validator.base}{API}"}
        service.post("/init/generate", round)
        node = lambda: validator.get(f"{API}/nodes")["nodes"][0]  # noqa: E731
        until(lambda: node()["verdict"] == "honest", 60, said=lambda: (node(), validator.log.read_text()[-2000:]))
        service.post("/stop")
        assert node()["messages"] > 0
        # Later nonces may take a distance's evidence below the bound again, and none of them may accuse.
        assert node()["verdict"] in ("honest", "undecided")
        assert validator.terminate() == 0
    finally:
        service.close()
        validator.close()


@pytest.mark.kill
def test_kills_of_validator_and_senders_lose_and_repeat_nothing(tmp_path, small_model, small_checkpoint):
    """`research/benchmarks/soak.py` does this 200 times with a thousand nodes."""
    outcome = kill_loop(
        tmp_path, small_model, small_checkpoint, nodes=40, kills=4, each=3, senders=2, nonces_per_hour=20_000_000
    )
    assert {name: outcome[name] for name in MUST_BE_ZERO} == dict.fromkeys(MUST_BE_ZERO, 0), outcome
    assert outcome["acknowledged"] == outcome["messages"] > 100
    assert outcome["liars_convicted"] == outcome["liars"] == 2
    assert outcome["nonces_counted"] > 1000


def test_every_answer_of_a_flood_is_on_disk(tmp_path, small_model, small_checkpoint):
    """`research/benchmarks/validator_load.py` measures how many a second."""
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
