"""The transition table, which HTTP obeys."""

import pytest

from assay.poc.service import State
from assay.poc.service.rounds import TRANSITIONS
from tests.poc.service.conftest import BLOCK, ROUND

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
