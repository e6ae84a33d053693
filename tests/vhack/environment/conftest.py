"""The ways in which a job is run, one for a test."""

import pytest

from assay.vhack.environment import backends, server


@pytest.fixture
def isolated(needs):
    """A function that skips the test where this machine lacks a backend."""

    def check(backend):
        if backend == "bwrap":
            needs("bwrap")
        if backend in backends.BACKENDS and (reason := backends.unusable(backend)):
            pytest.skip(reason)

    return check


@pytest.fixture
def shut_in(request, monkeypatch, isolated):
    """Run jobs by the fork server of a backend, or (once) in a sandbox for each."""
    name, _, once = request.param.partition(" ")
    isolated(name)
    if once:
        monkeypatch.setattr(server, "server", lambda backend: None)
    else:
        assert server.server(name) is not None
    available = None if name == backends.UNSANDBOXED else name
    monkeypatch.setattr(backends, "available_backend", lambda: available)
    return name
