"""docs/validator.md and the unit file: what they tell an operator is so."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from assay.cli import run
from assay.poc.validator import ValidatorSettings
from assay.poc.validator.claims import REASONS
from assay.poc.validator.epochs import draw, message_seed
from assay.poc.validator.intake import PREFIX
from assay.poc.validator.metrics import ValidatorMetrics
from assay.poc.validator.worker import AUDIT, EXPECTED

ROOT = Path(__file__).parents[3]
TEXT = (ROOT / "docs" / "validator.md").read_text()
UNIT = ROOT / "deploy" / "assay-validator.service"


def test_the_sample_that_the_page_draws_is_the_validators():
    (code,) = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)
    found: dict = {}
    exec(code, found)
    nonces = list(range(5, 500, 7))
    body = b'{"public_key":"node_A"}'
    import hashlib

    seed = message_seed(b"s" * 32, "node_A", "msg_1", hashlib.sha256(body).digest())
    wanted = [nonces[place] for place in draw(seed, nonces, 0, len(nonces))]
    assert found["order"](b"s" * 32, "node_A", "msg_1", body, nonces) == wanted


def test_every_metric_and_name_that_the_page_mentions_exists():
    exported = ValidatorMetrics().text().decode()
    for name in re.findall(r"`(assay_validator_\w+)", TEXT):
        assert name.rstrip("_") in exported, name
    table = TEXT[TEXT.index("| value | refused as |") : TEXT.index("A refusal is one JSON object")]
    names = [
        name
        for row in table.splitlines()[2:]
        for name in re.findall(r"`(\w+)`", row.split("|")[2] if "|" in row else "")
    ]
    assert len(names) > 15
    assert set(names) <= set(REASONS)


def test_every_alert_is_explained_and_asks_for_metrics_that_there_are():
    rules = yaml.safe_load((ROOT / "deploy" / "validator-alerts.yml").read_text())["groups"][0]["rules"]
    assert {rule["alert"] for rule in rules} == set(re.findall(r"^\| (Validator\w+) ", TEXT, flags=re.MULTILINE))
    exported = ValidatorMetrics().text().decode()
    for rule in rules:
        row = next(line for line in TEXT.splitlines() if line.startswith(f"| {rule['alert']} "))
        asked = set(re.findall(r"assay_validator_\w+", rule["expr"]))
        assert asked == set(re.findall(r"assay_validator_\w+", row))
        assert all(re.search(rf"^{name}(?:{{| )", exported, flags=re.MULTILINE) for name in asked), rule["alert"]


def test_the_numbers_of_the_page_are_those_of_the_code():
    defaults = {name: field.default for name, field in ValidatorSettings.model_fields.items()}
    assert defaults["positions"] == 2**22
    assert defaults["sample"] == 8
    assert "eight nonces are drawn at a time (`--sample`)" in TEXT
    assert (defaults["minimum_share"], defaults["open_blocks"], defaults["max_proof"]) == (0.1, 16, 2**24)
    assert f"drawn on to {AUDIT} nonces" in TEXT
    assert f"({EXPECTED:.0f} for a new node)" in TEXT
    assert defaults["keep"] == 2 * 86_400


def test_every_flag_and_route_of_the_page_exists(capsys):
    assert run(["poc", "validator", "--help"]) == 0
    known = capsys.readouterr().out
    flags = set(re.findall(r"`(--[\w-]+)", TEXT))
    assert flags
    for flag in flags:
        assert flag in known, flag
    source = (ROOT / "src" / "assay" / "poc" / "validator" / "app.py").read_text()
    for route in re.findall(
        rf"`(?:GET |POST |{PREFIX}|…)*(/(?:nodes|verdicts|evidence|commitments|status|events|blocks))", TEXT
    ):
        assert f'"{route}' in source, route


def test_the_unit_runs_the_command_with_names_that_it_reads():
    unit = UNIT.read_text()
    assert "/opt/assay/bin/assay poc validator" in unit
    for name in ("ASSAY_POC_VALIDATOR_PINS", "ASSAY_POC_VALIDATOR_NODES", "ASSAY_DATA_DIR", "ASSAY_API_KEY_FILE"):
        assert f"Environment={name}=" in unit


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze")
def test_systemd_accepts_the_unit(tmp_path):
    unit = UNIT.read_text().replace("/opt/assay/bin/assay", "/bin/true")
    (tmp_path / "assay-validator.service").write_text(unit)
    command = ["systemd-analyze", "verify", str(tmp_path / "assay-validator.service")]
    found = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert "Unknown" not in found.stderr, found.stderr
