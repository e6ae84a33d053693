"""A server whose two workers are on two nodes of Ray: its rounds, its chat, and what is left of it
after every end.
"""

import pytest
from _vllm import SEEDED, ForkedServer, agreement, begin, mixed

from tests.vllm.conftest import ONE_GPU, SEQ_LEN, SMALL
from tests.vllm.ray_nodes import OPTIONS, Nodes, installed
from tests.vllm.receiver import Receiver
from tests.vllm.test_exclusive import stored
from tests.vllm.test_nodes import check_round
from tests.vllm.test_server import check_chat, proved
from tests.waiting import until

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(ONE_GPU, reason="two nodes need two GPUs"),
    pytest.mark.skipif(not installed(), reason="Ray is not installed: run make test-vllm"),
]


@pytest.fixture(scope="module")
def nodes():
    with Nodes() as running:
        yield running


@pytest.fixture(scope="module")
def server(nodes: Nodes, tmp_path_factory: pytest.TempPathFactory):
    options = (
        SMALL | OPTIONS | {"--kv-cache-memory-bytes": str(2**26), "--max-num-batched-tokens": "224"}
    )
    environment = (
        SEEDED
        | nodes.environment
        | {"ASSAY_SEQ_LEN": str(SEQ_LEN), "ASSAY_CALLBACK_INTERVAL": "0.2"}
    )
    with ForkedServer(
        tmp_path_factory.mktemp("ray"), options=options, environment=environment
    ) as running:
        yield running


@pytest.mark.parametrize("path", ["auto", "requests"])
def test_nonces_of_workers_on_two_nodes_are_those_of_transformers(server, nodes, honest, path: str):
    assert [len(found) for found in nodes.workers()] == [1, 1]
    check_round(server, honest, path, f"ray-{path}")


def test_chat_is_the_same_beside_nonces_and_seeded_as_on_transformers(server, honest):
    check_chat(server)
    begin(server)
    figures = agreement(server, honest, mixed(8, honest.tokenizer))
    assert (figures["same_tokens"], figures["different"]) == (8, [])


def test_sigkill_and_sigterm_lose_nothing_and_leave_no_worker(server, nodes):
    with Receiver() as receiver:
        server.begin("ended", url=receiver.url)
        reached = server.wait_for(32)
        # the workers are no children of the server; Ray ends them when the process is gone that had
        # them
        server.kill()
        until(lambda: not any(nodes.workers()), 60)
        server.start()
        assert server.get("/status").json()["state"] == "GENERATING"
        server.wait_for(reached + 32)
        server.post("/stop").raise_for_status()
        until(lambda: receiver.nonces("ended") == proved(server), 240)
        assert stored(server, "ended") == list(range(len(receiver.nonces("ended"))))
        assert server.stop(grace=240.0) == 0, server.tail()
        until(lambda: not any(nodes.workers()), 60)
