"""The states of the service, and every transition between them in one table, which docs/service.md shows."""

from enum import StrEnum

from assay.poc.net.refusals import Refusal


class State(StrEnum):
    """The present work of the service."""

    IDLE = "IDLE"
    GENERATING = "GENERATING"
    VALIDATING = "VALIDATING"
    STOPPED = "STOPPED"


_I, _G, _V, _S = State.IDLE, State.GENERATING, State.VALIDATING, State.STOPPED

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

NEEDS_ROUND = frozenset({"phase/generate", "phase/validate"})
"""Calls that are refused before the first round."""


def allowed(state: State, *, has_round: bool) -> list[str]:
    """Return the calls that the table allows in a state."""
    return [
        call
        for call, row in TRANSITIONS.items()
        if state in row and call != "engine failure" and (has_round or call not in NEEDS_ROUND)
    ]


def after(call: str, state: State, *, has_round: bool) -> State:
    """Return the state that a call leads to.

    Raises:
        Refusal: 409, the call is not allowed now; the body names the state and the calls that are.
    """
    choices = allowed(state, has_round=has_round)
    if call in choices or call == "engine failure":
        return TRANSITIONS[call][state]
    seen = f"{call} while {state}" if has_round or call not in NEEDS_ROUND else f"{call} before any init"
    raise Refusal(
        409,
        seen,
        wanted="one of " + ", ".join(choices),
        do="ask /status, then make an allowed call",
        fields={"state": str(state), "allowed": choices},
    )
