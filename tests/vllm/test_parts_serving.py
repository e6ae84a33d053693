"""What the plugin puts around the routes of vLLM, and its settings."""

from importlib.metadata import distribution
from pathlib import Path
from types import SimpleNamespace

import pytest
from fastapi import FastAPI

from assay.errors import UsageError
from assay.poc.net.local_only import LocalOnly
from assay.poc.vllm.chat_barrier import ChatBarrier
from assay.poc.vllm.endpoint_plugin import plugin
from assay.poc.vllm.preflight import PluginSettings
from assay.poc.vllm.throttle import ThrottleSettings
from tests.wordings import refuses


async def served(scope, receive, send) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})


@pytest.mark.parametrize("root", ["", "/proxy"])
def test_a_root_path_opens_no_guard_and_closes_no_route(root: str):
    """A client may send the root path or leave it out: the router takes both."""
    from tests.poc.service.conftest import TestClient

    app = FastAPI()
    app.root_path = root  # as vLLM sets it from --root-path
    for path in ("/api/v1/pow/status", "/api/v1/pow/stop", "/tokenize", "/v1/completions"):
        app.add_api_route(path, lambda: "served", methods=["GET", "POST"])
    app.add_middleware(ChatBarrier, closed=lambda: True)
    app.add_middleware(LocalOnly, prefix="/api/v1/pow")
    here, evil = (
        TestClient(app, base_url=f"http://{host}") for host in ("127.0.0.1", "evil.example")
    )
    for before in {"", root}:
        assert evil.get(f"{before}/api/v1/pow/status").status_code == 403
        assert evil.post(f"{before}/api/v1/pow/stop").status_code == 403
        assert here.post(f"{before}/api/v1/pow/stop").status_code == 200
        assert here.post(f"{before}/tokenize").status_code == 200
        assert here.post(f"{before}/v1/completions").status_code == 503
        assert evil.get(f"{before}/v1/completions").status_code == 200


def test_settings_come_from_the_environment(monkeypatch: pytest.MonkeyPatch):
    given = ThrottleSettings(
        mode="exclusive", share=0.5, in_flight=3, chat_in_flight=4, wait=5, quiet=6, drain=7
    )
    environment = {f"ASSAY_VLLM_{name.upper()}": str(value) for name, value in given}
    environment |= {"ASSAY_CALLBACK_INTERVAL": "0.5", "ASSAY_VLLM_PATH": "requests"}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    read = PluginSettings()
    assert (read.callback_interval, read.drain) == (0.5, 2.0)
    assert read.throttle.model_dump() == given.model_dump() | {"path": "requests"}
    monkeypatch.setenv("ASSAY_DRAIN", "9")
    assert PluginSettings().drain == 9.0


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ASSAY_VLLM_SHARE", "2"),
        ("ASSAY_VLLM_MODE", "greedy"),
        ("ASSAY_VLLM_WAIT", "long"),
        ("ASSAY_MAX_NONCES", "many"),
    ],
)
def test_settings_that_are_wrong_are_refused_in_words(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match=name):
        PluginSettings()


def test_servers_of_one_environment_have_directories_of_their_own(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("ASSAY_DATA_DIR", "/data/assay-{port}")
    folders = [PluginSettings().for_port(port).data_dir for port in (5001, 5002)]
    assert folders == [Path("/data/assay-5001"), Path("/data/assay-5002")]
    monkeypatch.setenv("ASSAY_DATA_DIR", "/data/assay")
    assert PluginSettings().for_port(5001).data_dir == Path("/data/assay")


def test_a_port_that_others_reach_needs_a_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("ASSAY_DATA_DIR", str(tmp_path))
    for host in (None, "0.0.0.0", "203.0.113.7"):
        app = SimpleNamespace(state=SimpleNamespace(args=SimpleNamespace(host=host, uds=None)))
        with refuses(UsageError, "a port that others reach needs a key"):
            plugin().attach_router(app)


def test_the_entry_points_of_vllm_are_functions_whatever_was_imported_before():
    found = [
        entry for entry in distribution("assay").entry_points if entry.group.startswith("vllm.")
    ]
    assert {entry.name for entry in found} == {"assay"}
    assert all(callable(entry.load()) for entry in found)
