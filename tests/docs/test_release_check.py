"""The release check says what it saw, and fails where something does not hold."""

import importlib.util
import shutil
import sys
import threading
import zipfile
from contextlib import nullcontext
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("release_check", ROOT / "scripts" / "release_check.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["release_check"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def stranger(script: ModuleType, tmp_path: Path):
    for name in ("home", "elsewhere"):
        (tmp_path / name).mkdir()
    return script.Stranger(tmp_path)


def test_a_wheel_that_is_too_large_fails(script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    wheel = tmp_path / "assay-0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("assay/models/reference/large/model.safetensors", b"0" * 5000)
    assert "assay/models/reference/large" in script.check_size(wheel)
    monkeypatch.setattr(script, "LARGEST_WHEEL", 4000)
    with pytest.raises(script.Failed, match="wanted at most 0"):
        script.check_size(wheel)


def test_a_traceback_or_another_exit_code_fails(script: ModuleType, stranger):
    assert stranger.run(["sh", "-c", "echo seen"]) == "seen\n"
    for command in ("exit 3", "echo 'Traceback (most recent call last)' >&2"):
        with pytest.raises(script.Failed, match="ended with"):
            stranger.run(["sh", "-c", command])
    assert "wanted: an extra" in stranger.run(["sh", "-c", "echo 'wanted: an extra' >&2; exit 2"], codes=(2,))


@pytest.mark.skipif(shutil.which("chromium") is None, reason="Chromium is not installed")
def test_a_page_whose_scripts_show_nothing_fails(
    script: ModuleType, stranger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(script, "PAGE_WAIT", 3.0)
    handler = partial(SimpleHTTPRequestHandler, directory=str(tmp_path))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            for name, written in (("held", "'reference:' + 'qwen3'"), ("empty", "''")):
                page = f"<p id=model></p><script>document.getElementById('model').textContent = {written}</script>"
                (tmp_path / name).mkdir()  # under one address the browser would show the first page again
                (tmp_path / name / "index.html").write_text(page)
                fails = pytest.raises(script.Failed, match="does not name reference:qwen3")
                with nullcontext() if name == "held" else fails:
                    script.check_page(stranger, f"http://127.0.0.1:{server.server_port}/{name}", page.encode())
        finally:
            server.shutdown()
            thread.join()


def test_a_step_that_fails_is_in_the_summary_and_in_the_exit_code(
    script: ModuleType, stranger, capsys: pytest.CaptureFixture
):
    def broken() -> str:
        raise script.Failed("nothing at /")

    assert stranger.step("first", lambda: "seen")
    assert stranger.summary() == 0
    assert not stranger.step("second", broken)
    assert stranger.summary() == 1
    assert "1 of 2 steps hold: \n  second" in capsys.readouterr().out


def test_nothing_of_the_checkout_reaches_the_stranger(stranger, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "src"))
    monkeypatch.setenv("ASSAY_MODEL", "reference:llama")
    monkeypatch.setenv("VIRTUAL_ENV", "/elsewhere")
    seen = stranger.run(["env"])
    assert str(ROOT) not in seen
    assert "ASSAY_" not in seen
    assert "VIRTUAL_ENV" not in seen


def test_all_steps_are_taken_and_a_wheel_that_cannot_be_built_ends_the_run(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    commands: list[tuple[str, ...]] = []
    for name in dir(script):
        if name.startswith("check_") and name != "check_all":
            monkeypatch.setattr(script, name, lambda stranger, *arguments: commands.append(arguments[2:]) or "held")
    monkeypatch.setattr(script.venv, "create", lambda path, with_pip: None)
    monkeypatch.setattr(script, "built", lambda stranger: tmp_path / "assay.whl")
    monkeypatch.setattr(script.Stranger, "pip", lambda self, *arguments: None)
    monkeypatch.setattr(
        script.Stranger, "assay", lambda self, *arguments, codes=(0,): commands.append(arguments) or "held"
    )
    stranger = script.Stranger(tmp_path / "first")
    assert script.check_all(stranger) == 0
    assert len(stranger.results) == 19
    taken = {command[:2] for command in commands if command[:1] == ("poc",)}
    assert {("poc", "serve"), ("poc", "receive"), ("poc", "validator"), ("poc", "pins")} <= taken

    def broken(stranger: object) -> Path:
        raise script.Failed("no wheel")

    monkeypatch.setattr(script, "built", broken)
    stranger = script.Stranger(tmp_path / "second")
    assert script.check_all(stranger) == 1
    assert len(stranger.results) == 1
