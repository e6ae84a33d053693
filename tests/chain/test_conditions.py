"""What the client's calls are answered in every condition of a service, and after a restart in it."""

import threading
from typing import Any

import pytest

from tests.chain.client import LEVELS, PATH
from tests.chain.mlnode import PUBLISHED
from tests.chain.test_bodies import BEGIN, JOB, SHARED
from tests.poc.service.conftest import Rig, Service, rig, serving  # noqa: F401
from tests.usual import usual
from tests.waiting import until

ASKED = SHARED | {"nonces": [1]}
CALLS: dict[str, tuple[str, str, Any]] = {
    "status": ("GET", "/status", None),
    "stop": ("POST", "/stop", {}),
    "stop with nothing": ("POST", "/stop", None),
    "begin": ("POST", BEGIN, SHARED),
    "queue": ("POST", JOB, ASKED),
    "ask": ("POST", JOB, ASKED | {"wait": True}),
    "unknown job": ("GET", f"{JOB}/8100:none", None),
}


@pytest.fixture(params=usual([PATH, PUBLISHED], PATH))
def prefix(request) -> str:
    """Each of the two paths."""
    return request.param


def call(service: Service, prefix: str, name: str) -> tuple[int, Any]:
    """Return status and body of the answer to a call."""
    method, path, body = CALLS[name]
    answer = service.client.request(method, prefix + path, json=body)
    return answer.status_code, answer.json()


def statuses(service: Service, prefix: str, *names: str) -> list[int]:
    """Return the statuses of the answers to calls in turn."""
    return [call(service, prefix, name)[0] for name in names]


def result(service: Service, prefix: str, body: Any) -> dict[str, Any]:
    """Queue a job, and return what it has in the end."""
    queued = service.client.post(prefix + JOB, json=body).json()

    def answer() -> dict[str, Any]:
        return service.client.get(f"{prefix}{JOB}/{queued['request_id']}").json()

    until(lambda: answer()["status"] == "completed", 60)
    return answer()


def state(service: Service, prefix: str) -> str:
    """Return the state that the client reads."""
    return call(service, prefix, "status")[1]["status"]


def test_before_a_model_is_there(rig: Rig, serving, prefix, monkeypatch):  # noqa: F811
    loaded = threading.Event()
    rig.load = lambda: loaded.wait(60)
    ready = Service.wait_ready
    monkeypatch.setattr(Service, "wait_ready", lambda _: None)
    with serving(compatibility="gonka") as service:
        assert state(service, prefix) == ("NO_BACKENDS" if prefix == PATH else "IDLE")
        names = ("stop", "stop with nothing", "begin", "queue", "ask", "unknown job")
        assert statuses(service, prefix, *names) == [200, 200, 503, 503, 503, 404]
        loaded.set()
        ready(service)
        assert state(service, prefix) == "IDLE"


def test_before_the_first_round(serving, prefix):  # noqa: F811
    with serving(compatibility="gonka") as service:
        names = ("status", "stop", "stop", "stop with nothing", "unknown job", "ask")
        assert statuses(service, prefix, *names) == [200, 200, 200, 200, 404, 200]
        assert state(service, prefix) == "IDLE"
        service.restart()
        assert state(service, prefix) == "IDLE"
        assert statuses(service, prefix, "begin", "begin", "stop", "stop") == [200, 409, 200, 200]
        assert state(service, prefix) == "IDLE"


def test_while_a_round_generates(serving, prefix):  # noqa: F811
    with serving(compatibility="gonka", wait=0.2) as service:
        made = result(service, prefix, ASKED)
        claim = ASKED | {"stat_test": LEVELS, "validation": {"artifacts": made["artifacts"]}}
        assert statuses(service, prefix, "begin") == [200]
        queued = service.client.post(f"{prefix}{JOB}", json=claim)
        assert (queued.status_code, queued.json()["status"]) == (200, "queued")
        # One that waits is told so in the end; a stop drops both, and the next is checked.
        waiting = service.client.post(f"{prefix}{JOB}", json=claim | {"wait": True})
        assert waiting.status_code == 503
        assert statuses(service, prefix, "stop", "stop") == [200, 200]
        dropped = service.client.get(f"{prefix}{JOB}/{queued.json()['request_id']}").json()
        assert dropped["status"] == "cancelled"
        checked = result(service, prefix, claim)
        assert (checked["n_total"], checked["n_mismatch"]) == (1, 0)


def test_a_restart_while_a_round_generates_and_jobs_wait(serving, prefix):  # noqa: F811
    with serving(compatibility="gonka") as service:
        assert statuses(service, prefix, "begin") == [200]
        until(lambda: service.controller.progress.checked > 0)
        job = call(service, prefix, "queue")[1]["request_id"]
        service.restart()
        assert state(service, prefix) == "IDLE"

        def ended() -> bool:
            return service.client.get(f"{prefix}{JOB}/{job}").json()["status"] == "completed"

        until(ended)
        assert statuses(service, prefix, "begin", "stop") == [200, 200]
        service.restart()
        assert state(service, prefix) == "IDLE"


def test_while_the_engine_fails_and_after_it(rig: Rig, serving, prefix):  # noqa: F811
    with serving(compatibility="gonka") as service:
        rig.fail = RuntimeError("no memory")
        assert statuses(service, prefix, "ask") == [503]
        assert statuses(service, prefix, "begin") == [200]
        until(lambda: state(service, prefix) == "IDLE")
        service.restart()
        assert state(service, prefix) == "IDLE"
        rig.fail = None
        assert statuses(service, prefix, "ask", "begin", "status", "stop") == [200] * 4
