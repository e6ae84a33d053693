"""The client of the Gonka chain against the plugin in a real server, by itself and through MLNode."""

import contextlib
import time

import httpx
import pytest
from _vllm import ForkedServer

from assay import poc
from assay.poc.cheats import rounded
from assay.poc.protocol.records import encode_vector
from tests.chain.client import Node, Stage, Validator, start
from tests.chain.mlnode import MLNode
from tests.chain.services import Participant
from tests.vllm.conftest import SMALL
from tests.waiting import until

NAME = "organisation/a model"
SEQ_LEN = 24  # which the server is not told


class ChainServer(ForkedServer):
    """A server whose status is that of the chain's servers."""

    def wait_until_ready(self, timeout: float = 900.0, *, pause: float = 0.5) -> None:
        deadline = time.monotonic() + timeout
        while True:
            assert self.process.poll() is None, self.tail()
            assert time.monotonic() < deadline, self.tail()
            with contextlib.suppress(httpx.HTTPError):
                if self.get("/ready").status_code == 200:
                    return
            time.sleep(pause)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory):
    environment = {
        "ASSAY_API_KEY": "",
        "ASSAY_COMPATIBILITY": "gonka",
        "ASSAY_CALLBACK_INTERVAL": "0.3",
        "ASSAY_REFERENCE": "reference:qwen3",
    }
    options = SMALL | {"--served-model-name": NAME}
    with ChainServer(
        tmp_path_factory.mktemp("chain"), options=options, environment=environment
    ) as running:
        yield running


def artifacts_of(model, key: str, stage: Stage, nonces: list[int]) -> list[dict]:
    """Return a participant's artifacts, computed on transformers."""
    round = poc.Round(
        block_hash=stage.block_hash, public_key=key, preset="artifact", seq_len=stage.seq_len
    )
    records = poc.prove(model, round, nonces, batch_size=8).records
    return [{"nonce": r.nonce, "vector_b64": encode_vector(r.vector)} for r in records]


@pytest.mark.parametrize("behind", [False, True])
def test_a_stage_of_the_chain_beside_chat(behind, server, honest):
    with Participant() as receiver, contextlib.ExitStack() as held:
        url = server.url
        if behind:
            url = held.enter_context(MLNode([server.port])).url
        node = Node(url, 1)
        stage = Stage(f"block {behind}", 7 + behind, NAME, SEQ_LEN, receiver.url)
        assert node.status() == "IDLE"
        assert start(node, stage, "02own", 1)
        assert not start(node, stage, "02own", 1)
        until(lambda: len(receiver.artifacts[stage.block_hash, 1]) >= 16, 240)
        validator = Validator([node], stage, lambda: time.sleep(0.2))
        validator.begin()
        assert node.status() == "IDLE"
        nonces = list(range(3, 67, 2))
        for key, model in (("02honest", honest), ("02cheat", rounded(honest, 4))):
            assert validator.check(key, artifacts_of(model, key, stage, nonces))
        until(lambda: len(receiver.verdicts) == 2, 240)
        weights = {verdict["public_key"]: validator.vote(verdict) for verdict in receiver.verdicts}
        assert weights == {"02honest": len(nonces), "02cheat": -1}
        own = receiver.artifacts[stage.block_hash, 1]
        assert min(own) == 1
        validator.check("02own", [{"nonce": n, "vector_b64": own[n]} for n in sorted(own)[:8]])
        until(lambda: len(receiver.verdicts) == 3, 240)
        assert receiver.verdicts[-1]["n_mismatch"] == 0
    assert receiver.paths <= {
        f"/v2/poc-batches/organisation%252Fa%2520model/{kind}"
        for kind in ("generated", "validated")
    }


def test_the_build_says_what_it_can_do(server):
    for prefix in ("/api/v1/pow", "/api/v1/inference/pow"):
        about = server.client.get(f"{prefix}/versions").json()
        assert about["poc_validation_inference"] is True
        assert about["vllm_version"].startswith("0.")


def test_a_restarted_server_is_idle_and_its_page_and_chat_stay(server):
    stage = Stage("block restarted", 9, NAME, SEQ_LEN, "http://127.0.0.1:9")
    assert start(Node(server.url, 1), stage, "02own", 1)
    server.stop()
    server.start()
    node = Node(server.url, 1)
    assert node.status() == "IDLE"
    assert start(node, stage, "02own", 1)
    node.stop()
    assert server.client.get("/v1/models").json()["data"][0]["id"] == NAME
