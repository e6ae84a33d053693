"""Two API servers of one engine: one round, which either of them answers for, beside the chat of both."""

import asyncio
from collections import Counter

import httpx
import numpy as np
import psutil
import pytest
from _vllm import KEY, POW, ForkedServer, talk

from assay.poc.vllm import servers as _servers
from tests.vllm.conftest import SEQ_LEN, SMALL
from tests.vllm.receiver import Receiver
from tests.vllm.test_exclusive import stored
from tests.vllm.test_server import make, proved
from tests.waiting import until

HEAD = {"Authorization": f"Bearer {KEY}"}
MANY = 20  # connections, of which each process takes some


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory):
    environment = {"ASSAY_SEQ_LEN": str(SEQ_LEN), "ASSAY_CALLBACK_INTERVAL": "0.2"}
    options = SMALL | {"--api-server-count": "2"}
    folder = tmp_path_factory.mktemp("servers")
    with ForkedServer(folder, options=options, environment=environment, serves=True) as running:
        yield running


def ask(server: ForkedServer, method: str = "GET", path: str = "/status", **options) -> list[httpx.Response]:
    """Ask over connections of their own."""
    return [
        httpx.request(method, f"{server.url}{POW}{path}", **({"headers": HEAD, "timeout": 60.0} | options))
        for _ in range(MANY)
    ]


def processes(server: ForkedServer) -> set[int]:
    """Return the processes that have connections of the port."""
    return {
        child.pid
        for child in psutil.Process(server.process.pid).children(recursive=True)
        for open_now in child.net_connections("tcp")
        if open_now.laddr.port == server.port and open_now.status == psutil.CONN_ESTABLISHED
    }


def test_every_server_answers_for_the_round_and_its_nonces_are_those_of_transformers(server, honest):
    server.begin("servers")
    server.wait_for(64)
    assert {answer.json()["state"] for answer in ask(server)} == {"GENERATING"}
    server.post("/stop").raise_for_status()
    assert {answer.json()["state"] for answer in ask(server)} == {"STOPPED"}
    found = ask(server, path="/status?after=-1&limit=48")
    assert len({answer.text for answer in found}) == 1
    distances = found[0].json()["valid_distances"]
    assert np.abs(np.array(distances) - np.array(make(honest, "servers", 48))).max() <= 2e-6
    server.idle_counts()


def test_what_the_servers_share_is_for_this_user_alone(server):
    for name in (_servers.SOCKET, _servers.COUNTS):
        assert (server.data_dir / name).stat().st_mode & 0o777 == 0o600


def test_every_server_asks_for_a_key_and_bounds_bodies(server):
    assert {answer.status_code for answer in ask(server, headers={})} == {401}
    assert {answer.status_code for answer in ask(server, headers=HEAD | {"X-Forwarded-For": "9.9.9.9"})} == {200}
    wrong = ask(server, "POST", "/init/generate", content=b"{")
    assert {answer.status_code for answer in wrong} <= {400, 422}
    large = ask(server, "POST", "/init/generate", content=b" " * 2**26)
    assert {answer.status_code for answer in large} == {413}


def test_events_come_through_and_end_with_the_client(server):
    for _ in range(8):
        with httpx.stream("GET", f"{server.url}{POW}/events", headers=HEAD, timeout=30.0) as events:
            assert events.headers["content-type"].startswith("text/event-stream")
            assert next(events.iter_lines()).startswith(("data:", "event:", "id:", "retry:"))
    assert {answer.status_code for answer in ask(server)} == {200}


def test_nonces_give_way_to_the_chat_of_all_servers(server):
    async def watched() -> tuple[list[dict], int, set[int]]:
        asked, most, serving = asyncio.create_task(talk(server.url, 12, tokens=96, at_once=12)), 0, set()
        async with httpx.AsyncClient(base_url=server.url, headers=HEAD, timeout=60.0) as client:
            while not asked.done():
                most = max(most, (await client.get(f"{POW}/engine")).json()["chat"])
                serving |= processes(server)
        return await asked, most, serving

    answers, most, serving = asyncio.run(watched())
    assert Counter(one["status"] for one in answers) == {200: 12}
    assert most == 12
    assert len(serving) == 2


def test_a_round_that_has_the_engine_to_itself_refuses_chat_at_every_server(server):
    assert {answer.json()["mode"] for answer in ask(server, "POST", "/engine", json={"mode": "exclusive"})} == {
        "exclusive"
    }
    server.begin("alone")
    server.wait_for(8)
    assert {one["status"] for one in asyncio.run(talk(server.url, MANY, tokens=1, at_once=MANY))} == {503}
    server.post("/stop").raise_for_status()
    ask(server, "POST", "/engine", json={"mode": "chat-first"})
    until(lambda: {one["status"] for one in asyncio.run(talk(server.url, MANY, tokens=1, at_once=MANY))} == {200}, 30)


def test_a_round_goes_on_after_sigterm_and_sigkill(server):
    with Receiver() as receiver:
        server.begin("ended", url=receiver.url)
        reached = server.wait_for(16)
        for end in (server.stop, server.kill):
            end()
            server.start()
            assert server.get("/status").json()["state"] == "GENERATING"
            reached = server.wait_for(reached + 16)
        server.post("/stop").raise_for_status()
        until(lambda: receiver.nonces("ended") == proved(server), 240)
        assert stored(server, "ended") == list(range(len(receiver.nonces("ended"))))
