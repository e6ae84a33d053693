"""The plugin in a real server on loopback: chat beside nonces, validation, slow receivers, hostile
clients.
"""

import asyncio
import base64

import httpx
import numpy as np
import pytest
from _vllm import MODEL, POW, ForkedServer, Server, talk

from assay import poc
from assay.poc.cheats import rounded
from tests.vllm.conftest import SEQ_LEN, SMALL, check_idle
from tests.vllm.receiver import Receiver
from tests.waiting import until

OF_ARTIFACTS = ("server", "honest")
VERDICT = {"block_hash": "verdict", "public_key": "validator", "r_target": 2.0}
BLOCK = {"block_height": 1, "seq_len": SEQ_LEN, "batch_size": 8, "node_id": 0, "node_count": 1}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory):
    # Three nonces and a half fill a step, so that prompts of chat and nonces are cut into chunks.
    options = SMALL | {"--max-num-batched-tokens": "224"}
    environment = {
        "ASSAY_SEQ_LEN": str(SEQ_LEN),
        "ASSAY_CALLBACK_INTERVAL": "0.5",
        "ASSAY_CALLBACK_TIMEOUT": "2",
        "ASSAY_CALLBACK_BACKOFF_MAX": "1",
    }
    with ForkedServer(
        tmp_path_factory.mktemp("server"), options=options, environment=environment
    ) as running:
        yield running


PINS = f"""schema = 1
[round]
preset = "tokens-1"
seq_len = {SEQ_LEN}
strength = 256
node_count = 1
fewest_nonces = 8
[[models]]
reference = "{MODEL}"
digest = "DIGEST"
[models.frame]
file = "frame"
sha256 = "FRAME"
[[models.builds]]
dtype = "float32"
engine = "vllm"
""" + "".join(
    f'{name} = "*"\n'
    for name in ("device", "attention", "batch_size", "threads", "torch", "library", "kernels")
)


@pytest.fixture
def framed(tmp_path_factory: pytest.TempPathFactory, honest):
    """A server of tokens, which takes no embeddings from anyone."""
    folder = tmp_path_factory.mktemp("framed")
    frame = poc.measure_frame(honest)
    frame.save(folder / "frame")
    (folder / "pins.toml").write_text(
        PINS.replace("DIGEST", honest.digest).replace("FRAME", frame.sha256)
    )
    environment = {"ASSAY_SEQ_LEN": str(SEQ_LEN), "ASSAY_PINS": str(folder / "pins.toml")}
    options = SMALL | {"--enable-prompt-embeds": False}
    with ForkedServer(folder / "server", options=options, environment=environment) as running:
        yield running, honest.with_frame(frame)


def proved(server: Server) -> list[int]:
    return server.get("/status", after=-1, limit=10_000).json()["valid_nonces"]


def make(model, block: str, count: int, key: str = "node") -> list[float]:
    """Compute distances on transformers."""
    round = poc.Round(
        block_hash=block, public_key=key, block_height=1, seq_len=SEQ_LEN, r_target=2.0
    )
    return [
        record.distance for record in poc.prove(model, round, range(count), batch_size=8).records
    ]


def check_chat(server: Server, requests: int = 16, nonces: int = 40, **options: int) -> list[dict]:
    """Compare chat beside nonces with chat alone, which is returned; the round goes on
    meanwhile.
    """
    alone = asyncio.run(talk(server.url, requests, **options))
    server.begin("beside")
    server.wait_for(8)
    before = server.checked()
    beside = asyncio.run(talk(server.url, requests, **options))
    server.wait_for(before + nonces)
    server.post("/stop").raise_for_status()
    assert [one["status"] for one in beside] == [200] * requests
    assert [one["text"] for one in beside] == [one["text"] for one in alone]
    return alone


def test_the_service_is_mounted_with_its_own_keys_beside_the_routes_of_vllm(server):
    with httpx.Client(base_url=server.url) as stranger:
        assert stranger.get(f"{POW}/status").status_code == 401
        assert stranger.get(f"{POW}/engine").status_code == 401
        assert stranger.get(f"{POW}/metrics").status_code == 401
        assert stranger.get("/v1/models").json()["data"][0]["id"] == MODEL
        assert "Proof of Compute" in stranger.get("/").text
        assert "vllm:" in stranger.get("/metrics").text
        assert stranger.get(f"{POW}/health").json() == {"status": "ok"}
    assert server.get("/ready").json() == {"ready": True}
    assert "assay_poc_nonces" in server.get("/metrics").text
    paths = server.client.get("/openapi.json").json()["paths"]
    assert {
        f"{POW}/init/generate",
        f"{POW}/validate",
        f"{POW}/engine",
        "/v1/chat/completions",
    } <= set(paths)
    engine = server.get("/engine").json()
    assert (engine["mode"], engine["worker"]["dtype"]) == ("chat-first", "float32")


def test_chat_beside_nonces_gives_the_same_tokens_and_no_error(server):
    alone = check_chat(server, 48)
    assert len({one["text"] for one in alone}) > 10
    check_idle(server)


def test_the_server_validates_honest_nodes_on_transformers_and_catches_four_bits(server, honest):
    server.post("/init/validate", VERDICT | BLOCK).raise_for_status()
    for key, model, verdict in (("node", honest, "honest"), ("cheat", rounded(honest, 4), "fraud")):
        body = {
            "block_hash": "verdict",
            "block_height": 1,
            "public_key": key,
            "nonces": list(range(64)),
            "node_id": 0,
        }
        answer = server.post("/validate", body | {"dist": make(model, "verdict", 64, key)}).json()
        assert answer.get("residual_test", {}).get("verdict") == verdict, answer
    server.post("/stop").raise_for_status()


@pytest.mark.parametrize("preset", ["artifact", "tokens-1"])
def test_a_job_gives_the_vectors_of_transformers_and_they_are_checked(preset, request):
    tokens = preset == "tokens-1"
    server, model = (
        request.getfixturevalue("framed")
        if tokens
        else [request.getfixturevalue(n) for n in OF_ARTIFACTS]
    )
    params = {
        "model": MODEL,
        "seq_len": SEQ_LEN,
        "k_dim": poc.PIPELINES[preset].vector_size,
        "preset": preset,
    }
    body = {
        "block_hash": "job",
        "public_key": "node",
        "params": params,
        "nonces": list(range(12)),
        "wait": True,
    }
    body |= {name: BLOCK[name] for name in ("block_height", "node_id", "node_count", "batch_size")}
    done = server.post("/generate", body).json()
    assert done["status"] == "completed", done
    if tokens:
        assert (
            server.post("/generate", body | {"params": params | {"preset": "artifact"}}).status_code
            == 409
        )
    round = poc.Round(
        block_hash="job", public_key="node", block_height=1, seq_len=SEQ_LEN, preset=preset
    )
    for record, artifact in zip(
        poc.prove(model, round, range(12)).records, done["artifacts"], strict=True
    ):
        assert artifact["nonce"] == record.nonce
        found = np.frombuffer(base64.b64decode(artifact["vector_b64"]), "<f2").astype(float)
        np.testing.assert_allclose(found, record.vector.astype(float), atol=5e-3)
    checked = server.post(
        "/generate", body | {"validation": {"artifacts": done["artifacts"]}}
    ).json()
    assert (checked["n_mismatch"], checked["fraud_detected"]) == (0, False)


@pytest.mark.parametrize(("delay", "status"), [(3600.0, 200), (0.0, 500)])
def test_a_receiver_that_is_slow_or_fails_costs_chat_nothing_and_gets_everything_later(
    server, delay, status
):
    receiver = Receiver(delay=delay, status=status)
    block = f"receiver-{status}"
    try:
        alone = asyncio.run(talk(server.url, 8))
        server.begin(block, url=receiver.url)
        server.wait_for(16)
        beside = asyncio.run(talk(server.url, 8))
        assert [one["text"] for one in beside] == [one["text"] for one in alone]
        server.wait_for(32)
        server.post("/stop").raise_for_status()
        until(lambda: receiver.asked > 0, 240)
        assert receiver.nonces(block) == []
        receiver.mend()
        until(
            lambda: len(receiver.nonces(block)) >= 32 and receiver.nonces(block) == proved(server),
            240,
        )
    finally:
        receiver.close()


def test_the_throttle_can_be_changed_while_it_runs_and_nonsense_is_refused(server):
    assert server.post("/engine", {"share": 0.5, "chat_in_flight": 1}).json()["share"] == 0.5
    for wrong in ({"share": 0}, {"share": "all"}, {"mode": "greedy"}, {"speed": 3}):
        assert server.post("/engine", wrong).status_code == 422
    assert server.post("/engine", {"share": 0.25, "chat_in_flight": 2}).json()["share"] == 0.25
