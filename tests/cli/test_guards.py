"""What a command refuses before it begins: misspelt variables, and results that would replace their sources."""

import re
from pathlib import Path

import pytest

from tests.docs.shell import ROOT

PROVE = ("poc", "prove", "--model", "./nope", "--block-hash", "b", "--public-key", "k", "-o", "p.jsonl")


@pytest.mark.parametrize(
    ("variable", "command", "meant"),
    [
        ("ASSAY_MODLE", PROVE, "ASSAY_MODEL"),
        ("ASSAY_DEVISE", PROVE, "ASSAY_DEVICE"),
        ("ASSAY_POC_PROVE_BATCHSIZE", PROVE, "ASSAY_POC_PROVE_BATCH_SIZE"),
        ("ASSAY_API_KEYS", ("poc", "serve", "--model", "./nope"), "ASSAY_API_KEY"),
        ("ASSAY_MAX_BODYS", ("poc", "serve", "--model", "./nope"), "ASSAY_MAX_BODY"),
        ("ASSAY_CALLBACK_SECERT", ("poc", "receive"), "ASSAY_CALLBACK_SECRET"),
        ("ASSAY_DOCTOR_ALL", ("doctor",), ""),
    ],
)
def test_a_misspelt_variable_is_refused(variable: str, command: tuple[str, ...], meant: str, assay, monkeypatch):
    monkeypatch.setenv(variable, "secret")
    found = assay(*command)
    assert found.code == 2
    assert f"error: the variable {variable}\n" in found.err
    assert f"did you mean {meant}?" in found.err if meant else "to do:  unset it" in found.err
    assert "secret" not in found.err


@pytest.mark.parametrize(
    "variable",
    [
        "ASSAY_SERVICE_HOST", "ASSAY_PORT_8000_TCP", "ASSAY_PORT_8000_TCP_ADDR",  # of Kubernetes, for a service "assay"
        "ASSAY_POC_SERVE_MAX_BODY", "ASSAY_POC_PROVE_NONCES", "ASSAY_VLLM_ARGS", "ASSAY_RESPONSES",
    ],
)  # fmt: skip
def test_other_variables_are_left_alone(variable: str, assay, monkeypatch, tmp_path: Path):
    monkeypatch.setenv(variable, "100000")
    assert "'./nope' is no directory" in assay("poc", "serve", "--model", "./nope", "--data-dir", tmp_path / "d").err
    assert not (tmp_path / "d").exists()


def test_the_variables_of_a_longer_command_are_its_own(assay, monkeypatch):
    monkeypatch.setenv("ASSAY_POC_CALIBRATE_RESPONSES_OUTPUT", "x")
    assert assay("poc", "calibrate", "--valid-rate", 0.1).code == 0


def test_no_documented_variable_is_refused_by_any_other_command(assay, monkeypatch):
    """They may all be set in one environment, except that they must hold values."""
    named = set(re.findall(r"`(ASSAY_[A-Z0-9_]+)`", (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")))
    assert len(named) > 200
    for name in named - {"ASSAY_CONFIG", "ASSAY_ERRORS"}:
        monkeypatch.setenv(name, "")
    for command in (PROVE, ("poc", "verify", "p.jsonl", "--model", "m"), ("vhack", "report", "x"), ("doctor",)):
        assert "the variable" not in assay(*command).err


def test_a_result_does_not_replace_its_source(assay, tmp_path: Path):
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).write_text(name)
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "a.jsonl")
    a, b, link = (tmp_path / name for name in ("a.jsonl", "b.jsonl", "link.jsonl"))
    check = ("vhack", "check", "--model", "reference:qwen3")
    for command, flags in (
        (("poc", "calibrate", a, b, "-o", link), ("--output", "PROOFS")),
        (("poc", "calibrate-responses", a, b, "--model", "m", "-o", b), ("--output", "RECEIPTS")),
        ((*check, "--pairs", a, "-o", a), ("--output", "--pairs")),
        ((*check, "--pairs", a, "--html", a), ("--html", "--pairs")),
        ((*check, "-o", tmp_path / "new", "--html", tmp_path / "new"), ("--output", "--html")),
        (("vhack", "evaluate", "--samples", a, "--graded", a, "--overwrite"), ("--graded", "--samples")),
    ):
        found = assay(*command)
        assert found.code == 2
        assert f"error: {flags[0]} " in found.err
        assert f", which is {flags[1]} too" in found.err
    assert a.read_text() == "a.jsonl"
    assert b.read_text() == "b.jsonl"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "b.jsonl", "link.jsonl"]


def test_builds_are_added_to_a_calibration_file(assay, tmp_path: Path):
    """The one source that a result may replace."""
    files = (tmp_path / "a.json", tmp_path / "b.json")
    found = assay("poc", "calibrate", "--merge", files[0], "--merge", files[1], "-o", files[0])
    assert "error: " + str(files[0]) + ": No such file" in found.err
