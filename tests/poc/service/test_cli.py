"""``assay poc callbacks``, and the message where the packages of the service are missing."""

import json
import subprocess
import sys
from contextlib import closing

import pytest

from assay.cli import run
from assay.poc.net.server import listen
from assay.poc.service.database import open_database
from assay.poc.service.outbox import Outbox
from tests.end_to_end.server import free_port
from tests.poc.service.conftest import BLOCK, ROUND
from tests.waiting import until


@pytest.fixture
def dead(serving):
    """A data directory with one dead letter."""
    with serving(callback_attempts=1) as service:
        service.post("/init/validate", ROUND | {"callback_url": "http://127.0.0.1:9/"})
        service.post("/validate", BLOCK | {"nonces": [0], "dist": [1.4], "node_id": 0})
        until(lambda: service.controller.outbox.counts()["dead"] == 1)
    return service.settings.data_dir


def test_list_and_replay(dead, capsys):
    assert run(["poc", "callbacks", "list", "--data-dir", str(dead), "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert (listed["schema"], listed["dead"], listed["pending"]) == ("assay.poc.callbacks/1", 1, 0)
    (row,) = listed["callbacks"]
    assert (row["kind"], row["status"], row["attempts"]) == ("validated", "dead", 1)
    with closing(open_database(dead)) as database, database.write() as connection:
        for _ in range(3):
            Outbox(database).add(connection, None, "validated", "http://127.0.0.1:9/", {}, None)
    # A newer one that is pending does not hide it.
    assert run(["poc", "callbacks", "list", "--data-dir", str(dead), "--limit", "1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["callbacks"][0]["status"] == "dead"
    assert run(["poc", "callbacks", "list", "--data-dir", str(dead), "--limit", "1"]) == 0
    assert "the dead ones first; --limit shows more" in capsys.readouterr().out
    assert run(["poc", "callbacks", "list", "--data-dir", str(dead)]) == 0
    assert "validated" in capsys.readouterr().out
    assert run(["poc", "callbacks", "replay", row["id"], "--data-dir", str(dead)]) == 0
    assert "1 callbacks are pending again" in capsys.readouterr().out
    assert run(["poc", "callbacks", "replay", row["id"], "--data-dir", str(dead)]) == 2
    assert run(["poc", "callbacks", "replay", "--data-dir", str(dead), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["replayed"] == 0


def test_a_directory_without_a_service_is_an_error_and_stays_empty(tmp_path, capsys):
    assert run(["poc", "callbacks", "list", "--data-dir", str(tmp_path)]) == 2
    assert "no database" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "command",
    [
        ("serve", "--model", "reference:qwen3", "--data-dir", "new"),
        ("receive", "-o", "new/callbacks.sqlite3"),
    ],
)
def test_a_port_in_use_leaves_nothing_behind(tmp_path, monkeypatch, capsys, command):
    monkeypatch.chdir(tmp_path)
    with listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        assert run(["poc", *command, "--port", str(port)]) == 2
    assert f"127.0.0.1:{port}: Address already in use" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_of_two_processes_that_start_together_one_gets_the_port():
    code = """
import sys
from assay.errors import UsageError
from assay.poc.net.server import listen
print("ready", flush=True)
port = int(sys.stdin.readline())
try:
    with listen("127.0.0.1", port):
        print("listening", flush=True)
        sys.stdin.readline()
except UsageError as error:
    print(error.seen, flush=True)
"""
    port = free_port()
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    pair = [subprocess.Popen([sys.executable, "-c", code], **pipes) for _ in range(2)]
    try:
        assert [process.stdout.readline() for process in pair] == ["ready\n"] * 2
        for process in pair:
            process.stdin.write(f"{port}\n")
            process.stdin.flush()
        answers = [process.stdout.readline() for process in pair]
    finally:
        for process in pair:
            process.communicate("\n", timeout=60)
    refused = f"127.0.0.1:{port}: Address already in use\n"
    assert sorted(answers) == [refused, "listening\n"]


def test_without_the_packages_of_the_service_the_rest_works_and_the_error_says_what_to_install():
    code = """
import sys
for name in ("fastapi", "uvicorn", "standardwebhooks", "structlog", "prometheus_client"):
    sys.modules[name] = None
import assay.poc
from assay.cli import run
sys.exit(run(["poc", "serve", "--model", "none"]))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 2, done.stderr
    assert "pip install '.[serve]'" in done.stderr
    assert "Traceback" not in done.stderr


def test_an_error_never_says_to_write_a_secret_on_the_command_line(capsys):
    assert run(["poc", "receive", "--host", "0.0.0.0"]) == 2
    error = capsys.readouterr().err
    assert "write `callback_secrets = …` under [poc.receive] in a file" in error
    assert "--set callback_secrets" not in error
