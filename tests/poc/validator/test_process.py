"""A real ``assay poc validator``: killed with its senders, and flooded. The benchmarks do the same
for longer.
"""

import pytest

from tests.end_to_end.server import Server
from tests.poc.validator.conftest import (
    API,
    BLOCK,
    HEIGHT,
    NODE_COUNT,
    R_TARGET,
    SEQ_LEN,
    secret_of,
)
from tests.poc.validator.killing import MUST_BE_ZERO, kill_loop
from tests.poc.validator.senders import ValidatorServer, write_network
from tests.waiting import until

pytestmark = pytest.mark.slow


def test_a_service_and_a_validator_agree(tmp_path, small_model, small_checkpoint):
    """Two real processes: what the service sends is taken, recomputed, and called honest."""
    key = "node_A"
    write_network(tmp_path, small_model, [key])
    (tmp_path / "service").mkdir()
    quick = (
        "--callback-interval",
        "0.1",
        "--callback-backoff",
        "0.05",
        "--callback-secret",
        secret_of(key),
    )
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
            "node_id": 0,
        }
        round |= {
            "node_count": NODE_COUNT,
            "seq_len": SEQ_LEN,
            "batch_size": 8,
            "callback_url": validator.base + API,
        }
        service.post("/init/generate", round)
        node = lambda: validator.get(f"{API}/nodes")["nodes"][0]  # noqa: E731
        until(
            lambda: node()["verdict"] == "honest",
            60,
            said=lambda: (node(), validator.log.read_text()[-2000:]),
        )
        service.post("/stop")
        assert node()["messages"] > 0
        # Later nonces may take a distance's evidence below the bound again, and none of them may
        # accuse.
        assert node()["verdict"] in ("honest", "undecided")
        assert validator.terminate() == 0
    finally:
        service.close()
        validator.close()


@pytest.mark.kill
def test_kills_of_validator_and_senders_lose_and_repeat_nothing(
    tmp_path, small_model, small_checkpoint
):
    """`research/benchmarks/soak.py` does this 200 times with a thousand nodes."""
    outcome = kill_loop(
        tmp_path,
        small_model,
        small_checkpoint,
        nodes=24,
        kills=4,
        each=14,
        senders=2,
        nonces_per_hour=20_000_000,
    )
    assert {name: outcome[name] for name in MUST_BE_ZERO} == dict.fromkeys(MUST_BE_ZERO, 0), outcome
    assert outcome["acknowledged"] == outcome["messages"] > 100
    assert outcome["liars_convicted"] == outcome["liars"] == 2
    assert outcome["nonces_counted"] > 1000
