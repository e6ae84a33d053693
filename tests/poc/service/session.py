"""The recorded session: requests, and the responses they got.

Counts and times differ from run to run and are kept as the names of their types; everything else is
kept as it is.
"""

from pathlib import Path
from typing import Any

from tests.poc.service.conftest import ARTIFACTS, BLOCK, ROUND, Service
from tests.waiting import until

PATH = Path(__file__).with_name("session.json")
VOLATILE = {
    "request_id",
    "vector_b64",
    "valid_nonces",
    "valid_distances",
    "elapsed_seconds",
    "rate_per_second",
}
VOLATILE |= {"total_checked", "total_valid", "total_processed", "nonces_per_second"}
CLAIM = BLOCK | {"nonces": [0, 1, 2], "dist": [1.4128, 1.5, 1.4], "node_id": 0}
JOB = ARTIFACTS | {"nonces": [0, 3, 6], "wait": True}
WRONG = [{"nonce": nonce, "vector_b64": "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA"} for nonce in (0, 3, 6)]

REQUESTS: list[tuple[str, str, Any]] = [
    ("GET", "/status", None),
    ("POST", "/phase/generate", None),
    ("POST", "/init", ROUND),
    ("GET", "/status", None),
    ("POST", "/validate", CLAIM),
    ("POST", "/phase/generate", None),
    ("POST", "/init/generate", ROUND),
    ("GET", "/status", None),
    ("POST", "/phase/validate", None),
    ("POST", "/validate", CLAIM),
    ("POST", "/validate", CLAIM | {"block_hash": "block_beta"}),
    ("POST", "/validate", CLAIM | {"dist": [1.4]}),
    ("POST", "/stop", None),
    (
        "POST",
        "/init/generate",
        {name: value for name, value in ROUND.items() if not name.startswith("node")},
    ),
    ("POST", "/init/generate", ROUND | {"r_target": "high"}),
    ("POST", "/init/validate", ROUND | {"block_hash": "block_beta"}),
    ("POST", "/init/generate", ARTIFACTS | {"block_hash": "block_gamma"}),
    ("POST", "/init/generate", ARTIFACTS | {"block_hash": "block_gamma"}),
    ("GET", "/status", None),
    ("POST", "/stop", None),
    ("POST", "/generate", JOB),
    ("POST", "/generate", JOB | {"wait": False}),
    ("POST", "/generate", JOB | {"validation": {"artifacts": WRONG}}),
    ("POST", "/generate", JOB | {"params": JOB["params"] | {"seq_len": 1024}}),
    ("GET", "/generate/unknown", None),
]


def steady(value: Any, name: str = "") -> Any:
    """Return a response with the values that differ from run to run replaced by the names of their
    types.
    """
    if name in VOLATILE:
        return type(value).__name__
    if isinstance(value, dict):
        return {key: steady(item, key) for key, item in value.items()}
    return [steady(item) for item in value] if isinstance(value, list) else value


def replay(service: Service) -> list[dict[str, Any]]:
    """Send the requests, one after the other, and return them with their responses."""
    found = []
    for method, path, body in REQUESTS:
        answer = service.client.request(method, f"/api/v1/pow{path}", json=body)
        response = {"status": answer.status_code, "body": steady(answer.json())}
        found.append({"method": method, "path": path, "body": body, "response": response})
        if service.status()["state"] == "GENERATING":
            until(lambda: service.checked() > 0)
    return found
