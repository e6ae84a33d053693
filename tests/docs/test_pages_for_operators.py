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

from tests.docs.shell import ROOT, held, page, page_blocks, script

FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
COMMANDS = (
    r"(?m)^(?:assay|pip|python3?[\d.]*|torchrun|make|curl|install|useradd|systemctl|sudo|sqlite3|amtool|vllm|cd) "
)
PROOF = "assay poc prove --model reference:qwen3 --block-hash BLOCK --public-key KEY --nonces 0:64 -o proof.jsonl"
PROGRAM = "python - <<"
"""How a script begins a program in Python: those of some pages are fragments."""
AS_ROOT = """\
sudo() { shift 2; "$@"; }
systemctl() {
  if [ "$1" = stop ]; then
    kill $SERVICE; wait $SERVICE
  else
    (cd "$PLACE" && exec assay poc serve --model reference:qwen3 --data-dir state) & SERVICE=$!
    curl --silent --fail --retry 90 --retry-delay 1 --retry-connrefused http://127.0.0.1:8000/ready
  fi
}
PLACE=$PWD
systemctl start assay
"""
"""What needs root on the machine of an operator, done to a service in a folder."""

RUN = {
    "tests/docs/test_blocks.py": ("tutorial",),
    "tests/docs/test_quickstart.py": ("vhack-quickstart",),
    "tests/docs/test_calibration_page.py": ("calibration",),
    "tests/docs/test_pages_for_operators.py": (
        *("node", "service", "operations", "validator", "pins", "ledger"),
        *("protocol", "responses", "decode", "streams", "models"),
    ),
    "tests/docs/test_pages_for_researchers.py": ("statistics", "vhack", "vhack-pairs", "vhack-checks"),
    "tests/docs/test_command_lines.py": ("networks",),
    "tests/vllm/recipe.py": ("vllm",),
}
"""Pages whose blocks of ``sh`` and ``python`` run, by the test that runs them."""

READ = {
    "gpu": "measurements on GPUs; test_command_lines proves as the page does",
    "experiments": "measurements of hours; test_pages_for_researchers runs the rates",
    "redteam": "measurements of hours; test_command_lines runs the tables, and networks of a hundred nodes",
    "redteam-responses": "measurements of hours",
    "vhack-training": "needs models and loops of one's own; test_pages_for_researchers runs the loop over an adapter",
    "vhack-results": "measurements of hours; test_pages_for_researchers runs the report",
    "vhack-experiment-3": "measurements of hours",
}
"""Pages with commands that no test runs as they stand, and why; tests/docs/test_command_lines.py has their programs
read every one of them."""

NOT_RUN_BLOCKS = {
    "python3.11 -m venv /opt/assay": "root, and the environment of the machine",
    "/opt/assay/bin/pip": "root, and the environment of the machine",
    "pip install -c constraints.txt '.[serve]'": "would change the environment of the tests",
    "useradd": "root, and users of the machine",
    "install -m 0644 deploy/assay": "root, and the units of the machine",
    "install -m 0644 deploy/nginx.conf": "root; tests/poc/service/dashboard/test_operations.py has both files read",
    "amtool": "tests/poc/service/dashboard/test_operations.py runs the first two; the third needs an Alertmanager",
    "python -m tests.stats.simulate": "minutes",
    "curl -o receipts.jsonl": "receipts of a server of vLLM: tests/vllm fetches and replays some",
    "python3 -c 'import secrets": "a second receiver: test_a_receiver_with_a_secret runs it",
    "assay poc serve --model reference:qwen3 --callback-secret": "a host elsewhere",
}
"""Beginnings of blocks of commands that do not run on the pages that do, and why."""


def test_every_page_with_commands_is_run_or_says_why_not():
    has_code = {
        path.stem
        for path in (ROOT / "docs").glob("*.md")
        for kind, body in FENCED.findall(path.read_text(encoding="utf-8"))
        if kind in ("sh", "bash", "python") or (not kind and re.search(COMMANDS, body))
    }
    ran = {name for names in RUN.values() for name in names}
    assert has_code == ran | READ.keys()
    assert not ran & READ.keys()
    for test, names in RUN.items():
        assert all(name in (ROOT / test).read_text(encoding="utf-8") for name in names)


def test_every_block_of_commands_runs_or_says_why_not():
    of_shell = ("tests/docs/test_pages_for_operators.py", "tests/docs/test_pages_for_researchers.py")
    for name in (name for test in of_shell for name in RUN[test]):
        for kind, body in FENCED.findall(page(name)):
            if not kind and re.search(COMMANDS, body):
                assert body.startswith(tuple(NOT_RUN_BLOCKS)), f"{name}: {body}"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_calls_of_a_first_round(tmp_path: Path):
    said = held(script("service", leave_out=("from assay.poc.service",)).partition(PROGRAM)[0], tmp_path)
    for state in ("GENERATING", "STOPPED", "VALIDATING"):
        assert f'"{state}"' in said, state
    assert '"residual_test"' in said
    assert '"vectors"' in said or '"artifacts"' in said


@pytest.mark.slow
def test_a_receiver_with_a_secret(tmp_path: Path):
    (block,) = (body for _, body in FENCED.findall(page("service")) if body.startswith("python3 -c 'import secrets"))
    assert json.loads(held(f"{page_blocks.HEAD}{block}", tmp_path)) == {"batches": []}


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(shutil.which("sqlite3") is None, reason="needs sqlite3: apt-get install sqlite3")
def test_backups_upgrades_and_downgrades(tmp_path: Path):
    instead = {"/var/lib/assay": f"{tmp_path}/state", "/opt/assay/bin/assay": "assay"}
    pip = ("/opt/assay/bin/pip", "useradd", "amtool")
    held(script("operations", before=AS_ROOT, instead=instead, leave_out=pip), tmp_path)
    state = tmp_path / "state"
    assert (state / "service.sqlite3").is_file()
    assert not (state / "before-upgrade.sqlite3").exists()  # it is the database again


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(shutil.which("sqlite3") is None, reason="needs sqlite3: apt-get install sqlite3")
def test_a_validator_takes_blocks_and_is_backed_up(tmp_path: Path):
    (tmp_path / "nodes.toml").write_text('[[nodes]]\npublic_key = "node_A"\n')
    pins = "assay poc pins new --model reference:qwen3 --from-proof proof.jsonl -o pins.toml\n"
    ready = "curl --silent --fail --retry 90 --retry-delay 1 --retry-connrefused http://127.0.0.1:8090/ready"
    instead = {
        "--data-dir /var/lib/assay-validator": f"--data-dir {tmp_path}/judge &\n{ready}",
        "cd /var/lib/assay-validator": f"cd {tmp_path}/judge",
    }
    said = held(script("validator", before=f"{PROOF}\n{pins}", instead=instead), tmp_path)
    assert '"new":true' in said
    assert "whsec_" in said
    assert {"backup-validator.sqlite3", "backup-ledger.sqlite3"} <= {
        path.name for path in (tmp_path / "judge").iterdir()
    }


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_pins(tmp_path: Path):
    before = f"{PROOF} --strength 256 --seq-len 32\ncp proof.jsonl honest.jsonl\n"
    servers = ("assay poc serve", "assay poc validator", "network =", "pins =", "verdict =")
    text = script("pins", before=before, instead={"MODEL": "reference:qwen3"}, leave_out=servers)
    said = held(text.partition(PROGRAM)[0], tmp_path)
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
    }
    said = held(script("ledger", before=f"{PROOF}\n", instead=instead).partition(PROGRAM)[0], tmp_path)
    assert said.count("clean") >= 2
    assert "2 of 2" in said
    (query,) = (text for kind, text in FENCED.findall(page("ledger")) if kind == "sql")
    with closing(sqlite3.connect(tmp_path / "ledger.sqlite3")) as opened:
        assert [row[1:3] for row in opened.execute(query)] == [("KEY", "BLOCK")]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_node_proves_before_it_is_announced(tmp_path: Path):
    assert "honest" in held(script("node", instead={"MODEL": "reference:qwen3"}), tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_responses_are_made_and_replayed(tmp_path: Path):
    (request,) = (body for kind, body in FENCED.findall(page("responses")) if kind == "json")
    assert '"r1"' in request
    requests = "".join(request.replace('"r1"', f'"r{number}"') for number in range(8))  # of one alone a verdict is open
    for name in ("prompts.jsonl", "requests.jsonl"):
        (tmp_path / name).write_text(requests)
    said = held(script("responses", instead={"--model MODEL": "--model reference:qwen3"}), tmp_path)
    assert "honest" in said


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_commands_of_the_formats_and_the_programs_of_streams_and_models(tmp_path: Path):
    assert "nothing" in held(script("protocol", before=f"{PROOF}\n"), tmp_path)
    (tmp_path / "proof.jsonl").unlink()
    assert "honest" in held(script("decode"), tmp_path)
    said = held(script("streams"), tmp_path)
    assert re.search(r"^[0-9a-f]{64}$", said, flags=re.MULTILINE)
    held(script("models"), tmp_path)
