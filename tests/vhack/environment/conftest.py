"""The backends of the sandbox, one for a test."""

import pytest

from assay.vhack.environment import sandbox
from assay.vhack.environment import sandbox as _backends
from assay.vhack.environment import sandbox as _server


@pytest.fixture
def shut_in(request, monkeypatch):
    """Use one backend for this test, with its fork server or once per job, or skip it where the machine lacks it."""
    name, _, once = request.param.partition(" ")
    if name != "unsandboxed" and not _backends.working(name):
        pytest.skip(f"backend {name} does not work on this machine")
    if once:
        monkeypatch.setattr(sandbox, "server", lambda backend: None)
    elif name != "unsandboxed":
        assert _server.server(name) is not None
    monkeypatch.setattr(sandbox, "available_backend", lambda: None if name == "unsandboxed" else name)
    return name
