"""One server with two data-parallel engines: one round, whose nonces run on both, beside chat and
after every end.
"""

import re

import numpy as np
import pytest
from _vllm import ForkedServer

from tests.vllm.conftest import ONE_GPU, SEQ_LEN, SMALL
from tests.vllm.test_nodes import check_round
from tests.vllm.test_server import check_chat

pytestmark = pytest.mark.skipif(ONE_GPU, reason="two engines need two GPUs")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory):
    options = SMALL | {"--data-parallel-size": "2", "--max-num-batched-tokens": "256"}
    options |= {"--kv-cache-memory-bytes": str(2**26)}
    environment = {"ASSAY_SEQ_LEN": str(SEQ_LEN), "ASSAY_CALLBACK_INTERVAL": "0.2"}
    folder = tmp_path_factory.mktemp("engines")
    # `vllm serve` would start an API server for each engine.
    with ForkedServer(folder, options=options, environment=environment, serves=True) as running:
        yield running


def prompts(server: ForkedServer) -> list[int]:
    """Return the tokens of prompts that each engine has taken as requests."""
    text = server.client.get("/metrics").text
    found = re.findall(r'^vllm:prompt_tokens_total\{engine="(\d)".*\} (\S+)$', text, re.MULTILINE)
    return [int(float(count)) for _, count in sorted(found)]


@pytest.mark.parametrize("path", ["auto", "requests"])
def test_nonces_run_on_both_engines_and_are_those_of_transformers(server, honest, path: str):
    before = prompts(server)
    check_round(server, honest, path, f"engines-{path}")
    asked = np.array(prompts(server)) - before
    # In calls every engine has its share, and a nonce that an engine did not run would be
    # requested.
    assert (asked == 0).all() if path == "auto" else (asked >= 16 * SEQ_LEN).all()
    server.post("/engine", {"path": "auto"}).raise_for_status()


def test_chat_on_both_engines_is_the_same_beside_nonces(server):
    check_chat(server, 24)
