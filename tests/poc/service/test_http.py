"""The HTTP surface under attack: connections, heads, bodies, headers, and what the log says of
it.
"""

import asyncio
import gc
import logging
import socket
import threading
import weakref
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from types import SimpleNamespace

import pytest
import structlog
import uvicorn
from fastapi import FastAPI, Request
from pydantic import ValidationError
from structlog.testing import capture_logs

from assay.errors import UsageError
from assay.poc.net import server as _server
from assay.poc.net.bodies import Bodies
from assay.poc.net.logs import LogBudget, configure_logs
from assay.poc.net.refusals import Refusal
from assay.poc.net.server import bounded_config, listen, run_app
from assay.poc.service import ServiceSettings, create_receiver
from assay.poc.service.receiver import Received
from assay.poc.service.request_bodies import Artifact, ValidateRequest, Validation
from tests.poc.service.conftest import BLOCK, PREFIX, ROUND, TestClient
from tests.poc.service.listening import on_port
from tests.waiting import until
from tests.wordings import refuses

LIMITS = {"max_connections": 4, "max_header": 2000, "header_timeout": 1.0}
JSON = {"content-type": "application/json"}


# Connections and heads


@contextmanager
def listening(**changes: float) -> Iterator[tuple[str, int]]:
    """A server with bounds, whose one route answers with the size of the body."""
    app = FastAPI()

    @app.post("/size")
    async def size(request: Request) -> int:
        return len(await request.body())

    @app.post("/later")
    async def later(request: Request) -> None:
        await request.body()
        await asyncio.sleep(0.01)

    config = bounded_config(app, ServiceSettings(**(LIMITS | changes)))
    with on_port(config) as port:
        yield "127.0.0.1", port


def exchange(address: tuple[str, int], *parts: bytes) -> bytes:
    """Send the parts, then read until the server closes the connection or says nothing more."""
    with socket.create_connection(address, timeout=20) as connection:
        with suppress(OSError):  # the server has closed it already
            for part in parts:
                connection.sendall(part)
        return read(connection)


def read(connection: socket.socket) -> bytes:
    """Return what comes until the server closes the connection."""
    found = b""
    with suppress(ConnectionResetError):
        while chunk := connection.recv(65_536):
            found += chunk
    return found


def post(body: bytes, *headers: bytes) -> bytes:
    lines = [
        b"POST /size HTTP/1.1",
        b"host: x",
        b"connection: close",
        b"content-length: %d" % len(body),
        *headers,
    ]
    return b"\r\n".join([*lines, b"", b""]) + body


def test_an_idle_connection_is_ended():
    with listening() as address:
        assert exchange(address, post(b"abc").replace(b"connection: close\r\n", b"")).endswith(
            b"\r\n\r\n3"
        )


@pytest.mark.parametrize(
    "head",
    [
        b"POST /size HTTP/1.1\r\nhost: x\r\na: " + b"b" * 1_000_000,  # one header that never ends
        b"POST /" + b"x" * 1_000_000,  # a line that never ends
        b"POST /size HTTP/1.1\r\nhost: x\r\n" + b"a: b\r\n" * 20_000,
        b"POST /size HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n0\r\na: "
        + b"b" * 1_000_000,  # a trailer
    ],
)
def test_heads_are_bounded_before_any_key_is_read(head):
    with listening() as address:
        pieces = [head[i : i + 1000] for i in range(0, len(head), 1000)]
        answer = exchange(address, *pieces)
        # A reset while the client still sends may take the answer away.
        assert answer.startswith(b"HTTP/1.1 400") or not answer, answer[:100]
        assert exchange(address, post(b"x")).startswith(b"HTTP/1.1 200")


CHUNKED = b"POST /size HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n"


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (
            b"POST /size HTTP/1.1\r\nhost: x\r\n" + b"a:b\r\n" * 300 + b"content-length: 0\r\n\r\n",
            400,
        ),
        (CHUNKED + b"0\r\n" + b"a:b\r\n" * 300 + b"\r\n", 400),
        (CHUNKED + b"1\r\nx\r\n" * 2000 + b"0\r\n\r\n", 400),
        (CHUNKED + b"1\r\nx\r\n" * 1000 + b"0\r\na: b\r\n\r\n", 200),
        (CHUNKED + (b"80\r\n" + b"x" * 128 + b"\r\n") * 2000 + b"0\r\n\r\n", 200),
        (
            b"POST /size HTTP/1.1\r\nhost: x\r\n" + b"a:b\r\n" * 200 + b"content-length: 0\r\n\r\n",
            200,
        ),
    ],
)
def test_what_takes_long_to_parse_is_refused(request_, status):
    """A head of 64 KiB in short lines held all others up for 40 ms, and a body of tiny chunks
    without end.
    """
    with listening(max_header=65_536) as address:
        assert exchange(address, request_).startswith(b"HTTP/1.1 %d " % status)


def test_a_body_that_goes_wrong_after_the_answer_began_leaves_no_traceback(caplog):
    async def answer(scope, receive, send) -> None:
        await send(
            {"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]}
        )
        await send({"type": "http.response.body", "body": b""})

    config = bounded_config(answer, ServiceSettings(**LIMITS))
    config.lifespan = "off"
    with (
        on_port(config) as port,
        socket.create_connection(("127.0.0.1", port), timeout=20) as connection,
    ):
        connection.sendall(CHUNKED)
        assert connection.recv(65_536).startswith(b"HTTP/1.1 200")
        connection.sendall(b"no size\r\n")
        assert read(connection) == b""
    assert not [record for record in caplog.records if record.exc_info]


@pytest.mark.parametrize(
    "lines",
    [
        b"content-length: 1\r\ntransfer-encoding: chunked\r\n\r\n1\r\nx\r\n0\r\n\r\n",
        b"authorization: Bearer a\r\nauthorization: Bearer b\r\ncontent-length: 1\r\n\r\nx",
    ],
)
def test_what_a_proxy_may_have_read_otherwise_is_refused_and_ends_the_connection(lines):
    with listening() as address:
        request = b"POST /size HTTP/1.1\r\nhost: x\r\n" + lines
        found = exchange(address, request + post(b"x"))
        assert found.startswith(b"HTTP/1.1 400"), found[:100]
        assert found.count(b"HTTP/1.1 ") == 1
        assert b"connection: close" in found.lower()


def test_connections_are_bounded():
    with listening(header_timeout=30.0) as address:
        held = [socket.create_connection(address, timeout=20) for _ in range(4)]
        try:
            until(lambda: exchange(address, post(b"x")).startswith(b"HTTP/1.1 503"))
        finally:
            for connection in held:
                connection.close()
        until(lambda: exchange(address, post(b"x")).startswith(b"HTTP/1.1 200"))


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Addresses of this machine count as those of others."""
    for module in ("bodies", "routes", "server"):
        monkeypatch.setattr(f"assay.poc.net.{module}.client_of", lambda address: address)


def another(address: tuple[str, int]) -> bytes:
    """Return how a request of another client is answered."""
    with socket.create_connection(
        address, timeout=20, source_address=("127.0.0.2", 0)
    ) as connection:
        connection.sendall(post(b"x"))
        return read(connection)


def test_one_client_cannot_hold_all_connections(elsewhere):
    with listening(max_connections=8, max_client_connections=2, header_timeout=30.0) as address:
        held = [socket.create_connection(address, timeout=20) for _ in range(2)]  # they ask nothing
        try:
            until(lambda: exchange(address, post(b"x")) == b"")
            assert another(address).startswith(b"HTTP/1.1 200")
        finally:
            for connection in held:
                connection.close()
        until(lambda: exchange(address, post(b"x")).startswith(b"HTTP/1.1 200"))


@pytest.fixture
def clients(monkeypatch: pytest.MonkeyPatch) -> list["weakref.ref[str]"]:
    """References to the name of the client of each request, which do not keep it in memory."""
    real = _server.client_of
    names: list[weakref.ref[str]] = []

    class Name(str):
        """A string to which a weak reference can be made."""

    def client_of(address: str) -> str | None:
        client = real(address)
        if client is None:
            return None
        name = Name(client)
        names.append(weakref.ref(name))
        return name

    monkeypatch.setattr(_server, "client_of", client_of)
    return names


def test_one_client_of_a_proxy_cannot_hold_all_requests(clients, caplog):
    # The log would keep the tracebacks of requests that were left, and the names with them.
    caplog.set_level(logging.CRITICAL, logger="uvicorn.error")

    with listening(max_connections=8, max_client_connections=2) as address:
        held = [socket.create_connection(address, timeout=20) for _ in range(2)]
        of = [
            post(b"x", b"x-forwarded-for: " + name)
            for name in (b"2001:db8::1", b"2001:DB8:0:0:1::1", b"192.0.2.7")
        ]
        for connection, whole in zip(held, of, strict=False):  # spelled in two ways
            connection.sendall(whole[:-1])  # a request whose body does not come
        try:
            until(lambda: exchange(address, of[0]).startswith(b"HTTP/1.1 429"))
            refused = exchange(address, of[0])
            assert refused.startswith(b"HTTP/1.1 429")
            assert b"2 requests of one client are open" in refused
            assert exchange(address, of[2]).startswith(b"HTTP/1.1 200"), (
                "another client is not concerned"
            )
        finally:
            for connection in held:
                connection.close()
        assert clients
        until(lambda: not any(name() for name in clients))  # those that left are forgotten
        assert exchange(address, of[0]).startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize("part", [b"", b"POST /size HTTP/1.1\r\na: "])
def test_a_head_that_does_not_come_to_its_end_is_ended(part):
    """Also where a byte comes now and then, and where the connection was served before."""
    with (
        listening(header_timeout=1.0) as address,
        socket.create_connection(address, timeout=20) as slow,
    ):
        slow.sendall(post(b"x").replace(b"connection: close\r\n", b"") + part)
        slow.settimeout(0.2)
        for _ in range(60):
            try:
                if part:
                    slow.sendall(b"b")
                if slow.recv(65_536) == b"":
                    return
            except TimeoutError:
                continue
            except OSError:
                return
        pytest.fail("still open")


def test_requests_that_are_sent_ahead_do_not_wait_in_memory():
    """Each answer let another quarter of a mebibyte in, so that one connection took what it
    liked.
    """
    ahead = post(b"").replace(b"connection: close\r\n", b"").replace(b"/size", b"/later")
    with listening() as address, socket.create_connection(address, timeout=20) as connection:
        with pytest.raises(ConnectionError):
            connection.sendall(ahead * (2**25 // len(ahead)))
        assert exchange(address, post(b"x")).startswith(b"HTTP/1.1 200")


def test_a_proxy_on_this_machine_may_hold_all_requests():
    with (
        listening(max_client_connections=1) as address,
        socket.create_connection(address) as held,
    ):
        held.sendall(post(b"x")[:-1])
        assert exchange(address, post(b"x")).startswith(b"HTTP/1.1 200")


def test_a_client_is_an_address_or_a_network_of_ipv6():
    here = dict.fromkeys(("127.0.0.1", "::1", "::ffff:127.0.0.1", ""))
    known = {
        "192.0.2.7": "192.0.2.7",
        "unread": "unread",
        "::ffff:192.0.2.7": "192.0.2.7",
        "fe80::1%eth0": "fe80::/64",
    }
    for address, client in (here | known | {"2001:db8:1:2:3:4:5:6": "2001:db8:1:2::/64"}).items():
        assert _server.client_of(address) == client


def test_a_collection_of_garbage_does_not_walk_the_libraries(monkeypatch):
    """It took .9 s, in which nothing was answered, whenever some ten thousand objects had come."""
    runtime = SimpleNamespace(
        loaded=Future(), failed=Future(), closing=threading.Event(), ended=True
    )

    def run(server, sockets):
        runtime.loaded.set_result(None)
        server.started = True

    monkeypatch.setattr(uvicorn.Server, "run", run)
    gc.unfreeze()
    with listen("127.0.0.1", 0) as listener:
        run_app(FastAPI(), ServiceSettings(), listener, runtime=runtime)
    assert gc.get_freeze_count() > 10_000
    gc.unfreeze()


# Bodies


def test_one_client_cannot_hold_the_room_of_bodies_and_stalled_ones_are_ended(
    elsewhere, monkeypatch
):
    """Its large bodies leave room for those of others, and for small ones of its own."""
    monkeypatch.setattr("assay.poc.net.bodies.BODY_GRACE", 1.0)
    bodies = Bodies(2**17, 2**20)
    large = 2**17

    async def take(client: str, size: int, *, ends: bool) -> int:
        parts = [b"x" * (size - 2)] + [b"xx"] * ends

        async def receive() -> dict:
            await asyncio.sleep(0 if parts else 60)
            return {
                "type": "http.request",
                "body": parts.pop(0),
                "more_body": bool(parts) or not ends,
            }

        headers = [(b"content-length", str(size).encode())]
        scope = {"type": "http", "method": "POST", "headers": headers, "client": (client, 1)}
        try:
            async with bodies.read(Request(scope, receive)) as body:
                return len(body)
        except Refusal as refusal:
            return -refusal.status

    async def send() -> None:
        stalled = [asyncio.create_task(take("a", large, ends=False)) for _ in range(9)]
        await asyncio.sleep(0.1)
        assert await take("b", large, ends=True) == large
        assert await take("a", 2**16, ends=True) == 2**16
        assert await take("a", large, ends=True) == -503
        assert sorted(await asyncio.gather(*stalled)) == [-503] * 8 + [-408]
        assert await take("a", large, ends=True) == large

    asyncio.run(send())


@pytest.mark.parametrize(
    ("body", "word"),
    [
        (
            b'{"public_key":"a","public_key":"b","block_hash":"x","block_height":1,"r_target":1.4}',
            "twice",
        ),
        (str(ROUND).replace("'", '"').encode("utf-16"), "utf-8"),
        (str(ROUND).replace("'", '"').encode("utf-16-le"), "JSON"),
        (b"{" * 10, "JSON"),
        (b"[" * 200_000, "deeply"),
    ],
)
def test_bodies_are_read_strictly(service, body, word):
    answer = service.client.post(f"{PREFIX}/init", content=body, headers=JSON)
    assert (answer.status_code, word in answer.text) == (422, True)
    assert {"detail", "wanted", "do", "errors"} <= answer.json().keys()
    assert service.status()["config"] is None


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        (ValidateRequest, BLOCK | {"nonces": [0], "dist": [""] * 9, "node_id": 0}),
        (ValidateRequest, BLOCK | {"nonces": [""] * 9, "dist": [1.4], "node_id": 0}),
        (Validation, {"artifacts": [0] * 9}),
        (Artifact, {"nonce": 0, "k_points_steps": [""] * 9}),
    ],
)
def test_of_a_list_of_wrong_values_the_first_is_looked_at(kind, body):
    """All of them would take three hundred times the memory of their body."""
    with pytest.raises(ValidationError) as caught:
        kind.model_validate(body)
    assert caught.value.error_count() == 1


def test_a_call_without_a_body_takes_whatever_comes_with_it(service):
    assert (
        service.client.post(f"{PREFIX}/stop", content=b"not JSON", headers=JSON).status_code == 200
    )


def test_a_missing_content_type_is_said(service):
    answer = service.client.post(f"{PREFIX}/init", content=str(ROUND).replace("'", '"').encode())
    assert answer.status_code == 422
    assert "Content-Type: application/json" in answer.json()["do"]


def test_a_client_that_leaves_causes_no_traceback(service):
    app = service.client.app
    sent = []
    messages = [
        {"type": "http.request", "body": b"{", "more_body": True},
        {"type": "http.disconnect"},
    ]

    async def receive() -> dict:
        return messages.pop(0)

    async def send(message: dict) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
    }
    scope |= {"path": f"{PREFIX}/init", "raw_path": b"", "root_path": "", "query_string": b""}
    scope |= {"server": ("x", 1), "client": ("x", 1)}
    scope["headers"] = [(b"host", b"127.0.0.1"), (b"content-type", b"application/json")]
    asyncio.run(app(scope, receive, send))
    assert sent[0]["status"] == 400


# Answers


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        *(
            ("GET", path, None, 200)
            for path in ("/health", "/ready", "/metrics", "/docs", "/openapi.json")
        ),
        *(
            ("GET", path, None, 404)
            for path in ("/nope", f"{PREFIX}/nope", f"{PREFIX}/generate/none")
        ),
        *(
            ("GET", f"{PREFIX}{path}", None, 200)
            for path in ("/status", "/status?after=0", "/snapshot")
        ),
        ("POST", f"{PREFIX}/stop", None, 200),
        ("POST", f"{PREFIX}/init", {}, 422),
        ("POST", f"{PREFIX}/phase/generate", None, 409),
        ("PUT", f"{PREFIX}/status", None, 405),
    ],
)
def test_every_answer_has_the_safe_headers_and_a_refusal_three_parts(
    service, method, path, body, status
):
    answer = service.client.request(method, path, json=body)
    assert answer.status_code == status
    assert (answer.headers["cache-control"], answer.headers["x-content-type-options"]) == (
        "no-store",
        "nosniff",
    )
    if status >= 400:
        assert {"detail", "wanted", "do"} <= answer.json().keys()


def test_head_is_answered_as_get_without_the_body(service, tmp_path):
    """Probes of proxies and of uptime services ask so. It leaves no stream open."""
    paths = ("/health", "/ready", "/metrics", "/docs", "/openapi.json", "/", "/api/v1/receipts")
    for path in (*paths, f"{PREFIX}/status", f"{PREFIX}/status?after=0", f"{PREFIX}/snapshot"):
        got, head = (service.client.request(method, path) for method in ("GET", "HEAD"))
        assert (head.status_code, head.content) == (got.status_code, b""), path
        assert head.headers["content-type"] == got.headers["content-type"]
    for _ in range(40):  # more than streams
        assert service.client.head(f"{PREFIX}/events").status_code == 200
    assert service.client.head(f"{PREFIX}/stop").status_code == 405
    receiver = TestClient(
        create_receiver(Received(tmp_path / "r.sqlite3"), ServiceSettings()),
        base_url="http://127.0.0.1",
    )
    assert receiver.head("/stats").status_code == receiver.head("/health").status_code == 200


def test_metrics_of_several_processes_are_refused(monkeypatch):
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", "metrics")
    with (
        listen("127.0.0.1", 0) as listener,
        refuses(UsageError, "metrics of several processes are refused"),
    ):
        run_app(None, None, listener)


# The log


def test_the_log_names_rounds_verdicts_callbacks_and_refusals(service):
    with capture_logs() as said:
        service.post("/init/validate", ROUND | {"callback_url": "http://127.0.0.1:9/"})
        service.post("/validate", BLOCK | {"nonces": [0], "dist": [1.4], "node_id": 0})
        service.post("/init", {}, status=422)
        until(lambda: any(line["event"] == "callback" for line in said))
    lines = {line["event"]: line for line in said}
    assert (lines["state"]["block"], lines["state"]["key"]) == (
        BLOCK["block_hash"],
        BLOCK["public_key"],
    )
    assert lines["validated"]["key"] == BLOCK["public_key"]
    assert (lines["refused"]["route"], lines["refused"]["status"]) == (f"{PREFIX}/init", 422)
    assert lines["callback"]["kind"] == "validated"


def test_a_client_cannot_make_the_log_grow_at_will(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("assay.poc.net.logs.time.monotonic", lambda: now[0])
    budget = LogBudget(60)
    log = structlog.get_logger()
    with structlog.testing.capture_logs() as said:
        for _ in range(1000):
            budget.info(log, "asked too often")
        assert sum(entry["event"] == "asked too often" for entry in said) == 60
        now[0] = 1.5
        budget.info(log, "asked too often")
    # Servers of other tests may write as well.
    own = [entry for entry in said if entry["event"] == "asked too often"]
    assert own[-1] == {"event": "asked too often", "log_level": "info", "skipped": 940}


def test_malformed_requests_are_not_logged_one_by_one(restored_logs):
    configure_logs("json")
    assert not logging.getLogger("uvicorn.error").isEnabledFor(logging.WARNING)


@pytest.mark.parametrize("form", ["console", "json"])
def test_what_a_sender_names_does_not_steer_the_terminal_of_the_log(restored_logs, capsys, form):
    configure_logs(form)
    structlog.get_logger("assay.receiver").info(
        "callback", id="msg_\x9b2J\x1b[2J\u202e", kind="a\nforged"
    )
    written = capsys.readouterr().err
    assert written.count("\n") == 1
    assert written.rstrip("\n").isprintable()
    assert "9b2J" in written


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_answers_are_not_held_back(host):
    """asyncio sets TCP_NODELAY on what it accepts only where the listener names its protocol."""
    with listen(host, 0) as listener:
        listener.listen()
        assert listener.proto == socket.IPPROTO_TCP
        with socket.create_connection(listener.getsockname()):
            accepted, _ = listener.accept()
            with accepted:
                assert accepted.proto == socket.IPPROTO_TCP
