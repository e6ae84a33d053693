"""Every program of examples/ runs, and does what its head says."""

import io
import json
import shlex
import shutil
import sqlite3
import subprocess
import sys
import urllib.request
from contextlib import closing
from importlib import import_module
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from assay.models import load_model
from assay.poc.responses import Receipts
from assay.poc.verdict import Ledger
from tests.docs.shell import ENVIRONMENT
from tests.poc.validator.conftest import (
    BLOCK,
    Running,
    TestClient,
    nodes_text,
    pins_text,
    proof_of,
    secret_of,
)
from tests.poc.verdict.ledgers import update
from tests.waiting import until

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
VECTORS = ROOT / "tests" / "vectors"
sys.path.insert(0, str(EXAMPLES))


@pytest.mark.slow
def test_own_pairs(tmp_path, capsys):
    import_module("own_pairs").main(
        str(tmp_path / "pairs.jsonl"), str(tmp_path / "hack.safetensors")
    )
    assert len((tmp_path / "pairs.jsonl").read_text().splitlines()) == 8
    assert (tmp_path / "hack.safetensors").stat().st_size > 10_000
    said = capsys.readouterr().out
    assert said.startswith("8 pairs, ")
    assert (
        int(said.split("; ")[1].split("%")[0]) > 75
    )  # more than chance: the pairs differ in nothing but the cheat


@pytest.mark.slow
def test_own_trainer(tmp_path, fork_server):
    pytest.importorskip("trl")
    command = [*fork_server, "python", str(EXAMPLES / "own_trainer.py"), "run"]
    done = subprocess.run(
        command, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert [line.split()[1] for line in done.stdout.splitlines() if line.startswith("step ")] == [
        "1/2",
        "2/2",
    ]
    kinds = [
        json.loads(line)["kind"]
        for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()
    ]
    assert kinds.count("step") == 2
    trained = load_file(tmp_path / "run" / "delta.safetensors")
    assert any(delta.any() for delta in trained.values())
    again = subprocess.run(
        command, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, check=True
    )
    assert "step " not in again.stdout  # it was finished
    loaded = load_file(tmp_path / "run" / "delta.safetensors")
    assert all((loaded[name] == trained[name]).all() for name in trained)


@pytest.mark.slow
def test_own_transform(capsys):
    import_module("own_transform").main(16)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == ["artifact", "wide"]
    assert all(float(line.split("4 bits ")[1].split()[0]) > 4 for line in lines)


def test_mount(tmp_path, small_checkpoint, monkeypatch):
    monkeypatch.setenv("MODEL", str(small_checkpoint))
    monkeypatch.setenv("ASSAY_DATA_DIR", str(tmp_path / "data"))
    app = import_module("mount").app
    with TestClient(app, base_url="http://127.0.0.1") as client:
        assert client.get("/hello").json() == {"hello": "world"}
        until(lambda: client.get("/api/v1/pow/ready").status_code == 200)
        assert client.get("/api/v1/pow/status").json()["state"] == "IDLE"
        assert client.get("/status").status_code == 404


def test_send_proof(tmp_path, small_model, monkeypatch, capsys):
    """The answers are those of a real application; only the socket between them is left out."""
    (tmp_path / "pins.toml").write_text(pins_text(small_model))
    (tmp_path / "nodes.toml").write_text(nodes_text())
    proof_of(small_model, "node_A").save(tmp_path / "proof.jsonl")
    running = Running(small_model, tmp_path, {}, {})

    def urlopen(request, timeout):
        path = request.full_url.removeprefix("http://127.0.0.1:8090")
        answer = running.client.post(
            path, content=request.data, headers=dict(request.header_items())
        )
        if answer.status_code != 200:
            raise urllib.error.HTTPError(
                path, answer.status_code, "", {}, io.BytesIO(answer.content)
            )
        return io.BytesIO(answer.content)

    example = import_module("send_proof")
    monkeypatch.setattr(example.urllib.request, "urlopen", urlopen)
    try:
        running.announce()
        monkeypatch.setenv("SECRET", secret_of("node_B"))
        assert example.main(str(tmp_path / "proof.jsonl"), "http://127.0.0.1:8090") == 1
        assert "401" in capsys.readouterr().err
        monkeypatch.setenv("SECRET", secret_of("node_A"))
        for new in (True, False):
            assert example.main(str(tmp_path / "proof.jsonl"), "http://127.0.0.1:8090") == 0
            assert (
                json.loads(capsys.readouterr().out.splitlines()[-1])["new"] is new
            )  # after lines of the log
        running.wait_ready()

        def node() -> dict:
            rows = running.get("/nodes")["nodes"]
            return next(row for row in rows if row["public_key"] == "node_A")

        until(lambda: node()["recorded"] > 0)
    finally:
        running.close()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_validator_cron(tmp_path, fork_server):
    model = load_model("reference:qwen3", dtype="float32", device="cpu")  # its law comes with assay
    inbox = tmp_path / "inbox"
    tools = tmp_path / "bin"
    inbox.mkdir()
    tools.mkdir()
    path = shlex.quote(ENVIRONMENT["PATH"])
    (tools / "assay").write_text(
        f'#!/bin/sh\nPATH={path} exec {shlex.join(fork_server)} assay "$@"\n'
    )
    (tools / "assay").chmod(0o755)
    (tmp_path / "pins.toml").write_text(pins_text(model))
    proof_of(model, "node_A").save(inbox / "first.jsonl")
    proof_of(model, "node_B").save(inbox / "other.jsonl")  # of another key than the chain says
    expected = [("first", BLOCK, "node_A"), ("other", BLOCK, "node_C"), ("late", BLOCK, "node_B")]
    (inbox / "expected.tsv").write_text("".join("\t".join(line) + "\n" for line in expected))
    environment = ENVIRONMENT | {"PATH": f"{tools}:/usr/bin:/bin", "ASSAY_MODEL": model.reference}
    places = (EXAMPLES / "validator_cron.sh", inbox, tmp_path / "pins.toml", tmp_path / "l.sqlite3")
    command = ["sh", *map(str, places)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "first honest\nother unsure\n"), done.stderr
    assert json.loads((inbox / "honest" / "first.json").read_text())["verdict"] == "honest"
    assert "public_key" in (inbox / "unsure" / "other.log").read_text()
    with closing(sqlite3.connect(tmp_path / "l.sqlite3")) as database:
        assert database.execute("SELECT public_key, verdict FROM evidence").fetchall() == [
            ("node_A", "honest")
        ]
    again = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert again.stdout == ""


@pytest.mark.parametrize(
    ("code", "printed"),
    [(0, "honest"), (1, "fraud"), (2, "unsure"), (127, ""), (137, "")],
)
def test_validator_cron_moves_what_was_judged(tmp_path, code, printed):
    """Also the proof of a last line without its end."""
    inbox = tmp_path / "inbox"
    inbox.mkdir()
    (tmp_path / "assay").write_text(f"#!/bin/sh\nexit {code}\n")
    (tmp_path / "assay").chmod(0o755)
    (inbox / "first.jsonl").write_text("a proof")
    (inbox / "expected.tsv").write_text("first\tblock\tkey")
    ended = subprocess.run(
        ["sh", EXAMPLES / "validator_cron.sh", inbox, "pins.toml", "ledger.sqlite3"],
        env=ENVIRONMENT | {"PATH": f"{tmp_path}:/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert ended.stdout == (f"first {printed}\n" if printed else "")
    assert (inbox / printed / "first.jsonl").exists()
    assert ("first was not judged" in ended.stderr) == (not printed)


def results(database, script):
    """The rows of every query of a script, run as a reader that may not write."""
    text = "\n".join(
        line for line in (EXAMPLES / script).read_text().splitlines() if not line.startswith("--")
    )
    with closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True)) as connection:
        return [connection.execute(query).fetchall() for query in text.split(";") if query.strip()]


def test_service_sql(tmp_path):
    shutil.copy(VECTORS / "first" / "service" / "service.sqlite3", tmp_path)
    rounds, smallest, callbacks, checks = results(tmp_path / "service.sqlite3", "service.sql")
    assert len(rounds) == 1
    assert 0 < len(smallest) <= 3
    assert [row[2] for row in smallest] == sorted(row[2] for row in smallest)
    assert isinstance(callbacks, list)
    assert isinstance(checks, list)


def test_ledger_sql(tmp_path):
    with Ledger(tmp_path / "ledger.sqlite3") as ledger:
        ledger.append([update(0, nonces=range(8)), update(1, key="node_B", nonces=range(8, 16))])
        head = ledger.head
    lives, today, found = results(tmp_path / "ledger.sqlite3", "ledger.sql")
    assert {(row[0], row[5]) for row in lives} == {("node_A", 8), ("node_B", 8)}
    assert len(today) == 2
    assert [tuple(row) for row in found] == [head]


@pytest.mark.needs("node", "tsc")
def test_receipts_in_typescript(tmp_path):
    options = ("--strict", "--target", "es2022", "--module", "es2022", "--outDir", str(tmp_path))
    subprocess.run(
        ["tsc", *options, *(str(EXAMPLES / name) for name in ("receipts.ts", "node.d.ts"))],
        check=True,
    )
    reader = (tmp_path / "receipts.js").rename(tmp_path / "receipts.mjs")
    check = [
        "node",
        str(EXAMPLES / "receipts_check.mjs"),
        str(reader),
        str(VECTORS / "responses.json"),
    ]
    counted = json.loads(subprocess.run(check, capture_output=True, text=True, check=True).stdout)
    assert counted["wrong"] == 0
    assert counted["seen"] > 25
    path = VECTORS / "responses.jsonl"
    read = subprocess.run(
        ["node", str(reader), str(path)], capture_output=True, text=True, check=True
    )
    made = Receipts.load(path)
    wanted = [
        [r.request_id, len(r.output), int(made.header.seed(r).words()[0])] for r in made.receipts
    ]
    assert json.loads(read.stdout) == {"key": made.header.public_key, "receipts": wanted}
    (tmp_path / "bad.jsonl").write_bytes(path.read_bytes().replace(b'"index":0', b'"index":1', 1))
    assert subprocess.run(
        ["node", str(reader), str(tmp_path / "bad.jsonl")], capture_output=True, check=False
    ).returncode
