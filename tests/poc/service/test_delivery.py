"""Callbacks: signatures, pauses, dead letters, and what a receiver may ask for."""

import base64
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from http.server import BaseHTTPRequestHandler

import pytest
from standardwebhooks import Webhook

from assay.poc.net import callback_urls as callbacks
from assay.poc.service.outbox import backoff, open_outbox, retry_after
from tests.end_to_end.receiver import Answering
from tests.poc.service.conftest import ARTIFACTS, BLOCK, PREFIX, ROUND, Service
from tests.waiting import until

SECRET = "whsec_" + base64.b64encode(b"0123456789abcdef0123456789abcdef").decode()
OLD_SECRET = "whsec_" + base64.b64encode(b"fedcba9876543210fedcba9876543210").decode()
Answer = tuple[int, dict[str, str]]


class Receiver(Answering):
    """Answers every callback with what the test says."""

    def __init__(self, answer: Callable[[int], Answer] = lambda n: (200, {})) -> None:
        self.seen: list[tuple[float, str, dict[str, str], bytes]] = []
        self._answer = answer
        super().__init__()

    def handle(self, handler: BaseHTTPRequestHandler) -> None:
        body = handler.rfile.read(int(handler.headers["Content-Length"]))
        headers = {name.lower(): value for name, value in handler.headers.items()}
        self.seen.append((time.monotonic(), handler.path, headers, body))
        status, extra = self._answer(len(self.seen))
        self.respond(handler, status, extra.pop("says", "").encode(), **extra)


@pytest.fixture
def receive() -> Iterator[Callable[..., Receiver]]:
    with ExitStack() as opened:
        yield lambda *answer: opened.enter_context(Receiver(*answer))


def owe_one(service: Service, url: str) -> None:
    """Let the service owe exactly one callback: a verdict."""
    service.post("/init/validate", ROUND | {"callback_url": url})
    service.post("/validate", BLOCK | {"nonces": [0], "dist": [1.4], "node_id": 0})


def test_every_secret_signs_and_the_id_stays(serving, receive):
    receiver = receive(lambda n: (500 if n < 3 else 200, {}))
    with serving(callback_secrets=(SECRET, OLD_SECRET)) as service:
        owe_one(service, receiver.url + "/hook/")
        until(lambda: service.controller.outbox.counts()["pending"] == 0)
    assert len(receiver.seen) == 3
    assert {path for _, path, _, _ in receiver.seen} == {"/hook/validated"}
    assert len({headers["webhook-id"] for _, _, headers, _ in receiver.seen}) == 1
    assert len({body for _, _, _, body in receiver.seen}) == 1
    for _, _, headers, body in receiver.seen:
        for secret in (SECRET, OLD_SECRET):
            values = Webhook(secret).verify(body, headers)
    assert values["public_key"] == "node_A"
    assert values["nonces"] == [0]


def test_retry_after_is_honoured(service, receive):
    receiver = receive(lambda n: (503, {"Retry-After": "1"}) if n == 1 else (200, {}))
    owe_one(service, receiver.url)
    until(lambda: len(receiver.seen) == 2)
    assert receiver.seen[1][0] - receiver.seen[0][0] >= 1.0
    assert "webhook-signature" not in receiver.seen[0][2]  # there is no secret


def test_a_pause_that_the_clock_made_longer_than_any_is_over(service, receive):
    receiver = receive(lambda n: (503, {"Retry-After": "3600"}) if n == 1 else (200, {}))
    owe_one(service, receiver.url)
    until(lambda: [row.attempts for row in service.controller.outbox.rows(["pending"], 1)] == [1])
    service.sql(
        "UPDATE outbox SET next_attempt_at = next_attempt_at + 10 * 86400"
    )  # by a clock that was set back
    until(lambda: len(receiver.seen) == 2)


@pytest.mark.parametrize(
    ("status", "to"), [(301, ""), (302, ""), (302, "http://xn--a"), (307, ""), (308, "")]
)
def test_redirects_are_not_followed(serving, receive, status, to):
    """Nor do they end the delivery where httpx cannot read them."""
    elsewhere = receive()
    receiver = receive(lambda n: (status, {"Location": (to or elsewhere.url) + "/stolen"}))
    with serving(callback_attempts=2) as service:
        owe_one(service, receiver.url)
        until(lambda: service.controller.outbox.counts()["dead"] == 1)
    assert not elsewhere.seen
    assert len(receiver.seen) == 2


def test_dead_letters_are_kept_and_replayed_while_the_service_runs(serving, receive):
    healthy = []
    receiver = receive(lambda n: (200 if healthy else 500, {}))
    with serving(callback_attempts=3) as service:
        owe_one(service, receiver.url)
        until(lambda: service.controller.outbox.counts() == {"pending": 0, "dead": 1})
        assert len(receiver.seen) == 3
        healthy.append(True)
        with open_outbox(service.settings.data_dir) as outbox:
            (row,) = outbox.rows(["dead"], 10)
            assert (row.attempts, row.last_error) == (3, "HTTP 500")
            assert outbox.replay(["msg_other"]) == 0
            assert outbox.replay([row.id]) == 1
        until(lambda: service.controller.outbox.counts() == {"pending": 0, "dead": 0})
    assert receiver.seen[-1][2]["webhook-id"] == row.id


def test_a_dead_letter_says_what_the_receiver_answered_and_what_to_do(serving, receive):
    receiver = receive(lambda n: (404, {"says": f"no such block\x1b[2J\n {'x' * 100_000}"}))
    with serving(callback_attempts=1) as service:
        owe_one(service, receiver.url)
        until(lambda: service.controller.outbox.counts()["dead"] == 1)
        (row,) = service.controller.outbox.rows(["dead"], 1)
    assert row.last_error.startswith(r"HTTP 404: no such block\x1b[2J xxx")
    assert (
        "x; to do: correct that, or the callback URL, then run assay poc callbacks replay"
        in row.last_error
    )
    assert len(row.last_error) < 500


def test_a_blocked_address_is_a_dead_letter_at_once(serving, monkeypatch):
    found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", 9))]
    monkeypatch.setattr(callbacks.socket, "getaddrinfo", lambda *_, **__: found)
    with serving(allow_private_callbacks=False) as service:
        owe_one(service, "http://rebinding.example:9/")
        until(lambda: service.controller.outbox.counts()["dead"] == 1)
        (row,) = service.controller.outbox.rows(["dead"], 1)
    assert row.attempts == 1
    assert "private address" in row.last_error


def test_dead_letters_of_clients_are_theirs_and_end(serving):
    """The receiver of a client is not the operator's to repair."""
    key = "v" * 20
    with serving(
        callback_attempts=1,
        api_keys=("a" * 20,),
        validate_keys=(key,),
        allow_private_callbacks=False,
    ) as service:
        job = ARTIFACTS | {"nonces": [0], "url": "http://rebinding.example:9/"}
        headers = {"Authorization": f"Bearer {key}"}
        assert service.client.post(f"{PREFIX}/generate", json=job, headers=headers).is_success
        outbox = service.controller.outbox
        until(lambda: outbox.rows(["dead"], 1))
        assert outbox.counts() == {"pending": 0, "dead": 0}
        outbox.prune(3600)
        assert outbox.rows(["dead"], 1)
        service.sql("UPDATE outbox SET finished_at = 0")
        outbox.prune(3600)
        assert not outbox.rows(["dead"], 1)


def test_too_many_undelivered_callbacks_slow_generation_and_drop_nothing(serving, receive):
    healthy = []
    receiver = receive(lambda n: (200 if healthy else 503, {}))
    with serving(max_pending=3, callback_interval=0.0) as service:
        service.post("/init/generate", ROUND | {"callback_url": receiver.url})
        until(lambda: service.status()["paused"] == "callbacks")
        held = service.checked()
        assert (
            service.rig.batches * 4 - held <= 4 * 10
        )  # the short queue between engine and disk, and one batch
        healthy.append(True)
        until(lambda: service.checked() > held)
        service.post("/stop")
        until(lambda: service.controller.outbox.counts()["pending"] == 0)
        owed = service.client.get(f"{PREFIX}/status", params={"after": -1, "limit": 10_000}).json()[
            "valid_nonces"
        ]
    last = {
        headers["webhook-id"]: json.loads(body)["nonces"] for _, _, headers, body in receiver.seen
    }
    assert sorted(nonce for nonces in last.values() for nonce in nonces) == owed


def test_pauses_double_within_bounds():
    for attempts in range(100):
        full = min(60.0, 0.5 * 2.0**attempts)
        assert 0.5 * full <= backoff(attempts, 0.5, 60.0) <= full
    assert len({backoff(3, 1.0, 60.0) for _ in range(20)}) > 10


def test_retry_after_is_a_number_of_seconds():
    given = {
        "": 0,
        "7": 7,
        "-7": 0,
        "soon": 0,
        "²": 0,
        "9" * 400: 86_400,
        "Fri, 20 Nov 2026 10:00:30 GMT": 0,
    }
    for value, seconds in given.items():
        assert retry_after(value) == seconds, value


def test_names_of_a_client_that_are_not_answered_hold_no_callback_of_the_operator(
    serving, receive, monkeypatch
):
    """Four look-ups that hang for half a minute each let a round wait, and its callbacks die."""
    answered = threading.Event()
    look_up = socket.getaddrinfo

    def hanging(host, *about, **options):
        if host == "slow.example":
            assert answered.wait(60)
        return look_up("127.0.0.1", *about, **options)

    monkeypatch.setattr(socket, "getaddrinfo", hanging)
    receiver = receive()
    client, operator = "client-" + "x" * 20, "operator-" + "x" * 20
    with serving(validate_keys=(client,), api_keys=(operator,), callback_timeout=0.5) as service:

        def post(path: str, body: dict[str, object], key: str) -> None:
            headers = {"Authorization": f"Bearer {key}"}
            service.client.post(PREFIX + path, json=body, headers=headers).raise_for_status()

        try:
            job = ARTIFACTS | {"url": "http://slow.example/"}
            for nonce in range(4):
                post("/generate", job | {"nonces": [nonce]}, client)
            until(lambda: service.sql("SELECT sum(attempts > 0) FROM outbox") == [(4,)])
            url = receiver.url.replace("127.0.0.1", "operator.example")
            post("/init/generate", ROUND | {"callback_url": url}, operator)
            until(lambda: receiver.seen)
        finally:
            answered.set()


def test_a_receiver_of_one_client_that_hangs_holds_no_callback_of_another(serving, receive):
    """Each attempt lasts for the timeout, and a client may owe hundreds."""
    answered = threading.Event()

    def hang(number: int) -> Answer:
        answered.wait(60)
        return 200, {}

    hanging = receive(hang)
    receiver = receive()
    mine, theirs = "mine-" + "x" * 20, "theirs-" + "x" * 20
    with serving(validate_keys=(mine, theirs), callback_timeout=60.0) as service:

        def post(nonce: int, url: str, key: str) -> None:
            headers = {"Authorization": f"Bearer {key}"}
            job = ARTIFACTS | {"url": url, "nonces": [nonce]}
            service.client.post(PREFIX + "/generate", json=job, headers=headers).raise_for_status()

        try:
            for nonce in range(12):
                post(nonce, hanging.url, theirs)
            until(lambda: service.sql("SELECT count(*) FROM outbox") == [(12,)])
            post(0, receiver.url, mine)
            until(lambda: receiver.seen)
            assert len(hanging.seen) == 4  # half of callback_concurrency
        finally:
            answered.set()
