"""Keys, scopes, and what a service without keys refuses."""

import pytest

from assay.errors import UsageError
from assay.poc.service import ServiceSettings
from tests.poc.service.conftest import PREFIX, ROUND
from tests.wordings import refuses

ALL = "all-" + "x" * 20
VALIDATE = "validate-" + "x" * 20
READ = "read-" + "x" * 20
ROUTES = {
    "control": ("POST", "/init"),
    "validate": ("POST", "/validate"),
    "read": ("GET", "/status"),
}


@pytest.fixture
def keyed(serving):
    with serving(api_keys=(ALL,), validate_keys=(VALIDATE,), read_keys=(READ,)) as service:
        yield service


def _status(service, scope: str, key: str | None, kind: str = "Bearer") -> int:
    method, path = ROUTES[scope]
    headers = {} if key is None else {"Authorization": f"{kind} {key}".encode("latin-1")}
    return service.client.request(method, PREFIX + path, json=ROUND, headers=headers).status_code


@pytest.mark.parametrize(
    ("key", "may"),
    [(ALL, {"control", "validate", "read"}), (VALIDATE, {"validate", "read"}), (READ, {"read"})],
)
def test_a_key_may_do_what_its_scope_says(keyed, key, may):
    refused = {scope for scope in ROUTES if _status(keyed, scope, key) == 403}
    assert refused == set(ROUTES) - may
    assert 401 not in {_status(keyed, scope, key) for scope in ROUTES}


@pytest.mark.parametrize("key", [None, "", "wrong", ALL[:-1], ALL + "x", "\xff\xfe"])
def test_everything_needs_a_key_but_the_probes(keyed, key):
    assert {_status(keyed, scope, key) for scope in ROUTES} == {401}
    assert keyed.client.get("/metrics").status_code == 401
    assert keyed.client.get("/health").status_code == keyed.client.get("/ready").status_code == 200
    assert _status(keyed, "read", ALL, kind="Basic") == 401


@pytest.mark.parametrize(
    "headers",
    [
        {"Host": "evil.example"},
        {"Host": "10.0.0.1"},
        {"Origin": "https://evil.example"},
        *(
            {"Origin": odd}
            for odd in (
                "x//127.0.0.1",
                "file://127.0.0.1",
                "null",
                "http://127.0.0.1/",
                "127.0.0.1",
            )
        ),
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
    ],
)
def test_without_keys_other_hosts_and_sites_are_refused(service, headers):
    assert service.client.post(f"{PREFIX}/stop", headers=headers).status_code == 403
    assert service.status()["state"] == "IDLE"


@pytest.mark.parametrize("host", ["localhost:8000", "127.0.0.1", "[::1]:80"])
def test_without_keys_this_machine_is_welcome(service, host):
    assert (
        service.client.get(
            f"{PREFIX}/status", headers={"Host": host, "Origin": f"http://{host}"}
        ).status_code
        == 200
    )


def test_with_keys_other_hosts_are_welcome(keyed):
    headers = {"Host": "node.example", "Authorization": f"Bearer {READ}"}
    assert keyed.client.get(f"{PREFIX}/status", headers=headers).status_code == 200


@pytest.mark.parametrize(
    ("name", "weak"),
    [
        *(("api_keys", key) for key in ("short", "ü" * 20)),
        *(("callback_secrets", secret) for secret in ("whsec_", "whsec_c2hvcnQ=", "whsec_!!!!")),
    ],
)
def test_weak_keys_and_secrets_are_refused(name, weak):
    with refuses(UsageError, "weak keys and secrets are refused") as error:
        ServiceSettings(**{name: (weak,)})
    assert name == "callback_secrets" or weak not in str(error.value)
