"""Blocks of the pages for operators, validators and implementers run, on loopback and without root.

Each page runs in a folder with what its reader has, in the order in which its blocks are met.
"""

import json
import re
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from tests.docs.shell import ROOT, held, page, script

pytestmark = pytest.mark.usefixtures("warm")
SHORT = "--seq-len 32"
"""What makes a nonce eight times as fast, and what a verdict must be told."""
PROOF = (
    f"assay poc prove --model reference:qwen3 --block-hash BLOCK --public-key KEY --nonces 0:64 {SHORT} -o proof.jsonl"
)
AS_ROOT = """\
mkdir -p etc/systemd/system
ln -s "$ROOT/deploy" deploy
sudo() { shift 2; "$@"; }
systemctl() {
  case "$1" in
    stop) kill $SERVICE; wait $SERVICE;;
    start | enable)
      (cd "$PLACE" && exec $AHEAD assay poc serve --model reference:qwen3 --data-dir state --port $PORT_8000) &
      SERVICE=$!
      curl --silent --fail --retry 90 --retry-delay 1 --retry-connrefused http://127.0.0.1:8000/ready;;
  esac
}
PLACE=$PWD
"""
"""What needs root on the machine of an operator, done to a service in a folder."""


def blocks(name: str, kind: str) -> list[str]:
    return re.findall(rf"^```{kind}\n(.*?)^```$", page(name), flags=re.DOTALL | re.MULTILINE)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_calls_of_a_first_round(tmp_path: Path):
    said = held(script("service", instead={"/var/lib/assay": f"{tmp_path}/state"}), tmp_path)
    for state in ("GENERATING", "STOPPED", "VALIDATING"):
        assert f'"{state}"' in said, state
    assert '"residual_test"' in said
    assert '"vectors"' in said or '"artifacts"' in said
    assert {"batches": []} in [json.loads(line) for line in said.splitlines() if line.startswith('{"batches"')]
    assert (tmp_path / "assay-data" / "service.sqlite3").is_file()  # of the application that it was mounted in


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(shutil.which("sqlite3") is None, reason="needs sqlite3: apt-get install sqlite3")
def test_an_installation_backups_upgrades_and_downgrades(tmp_path: Path):
    programs = {"/opt/assay/bin/assay": "assay", "/opt/assay/bin/pip": "pip"}
    folders = {"/var/lib/assay": f"{tmp_path}/state", "/etc/": f"{tmp_path}/etc/"}
    before = AS_ROOT.replace("$ROOT", str(ROOT))
    held(script("operations", before=before, instead=programs | folders), tmp_path)
    state = tmp_path / "state"
    assert (state / "service.sqlite3").is_file()
    assert not (state / "before-upgrade.sqlite3").exists()  # it is the database again
    assert (tmp_path / "etc" / "assay" / "api_key").stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "etc" / "systemd" / "system" / "assay.service").is_file()


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(shutil.which("sqlite3") is None, reason="needs sqlite3: apt-get install sqlite3")
def test_a_validator_takes_blocks_and_is_backed_up(tmp_path: Path):
    (tmp_path / "nodes.toml").write_text('[[nodes]]\npublic_key = "node_A"\n')
    pins = "assay poc pins new --model reference:qwen3 --from-proof proof.jsonl -o pins.toml\n"
    ready = "curl --silent --fail --retry 90 --retry-delay 1 --retry-connrefused http://127.0.0.1:8090/ready"
    instead = {
        "--data-dir /var/lib/assay-validator\n": f"--data-dir {tmp_path}/judge &\n{ready}\n",
        "cd /var/lib/assay-validator": f"cd {tmp_path}/judge",
        "/etc/": f"{tmp_path}/etc/",
    }
    before = f"{AS_ROOT.replace('$ROOT', str(ROOT))}{PROOF}\n{pins}"
    said = held(script("validator", before=before, instead=instead), tmp_path)
    assert '"new":true' in said
    assert "whsec_" in said
    assert {"backup-validator.sqlite3", "backup-ledger.sqlite3"} <= {
        path.name for path in (tmp_path / "judge").iterdir()
    }


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_pins(tmp_path: Path):
    (tmp_path / "nodes.toml").write_text('[[nodes]]\npublic_key = "KEY"\n')
    before = f"{PROOF} --strength 256\ncp proof.jsonl honest.jsonl\n"
    said = held(script("pins", before=before, instead={"MODEL": "reference:qwen3"}), tmp_path)
    assert "the header is allowed" in said
    assert "honest" in said


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_ledger(tmp_path: Path):
    head = "assay poc ledger show ledger.sqlite3 --json | python -c 'import json; print(json.loads(input())[\"head\"])'"
    audit = "assay poc verify proof.jsonl --model reference:qwen3 --block-hash BLOCK --public-key KEY"
    of_two = f"{audit} --ledger mine.sqlite3\ncp ledger.jsonl theirs.jsonl\n"
    instead = {
        "MODEL": "reference:qwen3",
        "--head HASH": f'--head "$({head})"',
        "assay poc ledger merge": f"{of_two}assay poc ledger merge",
        'public_key="KEY")': 'public_key="KEY", seq_len=32)',
    }
    small = {"assay poc verify": SHORT}
    said = held(script("ledger", before=f"{PROOF}\n", instead=instead, small=small), tmp_path)
    assert said.count("clean") >= 2
    assert "2 of 2" in said
    (query,) = blocks("ledger", "sql")
    with closing(sqlite3.connect(tmp_path / "ledger.sqlite3")) as opened:
        assert [row[1:3] for row in opened.execute(query)] == [("KEY", "BLOCK")] * 2


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_node_proves_before_it_is_announced(tmp_path: Path):
    programs = {"/opt/assay/bin/assay": "assay", "/opt/assay/bin/pip": "pip"}
    instead = programs | {"--model MODEL": "--model reference:qwen3", "/etc/": f"{tmp_path}/etc/"}
    before = AS_ROOT.replace("$ROOT", str(ROOT)) + "mkdir etc/assay\n"
    small = {"assay poc prove": SHORT, "assay poc verify": SHORT}
    assert "honest" in held(script("node", before=before, instead=instead, small=small), tmp_path)
    assert (tmp_path / "etc" / "systemd" / "system" / "assay@.service.d" / "per-device.conf").is_file()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_responses_are_made_and_replayed(tmp_path: Path):
    (request,) = blocks("responses", "json")
    assert '"r1"' in request
    requests = "".join(request.replace('"r1"', f'"r{number}"') for number in range(8))  # of one alone a verdict is open
    for name in ("prompts.jsonl", "requests.jsonl"):
        (tmp_path / name).write_text(requests)
    said = held(script("responses", instead={"--model MODEL": "--model reference:qwen3"}), tmp_path)
    assert "honest" in said


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_commands_of_the_formats_and_the_programs_of_streams_and_models(tmp_path: Path):
    small = {"assay poc prove": SHORT, "assay poc verify": SHORT}
    assert "nothing" in held(script("protocol", before=f"{PROOF}\n", small=small), tmp_path)
    (tmp_path / "proof.jsonl").unlink()
    assert "honest" in held(script("decode", small=small), tmp_path)
    said = held(script("streams"), tmp_path)
    assert re.search(r"^[0-9a-f]{64}$", said, flags=re.MULTILINE)
    held(script("models"), tmp_path)
