"""A server and a second process of vLLM without one, as on two hosts (``--nnodes 2``): a worker of
each, one round.
"""

import numpy as np
import pytest
from _vllm import ForkedServer, Server, free_port

from tests.vllm.conftest import ONE_GPU, SEQ_LEN, SMALL, check_idle
from tests.vllm.test_server import check_chat, make

pytestmark = [pytest.mark.slow, pytest.mark.skipif(ONE_GPU, reason="two workers need two GPUs")]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory):
    options = SMALL | {"--tensor-parallel-size": "2", "--nnodes": "2", "--master-addr": "127.0.0.1"}
    options |= {
        "--disable-custom-all-reduce": None
    }  # it looks for the GPUs of all ranks in each process
    options |= {"--master-port": str(free_port()), "--kv-cache-memory-bytes": str(2**26)}
    environment = {
        "ASSAY_SEQ_LEN": str(SEQ_LEN),
        "VLLM_HOST_IP": "127.0.0.1",
        "GLOO_SOCKET_IFNAME": "lo",
    }
    environment |= {"NCCL_SOCKET_IFNAME": "lo"}
    first, second = (
        ForkedServer(
            tmp_path_factory.mktemp(f"node-{rank}"),
            options=options | {"--node-rank": str(rank)} | ({"--headless": None} if rank else {}),
            environment=environment | {"CUDA_VISIBLE_DEVICES": str(rank)},
            serves=True,
        )
        for rank in range(2)
    )
    try:
        second.launch()
        first.start()
        yield first
        assert first.stop(grace=240.0) == 0, first.tail()
    finally:
        first.stop()
        second.stop()


def check_round(server: Server, honest, path: str, block: str) -> None:
    """Run a round along one way through vLLM, and compare its nonces with those of transformers."""
    server.post("/engine", {"path": path}).raise_for_status()
    before = server.get("/engine").json()["direct"]["nonces"]
    server.begin(block)
    server.wait_for(64)
    server.post("/stop").raise_for_status()
    held = check_idle(server)
    distances = server.get("/status", after=-1, limit=48).json()["valid_distances"]
    assert np.abs(np.array(distances) - np.array(make(honest, block, 48))).max() <= 2e-6
    direct = held["direct"]["nonces"] - before
    assert direct == 0 if path == "requests" else direct >= 64
    assert len(held["workers"]) == 2


@pytest.mark.parametrize("path", ["auto", "requests"])
def test_nonces_of_workers_on_two_hosts_are_those_of_transformers(server, honest, path: str):
    check_round(server, honest, path, f"nodes-{path}")


def test_chat_is_the_same_beside_nonces(server):
    check_chat(server)
