"""What operators are given names only what there is: metrics, labels, flags, files."""

import json
import re
import subprocess
from itertools import product
from pathlib import Path

import pytest
import yaml

from tests.poc.service.series import absent_series

ROOT = Path(__file__).parents[4]
DEPLOY = ROOT / "deploy"


def _expressions() -> list[tuple[str, str]]:
    dashboard = json.loads((DEPLOY / "grafana" / "assay.json").read_text())
    panels = [
        (panel["title"], target["expr"])
        for panel in dashboard["panels"]
        for target in panel["targets"]
    ]
    rules = yaml.safe_load((DEPLOY / "alerts.yml").read_text())["groups"][0]["rules"]
    return panels + [(rule["alert"], rule["expr"]) for rule in rules]


def test_every_series_that_is_asked_for_exists_before_anything_has_happened(service):
    """Prometheus sees no increase in a series that begins at 1: its first event would raise no
    alert.
    """
    absent = absent_series(
        service.client.get("/metrics").text, [expression for _, expression in _expressions()]
    )
    assert not absent


@pytest.mark.pages
@pytest.mark.needs("systemd-analyze")
@pytest.mark.parametrize(
    "name", ["assay.service", "assay@3.service", "assay-vllm.service", "assay-validator.service"]
)
def test_systemd_accepts_the_unit(name, tmp_path):
    places = {"assay.service": ("assay.service", "assay@.service"), "assay-vllm.service": ("assay-vllm.service",),
              "assay-validator.service": ("assay-validator.service",),
              "per-device.conf": ("assay@.service.d/per-device.conf",)}  # fmt: skip
    for file, found in places.items():
        text = (DEPLOY / file).read_text()
        assert text.count("ExecStart=/opt/assay/bin/") == 1
        for place in found:  # the programs are not installed here; everything else is as it will be
            (tmp_path / place).parent.mkdir(exist_ok=True)
            (tmp_path / place).write_text(re.sub(r"/opt/assay/bin/\w+", "/bin/true", text))
    done = subprocess.run(
        ["systemd-analyze", "verify", str(tmp_path / name)],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("unit", sorted(DEPLOY.glob("*.service")), ids=lambda path: path.name)
def test_no_unit_hides_the_gpu(unit):
    """ProtectClock allows one device, which up to systemd 252 forbids all others."""
    settings = re.findall(r"^(\w+)=", unit.read_text(), flags=re.MULTILINE)
    assert not {"PrivateDevices", "ProtectClock", "DevicePolicy", "DeviceAllow"} & set(settings)


def test_the_unit_of_vllm_starts_again_after_an_end_without_failure():
    """vLLM ends with exit code 0 when its engine has died."""
    assert "\nRestart=always\n" in (DEPLOY / "assay-vllm.service").read_text()


@pytest.mark.pages
@pytest.mark.needs("promtool")
def test_prometheus_accepts_its_configuration():
    command = ["promtool", "check", "config", "--syntax-only", "prometheus.yml"]
    done = subprocess.run(command, cwd=DEPLOY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (manager,) = yaml.safe_load((DEPLOY / "prometheus.yml").read_text())["alerting"][
        "alertmanagers"
    ]
    host, _, port = manager["static_configs"][0]["targets"][0].partition(":")
    service = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"][host]
    assert service["ports"] == [f"127.0.0.1:{port}:{port}"]


@pytest.mark.pages
@pytest.mark.needs("amtool")
def test_alertmanager_accepts_its_configuration_and_calls_for_what_is_critical():
    def amtool(*arguments: str) -> str:
        command = ["amtool", *arguments]
        return subprocess.run(
            command, cwd=DEPLOY, capture_output=True, text=True, check=True
        ).stdout

    assert "SUCCESS" in amtool("check-config", "alertmanager.yml")
    for severity, receiver in (("critical", "on-call"), ("warning", "mail"), ("info", "mail")):
        route = (
            "config",
            "routes",
            "test",
            "--config.file",
            "alertmanager.yml",
            f"severity={severity}",
        )
        assert amtool(*route).strip() == receiver


@pytest.mark.pages
@pytest.mark.needs("promtool")
@pytest.mark.parametrize("rules", ["alerts", "validator-alerts"])
def test_alerts_fire_for_the_first_event(rules):
    done = subprocess.run(
        ["promtool", "test", "rules", f"{rules}.test.yml"],
        cwd=DEPLOY,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode()


@pytest.mark.parametrize("rules", ["alerts", "validator-alerts"])
def test_every_alert_has_a_moment_at_which_it_fires_and_one_at_which_it_does_not(rules):
    (group,) = yaml.safe_load((DEPLOY / f"{rules}.yml").read_text())["groups"]
    tests = yaml.safe_load((DEPLOY / f"{rules}.test.yml").read_text())["tests"]
    asked = [
        (one["alertname"], bool(one["exp_alerts"]))
        for test in tests
        for one in test["alert_rule_test"]
    ]
    names = [rule["alert"] for rule in group["rules"]]
    assert set(asked) == set(product(names, (True, False)))
