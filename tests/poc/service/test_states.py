"""The transition table: one in the code, the same in the docs, and the one that HTTP obeys."""

from pathlib import Path

import pytest

from assay.poc.service import State
from assay.poc.service.rounds import TRANSITIONS
from tests.poc.service.conftest import BLOCK, ROUND

DOCS = Path(__file__).parents[3] / "docs" / "service.md"
BODIES = {
    "init": ROUND,
    "init/generate": ROUND,
    "init/validate": ROUND,
    "validate": BLOCK | {"nonces": [0], "dist": [1.41], "node_id": 0},
}
REACH = {
    State.IDLE: ["init"],
    State.GENERATING: ["init/generate"],
    State.VALIDATING: ["init/validate"],
    State.STOPPED: ["init/validate", "stop"],
}


def test_the_table_in_the_docs_is_the_one_in_the_code():
    lines = [line for line in DOCS.read_text().splitlines() if line.startswith("|")]
    head = next(i for i, line in enumerate(lines) if line.startswith("| call "))
    columns = [cell.strip() for cell in lines[head].strip("|").split("|")][1:]
    drawn = {}
    for line in lines[head + 2 : head + 2 + len(TRANSITIONS)]:
        call, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        drawn[call] = {State(c): State(v) for c, v in zip(columns, cells, strict=True) if v != "409"}
    assert drawn == TRANSITIONS


@pytest.mark.parametrize("state", list(State))
def test_every_call_in_every_state_does_what_the_table_says(service, state):
    for call in (call for call in TRANSITIONS if call != "engine failure"):
        for step in ["stop", *REACH[state]]:
            service.post(f"/{step}", BODIES.get(step))
        assert service.status()["state"] == state
        answer = service.client.post(f"/api/v1/pow/{call}", json=BODIES.get(call, {}))
        wanted = TRANSITIONS[call].get(state)
        if wanted is None:
            assert answer.status_code == 409, (call, answer.text)
            assert answer.json()["state"] == state == service.status()["state"]
            assert call not in answer.json()["allowed"]
        else:
            assert answer.status_code == 200, (call, answer.text)
            assert service.status()["state"] == wanted


@pytest.mark.parametrize("call", ["phase/generate", "phase/validate"])
def test_a_phase_needs_a_round(service, call):
    assert service.post(f"/{call}", status=409)["state"] == "IDLE"
    service.post("/stop")
    assert service.post(f"/{call}", status=409)["state"] == "STOPPED"
