"""Bodies that the chain's client, a node between or an attacker may send: every field of every type.

What is refused names its field, leaves nothing behind, and is never a fault of the service.
"""

import json
from typing import Any

import pytest

from tests.chain.client import PATH
from tests.chain.mlnode import PUBLISHED
from tests.poc.service.conftest import rig, serving  # noqa: F401
from tests.usual import usual

SHARED: dict[str, Any] = {
    "block_hash": "B7",
    "block_height": 7,
    "public_key": "02ab",
    "node_id": 1,
    "node_count": 1,
    "params": {"model": "fake", "seq_len": 4},
}
VECTOR = {"nonce": 1, "vector_b64": "A" * 32}
BEGIN = "/init/generate"
JOB = "/generate"
HUGE = 10**400
LONE = "\ud800"  # half of a surrogate pair, which no text in UTF-8 has


def params(**changed: Any) -> dict[str, Any]:
    """Return a change of parameters."""
    return {"params": SHARED["params"] | changed}


def claim(*artifacts: Any, **changed: Any) -> dict[str, Any]:
    """Return a validation of nonce 1 by these artifacts."""
    return {"nonces": [1], "validation": {"artifacts": list(artifacts)}} | changed


def rule(**changed: Any) -> dict[str, Any]:
    """Return a validation under another rule."""
    return claim(VECTOR, stat_test=changed)


TAKEN: list[tuple[str, dict[str, Any]]] = [
    (BEGIN, {"node_id": 0}),
    (BEGIN, {"node_id": 5}),
    (BEGIN, {"node_id": "1"}),
    (BEGIN, {"node_id": 1.0}),
    (BEGIN, {"block_height": "7"}),
    (BEGIN, {"url": None}),
    (BEGIN, {"url": "http://10.0.0.1/v2/poc-batches/a%252Fb%2520c"}),
    (BEGIN, {"unknown": {"deep": [[[]]]}}),
    (BEGIN, params(seq_len="4", k_dim=12)),
    (BEGIN, params(decode=False, max_tokens=256, scheme="prefill", route_window=16)),
    (JOB, {"nonces": [1], "validation": None, "stat_test": None, "url": None}),
    (JOB, {"nonces": [3, 1, 3]}),
    (JOB, claim(VECTOR, VECTOR)),
    (JOB, claim(VECTOR, nonces=[1, 1])),
    (JOB, claim({"nonce": 1, "vector_b64": "", "k_points_steps": [1]})),
    (JOB, claim(VECTOR | {"vector_b64": "no base64", "unknown": 1})),
    (JOB, claim(VECTOR | {"k_points_steps": None})),
    (JOB, rule()),
    (JOB, rule(unknown=3)),
    (JOB, rule(dist_threshold=0)),
    (JOB, rule(dist_threshold=2.5)),
    (JOB, rule(p_mismatch=0)),
    (JOB, rule(p_mismatch=1)),
    (JOB, rule(p_value_threshold=0)),
    (JOB, rule(p_value_threshold=1)),
    (JOB, rule(p_value_threshold=None, fraud_threshold=1)),
]

REFUSED: list[tuple[str, dict[str, Any], str]] = [
    *((BEGIN, {"node_id": value}, "node_id") for value in (-1, 1.5, None, [1], "one", HUGE)),
    *((BEGIN, {"node_count": value}, "node_count") for value in (0, -1, None, HUGE)),
    *((BEGIN, {"block_height": value}, "block_height") for value in (-1, None, HUGE, "x")),
    *(
        (BEGIN, {name: value}, name)
        for name in ("block_hash", "public_key")
        for value in ("", 7, None, ["a"], LONE, "a\x00b", "a" * 5000)
    ),
    *((BEGIN, {"batch_size": value}, "batch_size") for value in (0, None, 10**9)),
    *((BEGIN, {"n_groups": value}, "n_groups") for value in (0, "two")),
    *((BEGIN, {"url": value}, "url") for value in (7, "", "http://a b", "h" * 3000)),
    *((BEGIN, {"poc_stronger_rng": value}, "poc_stronger_rng") for value in (2, None)),
    *((BEGIN, {"params": value}, "params") for value in (None, [], "x")),
    *((BEGIN, params(model=value), "model") for value in ("", 7, None, LONE)),
    *((BEGIN, params(seq_len=value), "seq_len") for value in (0, -4, None, 10**9)),
    *((BEGIN, params(max_tokens=value), "max_tokens") for value in (-1, None, HUGE)),
    (BEGIN, params(decode=True), "params"),
    (BEGIN, params(decode=True, max_tokens=4097), "params"),
    (BEGIN, params(scheme="other"), "scheme"),
    (BEGIN, params(decode=2), "decode"),
    (BEGIN, params(poc_stronger_rng=True), "poc_stronger_rng"),
    *((JOB, {"nonces": value}, "nonces") for value in ([], None, "1", {"1": 1})),
    *((JOB, {"nonces": [value]}, "nonces") for value in (-1, None, "1", 1.5, True, 2**53, HUGE)),
    *((JOB, {"nonces": [1], "validation": value}, "validation") for value in ({}, [], "x")),
    *((JOB, claim(value), "artifacts") for value in (1, None, {"nonce": 1}, {})),
    *(
        (JOB, claim(VECTOR | {"vector_b64": value}), "vector_b64")
        for value in (None, 7, LONE, "A" * 70_000)
    ),
    *(
        (JOB, claim(VECTOR | {"k_points_steps": value}), "k_points_steps")
        for value in ("0123", ["x"], [0.5], [0] * 5000)
    ),
    *((JOB, claim(VECTOR, stat_test=value), "stat_test") for value in ([], "x", 0)),
    *((JOB, rule(dist_threshold=value), "dist_threshold") for value in (-1, None, "far")),
    *((JOB, rule(p_mismatch=value), "p_mismatch") for value in (-0.1, 1.5, None)),
    *((JOB, rule(p_value_threshold=value), "p_value_threshold") for value in (-0.1, 1.5)),
]

OTHERWISE: list[tuple[str, dict[str, Any], int]] = [
    *((path, params(model=name), 409) for path in (BEGIN, JOB) for name in ("FAKE", "fake ", "f")),
    (BEGIN, params(k_dim=13), 409),
    (BEGIN, params(decode=True, max_tokens=3), 409),  # an engine that runs one pass
    (BEGIN, {"group_id": 3, "n_groups": 2}, 422),
    (BEGIN, {"url": "ftp://a.example"}, 422),
    (JOB, claim(), 400),
    (JOB, claim(VECTOR | {"nonce": 2}), 400),
    (JOB, {"nonces": list(range(20_000))}, 422),
    (JOB, {"nonces": [1] * 20_000}, 422),
    (JOB, {"nonces": list(range(300_000))}, 413),
]

NO_OBJECT = (
    b"",
    b"null",
    b"[]",
    b"7",
    b'"x"',
    b"{",
    b"\xff\xfe",
    b"\xef\xbb\xbf{}",
    b"[" * 100_000,
)


@pytest.fixture(params=usual([PATH, PUBLISHED], PATH))
def send(request, serving):  # noqa: F811
    """A call that announces no content type, to a service in which nothing is left of it."""
    with serving(compatibility="gonka") as service:

        def call(path: str, body: dict[str, Any] | bytes) -> Any:
            content = body if isinstance(body, bytes) else json.dumps({"nonces": [1]} | body)
            answer = service.client.post(request.param + path, content=content)
            state = service.client.get(f"{request.param}/status").json()["status"]
            begun = path == BEGIN and answer.status_code == 200
            assert state == ("GENERATING" if begun else "IDLE"), body
            if answer.status_code == 200:
                assert service.client.post(f"{request.param}/stop").status_code == 200
            return answer

        yield call


def test_what_upstream_takes_is_taken(send):
    for path, changed in TAKEN:
        answer = send(path, SHARED | changed)
        assert answer.status_code == 200, (changed, answer.text)


def test_a_field_of_another_type_or_size_is_refused_by_its_name(send):
    for path, changed, field in REFUSED:
        answer = send(path, SHARED | changed)
        assert answer.status_code == 422, (changed, answer.text)
        reply = answer.json()
        assert field in reply["errors"][0]["loc"], changed
        # The client announces no type, so the advice is not to announce one.
        assert "Content-Type" not in reply["do"], changed


def test_a_field_that_is_missing_is_refused_by_its_name(send):
    for path, extra in ((BEGIN, {}), (JOB, {"nonces": [1]})):
        for name in (*SHARED, *extra):
            body = {key: value for key, value in (SHARED | extra).items() if key != name}
            answer = send(path, json.dumps(body).encode())
            assert (answer.status_code, answer.json()["errors"][0]["loc"]) == (422, ["body", name])
        for name in SHARED["params"]:
            kept = {key: value for key, value in SHARED["params"].items() if key != name}
            answer = send(path, SHARED | extra | {"params": kept})
            assert answer.json()["errors"][0]["loc"] == ["body", "params", name]


def test_what_is_no_body_of_a_request_is_refused(send):
    for path in (BEGIN, JOB):
        for body in NO_OBJECT:
            answer = send(path, body)
            assert answer.status_code == 422, (body[:20], answer.text)
            assert "Content-Type" not in answer.json()["do"], body[:20]


def test_other_refusals_leave_nothing_either(send):
    for path, changed, status in OTHERWISE:
        answer = send(path, SHARED | changed)
        assert answer.status_code == status, (str(changed)[:80], answer.text)


@pytest.mark.parametrize(
    ("changed", "mismatches", "fraud"),
    [
        ({"dist_threshold": 5.0}, 0, False),  # no two unit vectors are so far apart
        ({"p_mismatch": 0.0}, 3, True),
        ({"p_mismatch": 1.0}, 3, False),
        ({"p_value_threshold": 0.0}, 3, False),
    ],
)
def test_a_rule_of_no_use_is_computed_and_not_blamed_on_the_prover(
    serving,  # noqa: F811
    changed,
    mismatches,
    fraud,
):
    """Upstream computes any; the client reports a prover whose validation is refused 25 times."""
    nonces = [1, 2, 3]
    with serving(compatibility="gonka") as service:
        wrong = [{"nonce": nonce, "vector_b64": "ADwAPAA8" + "AAAA" * 6} for nonce in nonces]
        body = SHARED | claim(*wrong, nonces=nonces, stat_test=changed, wait=True)
        reply = service.post(JOB, body)
    assert (reply["n_mismatch"], reply["fraud_detected"]) == (mismatches, fraud)
