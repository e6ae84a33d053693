"""The answer to a plain ``GET /status`` is the route's own, only sooner."""

import pytest

from assay.poc.service.app import QuickStatus
from tests.poc.service.conftest import PREFIX

KEY = "read-" + "x" * 20


@pytest.fixture
def routed(monkeypatch):
    """Ask for /status without the quick answer."""

    def ask(service, **how):
        with monkeypatch.context() as patch:
            patch.setattr(QuickStatus, "_is_plain", lambda self, scope: False)
            return service.client.get(f"{PREFIX}/status", **how)

    return ask


def test_it_is_the_answer_of_the_route(service, routed):
    service.generate(8)
    service.post("/stop")
    quick, slow = service.client.get(f"{PREFIX}/status"), routed(service)
    assert quick.json() == slow.json()
    assert quick.status_code == slow.status_code == 200
    assert dict(quick.headers) == dict(slow.headers)


@pytest.mark.parametrize("headers", [{}, {"Authorization": f"Bearer {KEY}x"}, {"Authorization": f"Basic {KEY}"}])
def test_refusals_are_those_of_the_route(serving, routed, headers):
    with serving(read_keys=(KEY,)) as service:
        quick, slow = service.client.get(f"{PREFIX}/status", headers=headers), routed(service, headers=headers)
        assert (quick.status_code, quick.json()) == (slow.status_code, slow.json())
        assert quick.status_code == 401
        welcome = {"Authorization": f"Bearer {KEY}"}
        assert service.client.get(f"{PREFIX}/status", headers=welcome).status_code == 200


def test_parameters_and_other_methods_go_to_the_route(service):
    assert service.client.get(f"{PREFIX}/status?after=x").status_code == 422
    assert service.client.post(f"{PREFIX}/status").status_code == 405


def test_the_metrics_count_both_alike(service, routed):
    def counted() -> float:
        return service.controller.metrics.requests.labels(f"{PREFIX}/status", "200")._value.get()

    before = counted()
    service.client.get(f"{PREFIX}/status")
    assert counted() == before + 1
    routed(service)
    assert counted() == before + 2
