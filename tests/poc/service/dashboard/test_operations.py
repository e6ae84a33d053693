"""What operators are given names only what there is: metrics, labels, flags, files."""

import json
import re
import shutil
import sqlite3
import subprocess
import time
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import pytest
import typer
import yaml

from assay.cli import app
from assay.poc.service import Settings
from assay.poc.service.metrics import Metrics
from assay.poc.validator import ValidatorSettings
from tests.poc.service.conftest import ROUND
from tests.poc.service.series import absent_series
from tests.waiting import until

ROOT = Path(__file__).parents[4]
DEPLOY = ROOT / "deploy"
PAGE = (ROOT / "docs" / "operations.md").read_text()
RULES = ("alerts.yml", "validator-alerts.yml")
SUFFIXES = {"histogram": ("_bucket", "_sum", "_count"), "counter": ("",), "gauge": ("",)}
METRIC = re.compile(r"\b((?:assay_poc|process)_\w+)(?:\{([^}]*)\})?")


@pytest.fixture(scope="module")
def metrics() -> dict[str, set[str]]:
    """Every name that the service exposes, with its labels."""
    made = Metrics()
    labels = {f"assay_poc_{metric._name.removeprefix('assay_poc_')}": set(metric._labelnames) for metric in _own(made)}
    found = {}
    for name, kind in re.findall(r"^# TYPE (\w+) (\w+)$", made.text().decode(), flags=re.MULTILINE):
        own = labels.get(name.removesuffix("_total"), set())
        found |= {name + suffix: own | ({"le"} if suffix == "_bucket" else set()) for suffix in SUFFIXES[kind]}
    return found


def _own(made: Metrics) -> Iterator:
    return (value for value in vars(made).values() if hasattr(value, "_labelnames"))


def _expressions() -> list[tuple[str, str]]:
    dashboard = json.loads((DEPLOY / "grafana" / "assay.json").read_text())
    panels = [(panel["title"], target["expr"]) for panel in dashboard["panels"] for target in panel["targets"]]
    rules = yaml.safe_load((DEPLOY / "alerts.yml").read_text())["groups"][0]["rules"]
    return panels + [(rule["alert"], rule["expr"]) for rule in rules]


def test_every_series_that_is_asked_for_exists_before_anything_has_happened(service):
    """Prometheus sees no increase in a series that begins at 1: its first event would raise no alert."""
    absent = absent_series(service.client.get("/metrics").text, [expression for _, expression in _expressions()])
    assert not absent


@pytest.mark.parametrize(("where", "expression"), _expressions())
def test_queries_ask_for_metrics_and_labels_that_there_are(metrics, where, expression):
    asked = METRIC.findall(expression)
    assert asked or expression.startswith("up{")
    for name, selector in asked:
        assert name in metrics, where
        # The scrape adds these two.
        wanted = set(re.findall(r"(\w+)\s*[=!]~?", selector)) - {"instance", "job"}
        assert wanted <= metrics[name], (where, name)
        for group in re.findall(r"by \(([^)]*)\)", expression):
            assert {label.strip() for label in group.split(",")} <= metrics[name] | {"instance", "le"}, where
    assert expression.count("(") == expression.count(")")


def test_the_document_names_metrics_that_there_are(metrics):
    named = {name for name, _ in METRIC.findall(PAGE)}
    families = {re.sub(r"_(bucket|sum|count)$", "", name) for name in metrics}
    assert len(named) > 10
    assert named <= families


def test_every_alert_is_explained_and_every_explanation_has_its_alert():
    rules = yaml.safe_load((DEPLOY / "alerts.yml").read_text())["groups"][0]["rules"]
    assert {rule["alert"] for rule in rules} == set(re.findall(r"^\| (Assay\w+) ", PAGE, flags=re.MULTILINE))
    for rule in rules:
        row = next(line for line in PAGE.splitlines() if line.startswith(f"| {rule['alert']} "))
        assert {name for name, _ in METRIC.findall(rule["expr"])} == {name for name, _ in METRIC.findall(row)}
    headings = {re.sub(r"[^\w ]", "", line.lstrip("# ")).lower().replace(" ", "-") for line in PAGE.splitlines()}
    assert set(re.findall(r"\]\(#([\w-]+)\)", PAGE)) <= headings


def test_the_document_names_flags_and_variables_that_there_are():
    poc = typer.main.get_command(app).commands["poc"].commands
    commands = [poc["serve"], poc["receive"], poc["validator"], *poc["callbacks"].commands.values()]
    options = [option for command in commands for option in command.params]
    flags = {flag for option in options for flag in option.opts} | {"--help"}
    ours = " ".join(
        line for line in PAGE.splitlines() if not line.startswith(("useradd", "install", "/opt", "systemctl", "amtool"))
    )
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", ours)) <= flags
    deployed = "".join(path.read_text() for path in _deployed())
    variables = set(re.findall(r"\bASSAY_[A-Z_]+", PAGE + deployed))
    settings = {Settings.environment_name(field) for field in Settings.model_fields}
    validator = {f"ASSAY_POC_VALIDATOR_{name.upper()}" for name in ValidatorSettings.model_fields}
    assert variables <= settings | validator | {name for option in options for name in _variables(option)}


def _variables(option) -> list[str]:
    names = option.envvar
    return [names] if isinstance(names, str) else list(names or ())


def _deployed() -> list[Path]:
    return [path for path in DEPLOY.rglob("*") if path.is_file() and path.name != ".env"]


def test_defaults_in_the_document_are_those_of_the_command():
    rows = dict(re.findall(r"^\| `--([\w-]+)` \| ([\w.]+) \|", PAGE, flags=re.MULTILINE))
    command = _serve()
    defaults = {option.name.replace("_", "-"): option.default for option in command.params}
    assert {"max-pending", "drain", "callback-attempts"} <= set(rows)
    for name, said in rows.items():
        assert {"off": False}.get(said, said) == defaults[name] or float(said) == defaults[name]


def _serve() -> typer.core.TyperCommand:
    return typer.main.get_command(app).commands["poc"].commands["serve"]


def test_panels_do_not_overlap():
    panels = json.loads((DEPLOY / "grafana" / "assay.json").read_text())["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert at["x"] + at["w"] <= 24
        assert not cells & taken, panel["title"]
        taken |= cells


def test_the_image_is_built_from_files_that_there_are():
    lines = (DEPLOY / "Dockerfile").read_text().splitlines()
    copied = [
        part for line in lines if line.startswith("COPY ") and "--from" not in line for part in line.split()[1:-1]
    ]
    allowed = {line[1:] for line in (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines() if line[0] == "!"}
    assert {"src", "pyproject.toml"} <= set(copied)
    assert set(copied) == allowed
    assert all((ROOT / name).exists() for name in copied)
    readme, licence = (re.search(rf"^{key} = .*\"([\w.]+)\"", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1]
                       for key in ("readme", "license-files"))  # fmt: skip
    assert {readme, licence} <= set(copied), "the build back end reads them"


def test_compose_mounts_files_that_there_are_and_waits_longer_than_the_service():
    compose = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    mounts = [mount for service in compose["services"].values() for mount in service["volumes"]]
    files = [mount.split(":")[0] for mount in mounts if mount.startswith("./")]
    assert len(files) == 5
    assert all((DEPLOY / name).exists() for name in files)
    assert (DEPLOY / compose["services"]["assay"]["build"]["context"]).resolve() == ROOT
    example = set(re.findall(r"^(\w+)=", (DEPLOY / "example.env").read_text(), flags=re.MULTILINE))
    asked = set(re.findall(r"\$\{(\w+)", (DEPLOY / "compose.yaml").read_text()))
    assert asked | {secret["environment"] for secret in compose["secrets"].values()} == example
    drain = _serve().params
    seconds = next(option.default for option in drain if option.name == "drain")
    assert int(compose["services"]["assay"]["stop_grace_period"].removesuffix("s")) > seconds
    unit = (DEPLOY / "assay.service").read_text()
    assert int(re.search(r"^TimeoutStopSec=(\d+)", unit, re.MULTILINE)[1]) > seconds


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze")
@pytest.mark.parametrize("name", ["assay.service", "assay@3.service", "assay-vllm.service"])
def test_systemd_accepts_the_unit(name, tmp_path):
    places = {"assay.service": ("assay.service", "assay@.service"), "assay-vllm.service": ("assay-vllm.service",),
              "per-device.conf": ("assay@.service.d/per-device.conf",)}  # fmt: skip
    for file, found in places.items():
        text = (DEPLOY / file).read_text()
        assert text.count("ExecStart=/opt/assay/bin/") == 1
        for place in found:  # the programs are not installed here; everything else is as it will be
            (tmp_path / place).parent.mkdir(exist_ok=True)
            (tmp_path / place).write_text(re.sub(r"/opt/assay/bin/\w+", "/bin/true", text))
    done = subprocess.run(
        ["systemd-analyze", "verify", str(tmp_path / name)], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("unit", sorted(DEPLOY.glob("*.service")), ids=lambda path: path.name)
def test_no_unit_hides_the_gpu(unit):
    """ProtectClock allows one device, which up to systemd 252 forbids all others."""
    settings = re.findall(r"^(\w+)=", unit.read_text(), flags=re.MULTILINE)
    assert not {"PrivateDevices", "ProtectClock", "DevicePolicy", "DeviceAllow"} & set(settings)


@pytest.mark.parametrize("unit", sorted(DEPLOY.glob("*.service")), ids=lambda path: path.name)
def test_caches_are_where_the_unit_may_write(unit):
    """The file system is read-only but for two folders, and the home of the user need not be one of them."""
    text = unit.read_text()
    (own,) = re.findall(r"^CacheDirectory=(.+)$", text, flags=re.MULTILINE)
    caches = dict(re.findall(r"^Environment=(\w+)=(%C.*)$", text, flags=re.MULTILINE))
    assert {"XDG_CACHE_HOME", "HF_HOME", "NUMBA_CACHE_DIR", "TRITON_CACHE_DIR"} <= caches.keys()
    assert all(f"{place}/".startswith(f"%C/{own}/") for place in caches.values())


def test_the_unit_of_vllm_starts_it_as_the_page_does():
    """With its flags and its plugin."""
    unit, page = (DEPLOY / "assay-vllm.service").read_text(), (ROOT / "docs" / "vllm.md").read_text()
    command, *_ = re.findall(r"VLLM_PLUGINS=assay vllm serve MODEL (.*?\n.*?)\n", page)
    flags = command.replace("\\\n", " ").split()
    assert "--worker-extension-cls" in flags
    assert all(part in unit.split() for part in flags)
    assert "Environment=VLLM_PLUGINS=assay\n" in unit


def test_a_service_per_device_has_a_port_and_a_folder_of_its_own():
    """What the unit sets for the one service, the drop-in sets again for each; lists are emptied first."""
    unit, device = (DEPLOY / "assay.service").read_text(), (DEPLOY / "per-device.conf").read_text()
    assert re.search(r"^ExecStart=$\nExecStart=.* --port 800%i$", device, re.MULTILINE)
    assert re.search(r"^StateDirectory=$\nStateDirectory=assay/%i$", device, re.MULTILINE)
    assert "ASSAY_DATA_DIR=%S/assay/%i\n" in device
    same = str.maketrans({"%": None})
    assert device.split("assay poc serve")[1].translate(same).replace("800i", "8000").strip() in unit


def test_a_backup_of_a_generating_service_is_where_a_restored_one_continues(serving, tmp_path):
    path, backup = tmp_path / "data" / "service.sqlite3", tmp_path / "backup.sqlite3"
    with serving() as service:
        service.post("/init/generate", ROUND)
        until(lambda: service.checked() > 20)
        with sqlite3.connect(path) as source, sqlite3.connect(backup) as target:
            source.backup(target)
        source.close()
        target.close()
        saved = service.checked()
        until(lambda: service.checked() > saved + 20)
    for old in (path, *path.parent.glob("service.sqlite3-*")):
        old.unlink()
    backup.rename(path)
    with sqlite3.connect(path) as restored:
        (checked,) = restored.execute("SELECT checked FROM rounds").fetchone()
    restored.close()
    assert checked > 20
    with serving() as service:
        assert service.status()["state"] == "GENERATING"
        until(lambda: service.checked() > checked)
        service.post("/stop")
        time.sleep(0.05)
        nonces = service.client.get("/api/v1/pow/status?after=-1&limit=10000").json()["valid_nonces"]
        assert len(nonces) == len(set(nonces)) == service.status()["total_valid"]


@pytest.mark.skipif(shutil.which("promtool") is None, reason="needs promtool: apt install prometheus")
def test_prometheus_accepts_its_configuration():
    command = ["promtool", "check", "config", "--syntax-only", "prometheus.yml"]
    done = subprocess.run(command, cwd=DEPLOY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (manager,) = yaml.safe_load((DEPLOY / "prometheus.yml").read_text())["alerting"]["alertmanagers"]
    host, _, port = manager["static_configs"][0]["targets"][0].partition(":")
    service = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"][host]
    assert service["ports"] == [f"127.0.0.1:{port}:{port}"]


@pytest.mark.skipif(shutil.which("amtool") is None, reason="needs amtool: apt install prometheus-alertmanager")
def test_alertmanager_accepts_its_configuration_and_calls_for_what_is_critical():
    def amtool(*arguments: str) -> str:
        command = ["amtool", *arguments]
        return subprocess.run(command, cwd=DEPLOY, capture_output=True, text=True, check=True).stdout

    assert "SUCCESS" in amtool("check-config", "alertmanager.yml")
    for severity, receiver in (("critical", "on-call"), ("warning", "mail"), ("info", "mail")):
        route = ("config", "routes", "test", "--config.file", "alertmanager.yml", f"severity={severity}")
        assert amtool(*route).strip() == receiver


def test_alertmanager_names_alerts_and_secrets_that_there_are():
    rules = [yaml.safe_load((DEPLOY / name).read_text())["groups"][0]["rules"] for name in RULES]
    names = {rule["alert"] for group in rules for rule in group}
    assert {rule["labels"]["severity"] for group in rules for rule in group} == {"critical", "warning", "info"}
    text = (DEPLOY / "alertmanager.yml").read_text()
    assert set(re.findall(r"alertname = (\w+)", text)) <= names
    secrets = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]["alertmanager"]["secrets"]
    assert re.findall(r"/run/secrets/(\w+)", text) == secrets


@pytest.mark.skipif(shutil.which("promtool") is None, reason="needs promtool: apt install prometheus")
@pytest.mark.parametrize("rules", ["alerts", "validator-alerts"])
def test_alerts_fire_for_the_first_event(rules):
    done = subprocess.run(
        ["promtool", "test", "rules", f"{rules}.test.yml"], cwd=DEPLOY, capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr.decode()


@pytest.mark.parametrize("rules", ["alerts", "validator-alerts"])
def test_every_alert_has_a_moment_at_which_it_fires_and_one_at_which_it_does_not(rules):
    (group,) = yaml.safe_load((DEPLOY / f"{rules}.yml").read_text())["groups"]
    tests = yaml.safe_load((DEPLOY / f"{rules}.test.yml").read_text())["tests"]
    asked = [(one["alertname"], bool(one["exp_alerts"])) for test in tests for one in test["alert_rule_test"]]
    names = [rule["alert"] for rule in group["rules"]]
    assert set(asked) == set(product(names, (True, False)))
