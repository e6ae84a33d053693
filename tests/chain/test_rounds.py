"""Rounds that the chain's client begins: restarts, other shares, and who may begin them."""

import pytest
from fastapi import FastAPI

from tests.chain.asgi import Direct
from tests.chain.client import PATH
from tests.chain.mlnode import PUBLISHED
from tests.end_to_end.receiver import FlakyReceiver
from tests.poc.service.conftest import ARTIFACTS, ROUND, rig, serving  # noqa: F401
from tests.waiting import until

OF_CHAIN = ARTIFACTS | {"node_id": 1}


def state(service) -> str:
    """Return the state that a start of the service leaves."""
    return service.controller.state.value


@pytest.mark.parametrize(
    ("resume", "prefix", "body", "left"),
    [
        ("auto", PATH, OF_CHAIN, "STOPPED"),
        ("auto", PUBLISHED, OF_CHAIN, "GENERATING"),
        ("auto", PUBLISHED, ROUND, "GENERATING"),
        ("always", PATH, OF_CHAIN, "GENERATING"),
        ("never", PATH, OF_CHAIN, "STOPPED"),
        ("never", PUBLISHED, ROUND, "STOPPED"),
    ],
)
def test_a_restart_goes_on_with_the_rounds_that_the_setting_names(
    serving,  # noqa: F811
    resume,
    prefix,
    body,
    left,
):
    with serving(resume=resume) as service:
        assert service.client.post(f"{prefix}/init/generate", json=body).status_code == 200
        until(lambda: service.controller.progress.checked > 0)
        service.restart()
        assert state(service) == left
        before = service.controller.progress.checked
        assert service.client.post(f"{PATH}/init/generate", json=OF_CHAIN).status_code == (
            409 if left == "GENERATING" or body is ROUND else 200
        )
        if left == "GENERATING" or body is not ROUND:
            until(lambda: service.controller.progress.checked > before)
        service.post("/stop")
        nonces = [nonce for (nonce,) in service.sql("SELECT nonce FROM records ORDER BY nonce")]
        assert nonces == list(range(body["node_id"], body["node_id"] + len(nonces)))


def test_a_round_that_was_generating_is_not_taken_up_once_none_may_be(serving):  # noqa: F811
    with serving() as service:
        service.post("/init/generate", ROUND)
        until(lambda: service.checked() > 0)
    with serving(resume="never") as service:
        assert state(service) == "STOPPED"
        service.post("/phase/generate")
        service.restart()
        assert state(service) == "STOPPED"


def test_a_call_that_is_refused_does_not_change_what_a_restart_does(serving):  # noqa: F811
    with serving() as service:
        service.post("/init/generate", ROUND)
        service.post("/stop")
        assert service.client.post(f"{PATH}/init/generate", json=OF_CHAIN).status_code == 409
        service.post("/phase/generate")
        service.restart()
        assert state(service) == "GENERATING"


def test_a_round_takes_another_share_and_goes_on_beyond_its_nonces(serving):  # noqa: F811
    with serving(compatibility="gonka") as service:

        def begin(number: int, count: int, status: int = 200) -> None:
            body = OF_CHAIN | {"node_id": number, "node_count": count, "batch_size": 4}
            service.post("/init/generate", body, status)

        def compute(number: int, count: int) -> None:
            begin(number, count)
            before = service.controller.progress.checked
            until(lambda: service.controller.progress.checked >= before + 8)
            service.post("/stop")

        compute(1, 1)
        first = [nonce for (nonce,) in service.sql("SELECT nonce FROM records ORDER BY nonce")]
        compute(3, 4)
        rows = service.sql("SELECT nonce FROM records ORDER BY nonce")
        both = [nonce for (nonce,) in rows]
        assert both[: len(first)] == first == list(range(1, len(first) + 1))
        later = both[len(first) :]
        assert later[0] == min(
            nonce for nonce in range(len(first) + 1, later[0] + 1) if nonce % 4 == 3
        )
        assert {nonce % 4 for nonce in later} == {3}
        begin(3, 4)
        assert service.status()["config"]["node_count"] == 4
        service.post("/stop")
        # What makes other numbers of the same nonces is still refused.
        other = OF_CHAIN | {"node_id": 3, "node_count": 4, "poc_stronger_rng": True}
        assert service.post("/init/generate", other, 409)["fields"] == ["strength"]
    with serving() as service:  # and in the published form, so is another share
        assert service.post("/init/generate", OF_CHAIN, 409)["fields"] == ["node_count", "node_id"]


@pytest.mark.parametrize("most", [4, 10_000])
def test_what_a_share_found_is_announced_under_its_number_and_not_the_next(serving, most):  # noqa: F811
    """A receiver refuses nonces that are not of the node that a callback names."""
    with (
        FlakyReceiver(trouble=1) as receiver,
        serving(compatibility="gonka", callback_interval=600.0, callback_nonces=most) as service,
    ):
        for number in (1, 3, 2):
            body = OF_CHAIN | {"node_id": number, "node_count": 4, "url": receiver.url}
            service.post("/init/generate", body)
            before = service.controller.progress.checked
            until(lambda before=before: service.controller.progress.checked >= before + 12)
            service.post("/stop")
        outbox = service.controller.outbox
        receiver.trouble = 0
        outbox.close_open(0.0)
        outbox.retry_now()
        outbox.notify()
        until(lambda: outbox.counts()["pending"] == 0)
    shares = {
        (body["node_id"], artifact["nonce"] % 4)
        for body in receiver.taken.values()
        for artifact in body["artifacts"]
    }
    assert (shares, receiver.changed) == ({(1, 1), (3, 3), (2, 2)}, [])


def test_a_body_without_a_type_is_read_for_the_chain_alone_and_not_from_another_page(serving):  # noqa: F811
    evil = {"Origin": "http://evil.example"}
    with serving() as service:
        for prefix, headers, status in (
            (PATH, {}, 200),
            (PATH, {"Content-Type": "text/plain"}, 422),
            (PUBLISHED, {}, 422),
            (PATH, evil, 403),
        ):
            body = b'{"block_hash": "B", "block_height": 1, "public_key": "k", "node_id": 1, '
            body += b'"node_count": 1, "nonces": [1], "params": {"model": "fake", "seq_len": 4}}'
            answer = service.client.post(f"{prefix}/generate", content=body, headers=headers)
            assert answer.status_code == status, (prefix, headers, answer.text)


def test_a_server_that_listens_on_a_file_answers_without_a_port(serving):  # noqa: F811
    with serving() as service:
        on_file = Direct(service, server=None)
        begun = on_file.post(f"{PATH}/init/generate", OF_CHAIN)
        assert (begun.status_code, begun.json()["results"][0]["port"]) == (200, None)
        assert on_file.get(f"{PATH}/status").json()["backends"][0]["port"] is None


def test_no_route_is_there_twice_of_which_vllm_would_take_the_last(serving, monkeypatch):  # noqa: F811
    routes = []
    include = FastAPI.include_router

    def collect(app, router, **options):
        routes.extend((r.path, method) for r in router.routes for method in r.methods)
        include(app, router, **options)

    monkeypatch.setattr(FastAPI, "include_router", collect)
    with serving(compatibility="gonka"):
        assert (f"{PUBLISHED}/status", "GET") in routes
        assert (f"{PUBLISHED}/validate", "POST") in routes
        assert len(routes) == len(set(routes))


def test_a_key_of_its_scope_is_needed_as_under_the_published_path(serving):  # noqa: F811
    keys = {"api_keys": ("control-" + "x" * 20,), "validate_keys": ("validate-" + "x" * 20,)}
    with serving(**keys) as service:
        header = {"Authorization": f"Bearer {keys['validate_keys'][0]}"}
        call = service.client
        assert call.get(f"{PATH}/status").status_code == 401
        assert call.get(f"{PATH}/status", headers=header).status_code == 200
        assert call.post(f"{PATH}/stop", json={}, headers=header).status_code == 403
        job = OF_CHAIN | {"nonces": [1]}
        assert call.post(f"{PATH}/generate", json=job, headers=header).status_code == 200
        assert call.post(f"{PATH}/init/generate", json=OF_CHAIN, headers=header).status_code == 403
