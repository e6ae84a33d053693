"""The receiver of the package: signatures, repeated callbacks, and what it answers."""

import base64
from datetime import UTC, datetime, timedelta

import pytest
from standardwebhooks import Webhook

from assay.poc.service.http import Received, create_receiver
from tests.poc.service.conftest import BLOCK, ROUND, TestClient
from tests.poc.service.test_delivery import SECRET
from tests.waiting import until

OTHER = "whsec_" + base64.b64encode(b"x" * 32).decode()
BODY = '{"nonces":[1,2,3],"dist":[1.4,1.4,1.4]}'


def _signed(secret: str, body: str = BODY, message_id: str = "msg_1", at: datetime | None = None) -> dict[str, str]:
    at = at or datetime.now(UTC)
    return {
        "webhook-id": message_id,
        "webhook-timestamp": str(int(at.timestamp())),
        "webhook-signature": Webhook(secret).sign(message_id, at, body),
    }


@pytest.fixture
def store(tmp_path):
    return Received(tmp_path / "received.sqlite3")


@pytest.fixture
def client(store):
    return TestClient(create_receiver(store, (OTHER, SECRET), max_body=10_000))


def test_a_callback_is_kept_once(client, tmp_path):
    for new in (True, False, False):
        answer = client.post("/generated", content=BODY, headers=_signed(SECRET))
        assert (answer.status_code, answer.json()["new"]) == (200, new)
    assert client.get("/stats").json() == {"callbacks": 1, "nonces": 3, "repeated": 2}
    (batch,) = client.get("/batches").json()["batches"]
    assert (batch["kind"], batch["copies"], batch["body"]["nonces"]) == ("generated", 3, [1, 2, 3])
    again = TestClient(create_receiver(Received(tmp_path / "received.sqlite3"), (SECRET,)))
    assert again.post("/generated", content=BODY, headers=_signed(SECRET)).json()["new"] is False
    assert client.delete("/clear").status_code == 200
    assert client.get("/stats").json()["callbacks"] == 0


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"webhook-id": "msg_1"},
        _signed("whsec_" + base64.b64encode(b"y" * 32).decode()),
        _signed(SECRET, body="{}"),
        _signed(SECRET) | {"webhook-id": "msg_2"},
        _signed(SECRET) | {"webhook-signature": "v1,!!!"},
        _signed(SECRET) | {"webhook-signature": "nonsense"},
        _signed(SECRET, at=datetime.now(UTC) - timedelta(minutes=6)),
    ],
)
def test_what_nobody_signed_is_refused(client, headers):
    assert client.post("/generated", content=BODY, headers=headers).status_code in (400, 401)
    assert client.get("/stats").json()["callbacks"] == 0


@pytest.mark.parametrize("body", [b"", b"[]", b"\xff", b"{"])
def test_what_is_no_object_is_refused(store, body):
    open_client = TestClient(create_receiver(store))
    assert open_client.post("/validated", content=body, headers={"webhook-id": "msg_1"}).status_code == 400
    assert open_client.post("/validated", content=b"{}").status_code == 400


def test_what_is_too_long_is_refused(client):
    assert client.post("/generated", content=b"x" * 20_000).status_code == 413


def test_service_and_receiver_agree(serving, store):
    from tests.end_to_end.receiver import FlakyReceiver

    relay = FlakyReceiver(trouble=0.4, patience=0.1, seed=5)
    checked = TestClient(create_receiver(store, (SECRET,)))
    try:
        with serving(callback_secrets=(SECRET,)) as service:
            service.post("/init/validate", ROUND | {"callback_url": relay.url})
            for nonce in range(5):
                service.post("/validate", BLOCK | {"nonces": [nonce], "dist": [1.4], "node_id": 0})
            until(lambda: service.controller.outbox.counts()["pending"] == 0)
    finally:
        relay.close()
    for path, headers, body in relay.requests:
        names = ("webhook-id", "webhook-timestamp", "webhook-signature")
        assert checked.post(path, content=body, headers={name: headers[name] for name in names}).status_code == 200
    assert checked.get("/stats").json()["callbacks"] == 5
