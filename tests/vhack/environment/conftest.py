"""The ways in which a job is run, one for a test."""

import pytest

from assay.vhack.environment import sandbox


@pytest.fixture
def shut_in(request, monkeypatch):
    """Run jobs by the fork server (bwrap), in a sandbox for each (bwrap once), or in none
    (unsandboxed).
    """
    name, _, once = request.param.partition(" ")
    if name == "bwrap" and not sandbox.working():
        pytest.skip("bubblewrap does not work on this machine")
    if once:
        monkeypatch.setattr(sandbox, "server", lambda: None)
    elif name == "bwrap":
        assert sandbox.server() is not None
    monkeypatch.setattr(sandbox, "available_backend", lambda: "bwrap" if name == "bwrap" else None)
    return name
