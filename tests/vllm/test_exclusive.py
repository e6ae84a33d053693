"""A round that has the engine to itself, behind a root path; a dead engine and SIGTERM in its
middle, and a restart.
"""

import asyncio
import sqlite3
import threading
from contextlib import closing

import httpx
import psutil
import pytest
from _vllm import OPTIONS, POW, ForkedServer, Server, chat_alone

from tests.vllm.conftest import SMALL
from tests.waiting import until


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory):
    """Chat is decoded with speculation: another way through the engine."""
    folder = tmp_path_factory.mktemp("exclusive")
    in_file = {
        name: "true" if value is None else value for name, value in (OPTIONS | SMALL).items()
    }
    del in_file["--scheduling-policy"]
    config = folder / "server.yaml"
    config.write_text(
        "".join(f"{name.removeprefix('--')}: {value}\n" for name, value in in_file.items())
    )
    environment = {
        "ASSAY_API_KEY": "",
        "ASSAY_VLLM_MODE": "exclusive",
        "ASSAY_CALLBACK_INTERVAL": "0.2",
        "ASSAY_CALLBACK_BACKOFF_MAX": "1",
    }
    speculation = '{"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3}'
    options = dict.fromkeys(OPTIONS, False) | {"--config": str(config)}
    options |= {"--speculative-config": speculation, "--root-path": "/proxy"}
    with ForkedServer(folder, options=options, environment=environment) as running:
        yield running


def test_without_a_key_only_this_host_is_served_with_the_root_path_and_without_it(server):
    for root in ("", "/proxy"):
        with httpx.Client(base_url=f"{server.url}{root}", timeout=60.0) as here:
            assert here.get(f"{POW}/status").json()["ready"]
            for headers in ({"Host": "evil.example"}, {"Origin": "http://evil.example"}):
                assert here.get(f"{POW}/status", headers=headers).status_code == 403
                assert here.post(f"{POW}/stop", headers=headers).status_code == 403
            assert (
                here.get("/v1/models", headers={"Host": "evil.example"}).status_code == 200
            )  # vLLM's own to guard


def ask(server: Server, index: int = 2, tokens: int = 8) -> dict:
    return asyncio.run(chat_alone(server.url, index, tokens=tokens))


def test_a_round_refuses_new_chat_and_lets_running_chat_end(server):
    alone = ask(server, tokens=300)
    assert alone["status"] == 200
    running: list[dict] = []
    thread = threading.Thread(target=lambda: running.append(ask(server, tokens=300)))
    thread.start()
    until(lambda: bool(server.get("/engine").json()["chat"]), 240)
    server.begin("exclusive")
    refused = server.client.post(
        "/v1/completions", json={"model": "qwen3", "prompt": "x", "max_tokens": 1}
    )
    assert (refused.status_code, refused.headers["retry-after"]) == (503, "10")
    assert server.client.get("/v1/models").status_code == 200
    thread.join()
    assert running == [alone | {"first": running[0]["first"]}]
    server.wait_for(16)
    assert (
        server.client.post(
            "/proxy/v1/completions", json={"model": "qwen3", "prompt": "x"}
        ).status_code
        == 503
    )
    assert (
        server.client.post("/proxy/tokenize", json={"model": "qwen3", "prompt": "x"}).status_code
        == 200
    )
    server.client.post(f"/proxy{POW}/stop").raise_for_status()
    assert ask(server)["status"] == 200


def test_a_round_goes_on_after_the_engine_was_killed_and_the_server_ended_by_itself(server):
    server.post(
        "/engine", {"path": "requests"}
    ).raise_for_status()  # each fails at once, before the server ends
    server.begin("died")
    before = server.wait_for(40)
    children = psutil.Process(server.process.pid).children()
    engine = max(
        children, key=lambda child: child.memory_info().rss
    )  # the other one tracks resources
    engine.kill()
    until(lambda: server.process.poll() is not None, 240)
    server.stop()
    server.start()
    status = server.get("/status").json()
    assert (status["state"], status["error"]) == ("GENERATING", None)
    server.wait_for(before + 40)
    server.post("/stop").raise_for_status()
    done = stored(server, "died")
    assert done == list(range(len(done)))


def stored(server: Server, block: str) -> list[int]:
    """Return the nonces of a block that are on disk."""
    query = (
        "select nonce from records join rounds on rounds.id = round_id where block_hash = ? order "
        "by nonce"
    )
    with closing(sqlite3.connect(server.data_dir / "service.sqlite3")) as database:
        return [nonce for (nonce,) in database.execute(query, (block,))]


def test_sigterm_ends_the_server_in_order_and_the_round_continues_after_the_next_start(server):
    server.begin("ended")
    before = server.wait_for(8)
    said = len(server.log.read_text(errors="replace"))
    assert server.stop(grace=240.0) == 0, server.tail()
    log = server.log.read_text(errors="replace")[said:]
    assert "never retrieved" not in log, log
    assert "the round ended" not in log, log
    server.start()
    assert server.get("/status").json()["state"] == "GENERATING"
    server.wait_for(before + 40)
    assert server.stop(grace=240.0) == 0, server.tail()
    done = stored(server, "ended")
    assert done == list(range(len(done)))
    assert len(done) >= before + 40
