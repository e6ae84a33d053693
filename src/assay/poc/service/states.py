"""States of the service, and the calls that lead from one to another."""

from enum import StrEnum

from assay.poc.net.refusals import Refusal

NEEDS_ROUND = frozenset({"phase/generate", "phase/validate"})
"""Calls that are refused before the first round."""


class State(StrEnum):
    """The state of the service."""

    IDLE = "IDLE"
    GENERATING = "GENERATING"
    VALIDATING = "VALIDATING"
    STOPPED = "STOPPED"


# One letter each, so that the table below can be read as a table.
_I = State.IDLE
_G = State.GENERATING
_V = State.VALIDATING
_S = State.STOPPED

TRANSITIONS: dict[str, dict[State, State]] = {
    "init": {_I: _I, _V: _I, _S: _I},
    "init/generate": {_I: _G, _V: _G, _S: _G},
    "init/validate": {_I: _V, _V: _V, _S: _V},
    "phase/generate": {_I: _G, _G: _G, _V: _G, _S: _G},
    "phase/validate": {_I: _V, _G: _V, _V: _V, _S: _V},
    "validate": {_V: _V},
    "stop": {_I: _S, _G: _S, _V: _S, _S: _S},
    "engine failure": {_G: _S, _I: _I, _V: _V, _S: _S},
}
"""Call → state before → state after. In a state that is missing, the call is refused with 409."""


def after(call: str, state: State, *, has_round: bool) -> State:
    """Return the state after a call; 409 with the allowed calls if it is not allowed."""
    choices = [
        candidate
        for candidate, row in TRANSITIONS.items()
        if state in row
        and candidate != "engine failure"
        and (has_round or candidate not in NEEDS_ROUND)
    ]
    if call in choices or call == "engine failure":
        return TRANSITIONS[call][state]
    seen = (
        f"{call} while {state}"
        if has_round or call not in NEEDS_ROUND
        else f"{call} before any init"
    )
    raise Refusal(
        409,
        seen,
        wanted="one of " + ", ".join(choices),
        do="ask /status, then make an allowed call",
        fields={"state": str(state), "allowed": choices},
    )
