"""One server with two data-parallel engines: one round, whose nonces run on both, beside chat and after every end."""

import re

import numpy as np
import pytest
from _vllm import ForkedServer

from tests.vllm.conftest import ONE_GPU, SEQ_LEN, SMALL, check_idle
from tests.vllm.test_server import check_chat, make

pytestmark = pytest.mark.skipif(ONE_GPU, reason="two engines need two GPUs")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory):
    options = SMALL | {
        "--data-parallel-size": "2",
        "--kv-cache-memory-bytes": str(2**26),
        "--max-num-batched-tokens": "256",
    }
    environment = {"ASSAY_SEQ_LEN": str(SEQ_LEN), "ASSAY_CALLBACK_INTERVAL": "0.2"}
    with ForkedServer(tmp_path_factory.mktemp("engines"), options=options, environment=environment) as running:
        yield running


def prompts(server: ForkedServer) -> list[int]:
    """Return the tokens of prompts that each engine has taken as requests."""
    text = server.client.get("/metrics").text
    found = re.findall(r'^vllm:prompt_tokens_total\{engine="(\d)".*\} (\S+)$', text, re.MULTILINE)
    return [int(float(count)) for _, count in sorted(found)]


@pytest.mark.parametrize("path", ["auto", "requests"])
def test_nonces_run_on_both_engines_and_are_those_of_transformers(server, honest, path: str):
    server.post("/engine", {"path": path}).raise_for_status()
    before, block = prompts(server), f"engines-{path}"
    server.begin(block)
    server.wait_for(96)
    server.post("/stop").raise_for_status()
    held = check_idle(server)
    server.post("/engine", {"path": "auto"}).raise_for_status()
    distances = server.get("/status", after=-1, limit=48).json()["valid_distances"]
    assert np.abs(np.array(distances) - np.array(make(honest, block, 48))).max() <= 2e-6
    asked = np.array(prompts(server)) - before
    # In calls every engine has its share, and a nonce that an engine did not run would be requested.
    assert (asked == 0).all() if path == "auto" else (asked >= 16 * SEQ_LEN).all()
    assert len(held["workers"]) == 2


def test_chat_on_both_engines_is_the_same_beside_nonces(server):
    check_chat(server, 24)
