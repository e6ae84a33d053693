"""The receiver of the package: signatures, repeated callbacks, and what it answers."""

import asyncio
import base64
import stat
from datetime import UTC, datetime, timedelta

import pytest
from starlette.requests import Request

from assay.cli import run
from assay.errors import StorageError
from assay.poc.net.bodies import DISCARDED, Bodies
from assay.poc.net.refusals import Refusal
from assay.poc.service import ServiceSettings, create_receiver
from assay.poc.service import receiver as _receiver
from assay.poc.service.receiver import Received
from tests.poc.service.conftest import TestClient, execute, signed
from tests.poc.service.test_delivery import SECRET
from tests.wordings import refuses

KEY = "all-" + "x" * 20
READ = "read-" + "x" * 20
OTHER = "whsec_" + base64.b64encode(b"x" * 32).decode()
HERE = "http://127.0.0.1"
BODY = '{"nonces":[1,2,3],"dist":[1.4,1.4,1.4]}'


@pytest.fixture
def store(tmp_path):
    return Received(tmp_path / "received.sqlite3")


@pytest.fixture
def client(store):
    """A client that has the key; posts need a signature from every sender."""
    receiver = create_receiver(
        store,
        ServiceSettings(
            callback_secrets=(OTHER, SECRET), api_keys=(KEY,), read_keys=(READ,), max_body=10_000
        ),
    )
    return TestClient(receiver, headers={"Authorization": f"Bearer {KEY}"})


def test_an_answer_is_bounded_in_bytes(client, monkeypatch):
    """Ten thousand callbacks of 2 MiB each would be an answer of 20 GiB."""
    monkeypatch.setattr(_receiver, "MOST_LISTED", 2 * len(BODY))
    for number in range(5):
        client.post("/generated", content=BODY, headers=signed(SECRET, BODY, f"msg_{number}"))
    pages = []
    seen = 0
    while found := client.get("/batches", params={"after": seen, "limit": 10_000}).json()[
        "batches"
    ]:
        pages.append([row["id"] for row in found])
        seen = found[-1]["seq"]
    assert pages == [["msg_0", "msg_1"], ["msg_2", "msg_3"], ["msg_4"]]
    monkeypatch.setattr(_receiver, "MOST_LISTED", 1)
    assert (
        len(client.get("/batches").json()["batches"]) == 1
    )  # one that is larger is not held back for ever


def test_a_callback_is_kept_once(client, tmp_path):
    for new in (True, False, False):
        answer = client.post("/generated", content=BODY, headers=signed(SECRET, BODY))
        assert (answer.status_code, answer.json()["new"]) == (200, new)
    assert client.get("/stats").json() == {"callbacks": 1, "nonces": 3, "repeated": 2}
    (batch,) = client.get("/batches").json()["batches"]
    assert (batch["kind"], batch["copies"], batch["body"]["nonces"]) == ("generated", 3, [1, 2, 3])
    again = TestClient(
        create_receiver(
            Received(tmp_path / "received.sqlite3"), ServiceSettings(callback_secrets=(SECRET,))
        )
    )
    assert (
        again.post("/generated", content=BODY, headers=signed(SECRET, BODY)).json()["new"] is False
    )
    assert client.delete("/clear").status_code == 200
    assert client.get("/stats").json()["callbacks"] == 0


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"webhook-id": "msg_1"},
        signed("whsec_" + base64.b64encode(b"y" * 32).decode(), BODY),
        signed(SECRET, "{}"),
        signed(SECRET, BODY) | {"webhook-id": "msg_2"},
        signed(SECRET, BODY) | {"webhook-signature": "v1,!!!"},
        signed(SECRET, BODY) | {"webhook-signature": "nonsense"},
        signed(SECRET, BODY, at=datetime.now(UTC) - timedelta(minutes=6)),
    ],
)
def test_what_nobody_signed_is_refused(client, headers):
    assert client.post("/generated", content=BODY, headers=headers).status_code in (400, 401)
    assert client.get("/stats").json()["callbacks"] == 0


@pytest.mark.parametrize("body", [b"", b"[]", b"\xff", b"{"])
def test_what_is_no_object_is_refused(store, body):
    open_client = TestClient(create_receiver(store, ServiceSettings()), base_url=HERE)
    assert (
        open_client.post("/validated", content=body, headers={"webhook-id": "msg_1"}).status_code
        == 400
    )
    assert open_client.post("/validated", content=b"{}").status_code == 400


@pytest.mark.parametrize("keys", [(), (KEY,)])
@pytest.mark.parametrize(
    ("method", "path"), [("GET", "/batches"), ("GET", "/stats"), ("DELETE", "/clear")]
)
def test_everything_but_signed_posts_needs_a_key(store, keys, method, path):
    """Anyone who reaches the port could erase, or read, what a node was told."""
    stranger = TestClient(
        create_receiver(store, ServiceSettings(callback_secrets=(SECRET,), api_keys=keys)),
        base_url=HERE,
    )
    assert (
        stranger.post("/generated", content=BODY, headers=signed(SECRET, BODY)).status_code == 200
    )
    for headers in ({}, {"Authorization": "Bearer wrong"}):
        assert stranger.request(method, path, headers=headers).status_code == 401
    assert stranger.get("/health").status_code == 200
    assert store.stats()["callbacks"] == 1


def test_a_read_key_does_not_clear(client):
    headers = {"Authorization": f"Bearer {READ}"}
    assert {client.get(path, headers=headers).status_code for path in ("/stats", "/batches")} == {
        200
    }
    assert client.delete("/clear", headers=headers).status_code == 403


@pytest.mark.parametrize(
    "headers",
    [
        {"Host": "evil.example"},
        {"Origin": "https://evil.example"},
        {"Sec-Fetch-Site": "cross-site"},
    ],
)
def test_without_a_secret_only_this_machine_is_answered(store, headers):
    receiver = TestClient(create_receiver(store, ServiceSettings()), base_url=HERE)
    assert receiver.get("/stats").status_code == 200
    for method, path in (
        ("GET", "/batches"),
        ("GET", "/stats"),
        ("DELETE", "/clear"),
        ("POST", "/generated"),
    ):
        assert receiver.request(method, path, headers=headers).status_code == 403


@pytest.mark.parametrize(
    "body",
    [
        '{"nonces":[1],"dist":[NaN]}',
        '{"nonces":[1],"dist":[1e400]}',
        '{"nonces":[1],"nonces":[2]}',
        r'{"nonces":[1],"public_key":"\ud800"}',
        '{"nonces":' + "[" * 70 + "]" * 70 + "}",
        '{"nonces":' + "[" * 4000 + "]" * 4000 + "}",
    ],
)
def test_poisoned_bodies_are_refused(client, body):
    answer = client.post("/generated", content=body, headers=signed(SECRET, body))
    assert answer.status_code == 400
    assert {"detail", "wanted", "do"} <= answer.json().keys()
    assert client.get("/batches").json() == {"batches": []}


def test_a_body_whose_nonces_are_no_list_is_counted_as_none(client):
    body = '{"nonces":5,"artifacts":"x"}'
    assert client.post("/generated", content=body, headers=signed(SECRET, body)).status_code == 200
    assert client.get("/stats").json() == {"callbacks": 1, "nonces": 0, "repeated": 0}


def test_a_file_of_the_first_version_opens(tmp_path):
    path = tmp_path / "received.sqlite3"
    columns = (
        "seq INTEGER NOT NULL, id TEXT NOT NULL, kind TEXT NOT NULL, at FLOAT NOT NULL, nonces "
        "INTEGER NOT NULL"
    )
    columns += ", copies INTEGER NOT NULL, body TEXT NOT NULL, PRIMARY KEY (seq), UNIQUE (id)"
    execute(
        path, f"CREATE TABLE received ({columns})"
    )  # as the first version made it: no migrations
    execute(path, "INSERT INTO received VALUES (NULL, 'msg_0', 'generated', 0, 3, 1, ?)", (BODY,))
    receiver = TestClient(create_receiver(Received(path), ServiceSettings()), base_url=HERE)
    (sound,) = receiver.get("/batches").json()["batches"]
    assert sound["body"]["nonces"] == [1, 2, 3]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_the_database_of_another_program_is_left_alone(tmp_path):
    path = tmp_path / "notes.sqlite3"
    execute(path, "CREATE TABLE notes (text)")
    before = path.read_bytes()
    with refuses(StorageError, "the database of another program is left alone"):
        Received(path)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    "query", ["after=-1", f"after={10**22}", f"limit={10**22}", "limit=0", "after=x"]
)
def test_queries_out_of_range_are_refused(client, query):
    answer = client.get(f"/batches?{query}")
    assert (answer.status_code, "wanted" in answer.json()) == (422, True)


def test_the_body_says_which_kind_a_callback_is(client):
    """The path is not signed: a captured verdict must not take the place of nonces, nor its own."""
    verdict = '{"nonces":[1],"fraud_detected":false}'
    headers = signed(SECRET, verdict)
    assert client.post("/generated", content=verdict, headers=headers).status_code == 400
    assert client.post("/validated", content=verdict, headers=headers).json()["new"] is True
    assert (
        client.post("/validated", content=BODY, headers=signed(SECRET, BODY, "msg_2")).status_code
        == 400
    )


@pytest.mark.parametrize("announced", ["1000", None])
@pytest.mark.parametrize("ends", [True, False])
def test_what_comes_of_a_body_that_is_too_large_is_bounded_and_not_kept(
    announced, ends, monkeypatch
):
    """Without an end as well: one that comes for ever is refused, and so is one that stops to
    come.
    """
    monkeypatch.setattr("assay.poc.net.bodies.BODY_SECONDS", 0.2)
    taken = []

    async def receive() -> dict:
        if len(taken) == 3 and ends:
            await asyncio.sleep(10)
        taken.append(100)
        return {"type": "http.request", "body": b"x" * 100, "more_body": True}

    async def whole() -> dict:
        return {"type": "http.request", "body": b"x" * 100, "more_body": False}

    async def send() -> int:
        headers = [(b"content-length", announced.encode())] if announced else []
        bodies = Bodies(100, 150)
        try:
            async with bodies.read(
                Request({"type": "http", "method": "POST", "headers": headers}, receive)
            ):
                return 200
        except Refusal as refusal:
            # Nothing of it counts any more: another one has all the room.
            async with bodies.read(
                Request({"type": "http", "method": "POST", "headers": []}, whole)
            ):
                return refusal.status

    assert asyncio.run(send()) == 413
    assert sum(taken) <= (DISCARDED + 1) * 100


def test_the_command_passes_secret_and_keys_on(monkeypatch, tmp_path):
    started = []
    monkeypatch.setattr(_receiver, "run_app", lambda *arguments: started.append(arguments))
    command = [
        "poc",
        "receive",
        "-o",
        str(tmp_path / "r.sqlite3"),
        "--host",
        "0.0.0.0",
        "--port",
        "0",
    ]
    assert run(command) == 2
    monkeypatch.setenv("ASSAY_CALLBACK_SECRET", SECRET)
    monkeypatch.setenv("ASSAY_API_KEY", KEY)
    assert run(command) == 0
    ((app, _, _),) = started
    asked = TestClient(app)
    assert asked.get("/stats").status_code == 401
    assert asked.get("/stats", headers={"Authorization": f"Bearer {KEY}"}).status_code == 200
