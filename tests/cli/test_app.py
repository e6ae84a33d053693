"""The root of the command line: the surface, help, streams and signals, doctor and models."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import click
import pytest

import assay as package
from assay.cli import app, run
from assay.framework.groups import leaves
from assay.vhack.environment.backends import available_backend

FROZEN = (
    *(
        "demo",
        "doctor",
        "config",
        "models list",
        "models info",
        "models random",
        "models path",
        "streams",
    ),
    *(
        "poc prove",
        "poc verify",
        "poc calibrate",
        "poc respond",
        "poc replay",
        "poc calibrate-responses",
    ),
    "poc collect",
    *(
        "poc frame",
        "poc selftest",
        "poc serve",
        "poc receive",
        "poc validator",
        "poc callbacks list",
        "poc callbacks replay",
    ),
    *("poc pins new", "poc pins check", "poc ledger show", "poc ledger audit", "poc ledger export"),
    *(
        "vhack extract",
        "vhack check",
        "vhack pools",
        "vhack report",
        "vhack train",
        "vhack merge",
        "vhack sample",
    ),
    *(
        "vhack evaluate",
        "vhack pairs list",
        "vhack pairs generate",
        "vhack pairs match",
        "vhack pairs verify",
    ),
)
COMMANDS = {" ".join(path): command for path, command in leaves(app)}


def options(name):
    """Return the options of a command that its help shows, without those of every command."""
    command = COMMANDS[name]
    found = [
        one for one in command.get_params(click.Context(command)) if isinstance(one, click.Option)
    ]
    return [
        one
        for one in found
        if not (one.hidden or one.is_eager or one.name in ("config", "assignments", "as_json"))
    ]


def test_names_of_commands_are_frozen():
    assert set(COMMANDS) == set(FROZEN)


@pytest.mark.parametrize("name", FROZEN)
def test_a_command_has_few_options_a_short_line_and_an_example(name):
    command = COMMANDS[name]
    assert len(options(name)) <= 10
    assert len(command.get_short_help_str(200)) <= 50
    assert f"Example: assay {name}" in command.epilog
    for option in options(name):
        assert option.is_flag or option.metavar not in (None, "INTEGER", "FLOAT")


@pytest.mark.parametrize(
    "name", ["", "poc", "streams", "models", "poc prove", "vhack pairs", "poc ledger audit"]
)
def test_a_command_explains_itself(name, assay):
    result = assay(*name.split(), "--help")
    assert result.code == 0
    assert "Usage:" in result.out


def test_help_has_panels(assay):
    said = assay("poc", "--help").out
    places = [said.index(f"{panel}:") for panel in ("Node", "Validator", "Noise")]
    assert places == sorted(places)


def test_version(assay):
    assert assay("--version").out == f"assay {package.__version__}\n"


@pytest.mark.parametrize("words", ["assay nothing ", "assay poc nothing ", "assay poc prov"])
def test_completion_behind_an_unknown_word_is_silent(words, capsys, monkeypatch):
    monkeypatch.setenv("_ASSAY_COMPLETE", "bash_complete")
    monkeypatch.setenv("COMP_WORDS", words)
    monkeypatch.setenv("COMP_CWORD", "2")
    run([])
    said = capsys.readouterr()
    assert said.err == ""
    assert "prove" in said.out or "nothing" in words


MAIN = "from assay.__main__ import main; main()"
SIGNS = ["streams", "signs", "--seed-text", "a", "-n", "3", "--backend", "numpy"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments", [[*SIGNS, "--json"], ["models", "list"], ["--help"], ["--version"]]
)
def test_a_reader_that_left_is_no_verdict(arguments):
    """Code 1 means fraud, so a closed pipe must not give it."""
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-m", "assay", *arguments],
        stdout=writing,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, "")


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments", [[*SIGNS, "--json"], ["--help"], ["poc", "--help"], ["--version"]]
)
def test_a_full_disk_behind_stdout_is_one_clear_error(arguments):
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "assay", *arguments],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert done.returncode == 2
    assert done.stderr.startswith("error: output: No space left on device\n  wanted:")
    assert len(done.stderr.splitlines()) == 3


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["-m", "assay", *SIGNS], 0),
        (["-m", "assay", "models", "info", "none"], 2),
        (["-c", f"import sys; sys.modules['assay.cli.app'] = None; {MAIN}"], 2),
    ],
)
def test_a_full_disk_behind_stderr_changes_no_code(words, code):
    """Neither a warning, nor an error, nor a traceback that cannot be written."""
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, *words],
            stdout=subprocess.DEVNULL,
            stderr=full,
            env=os.environ | {"ASSAY_VERIFY": "1"},
            check=False,
        )
    assert done.returncode == code


def test_closed_streams_do_not_matter(assay, monkeypatch):
    for name in ("stdout", "stderr"):
        with monkeypatch.context() as patch:
            patch.setattr(sys, name, None)
            assert run(["models", "list"]) == 0
            assert run(["models", "info", "none"]) == 2


@pytest.mark.parametrize(
    "wrong", [("poc", "verify", "missing", "--model", "reference:qwen3"), ("poc", "prov")]
)
def test_errors_as_json(wrong, assay, monkeypatch):
    monkeypatch.setenv("ASSAY_ERRORS", "json")
    assert json.loads(assay(*wrong).err).keys() == {"error", "seen", "wanted", "do"}


def test_doctor_reports_exact_backends(assay, told):
    report = told("doctor")
    assert report["schema"] == "assay.doctor/1"
    exact = {
        row["backend"] for row in report["backends"] if row["device"] == "cpu" and row["exact"]
    }
    assert exact == {"numpy", "torch"}
    sandboxes = {row["backend"]: row for row in report["sandboxes"]}
    assert sandboxes.keys() == {"bwrap", "landlock"}
    assert sum(row["in_use"] for row in sandboxes.values()) == (available_backend() is not None)
    assert not any(row["in_use"] and row["why_not"] for row in sandboxes.values())
    assert report["versions"]["torch"]
    result = assay("doctor")
    assert result.code == 0
    *tables, last = result.out.splitlines()
    assert last.startswith("all good")
    if report["gpu"] is None:
        assert sum("triton" in line for line in tables) <= 1, "it is missing, once"


def test_doctor_says_when_bits_differ(assay, monkeypatch):
    from assay import streams

    real = streams.selftest
    monkeypatch.setattr(
        streams,
        "selftest",
        lambda backend: real(backend) | ({"odd": "0"} if backend.name == "torch" else {}),
    )
    result = assay("doctor")
    assert result.code == 1
    assert "DIFFERENT" in result.out
    assert result.out.splitlines()[-1].startswith("not good")


def test_models(assay, told, tmp_path):
    listed = told("models", "list")["models"]
    shapes = (
        "qwen3-0.6b",
        "qwen3-4b",
        "qwen3-32b",
        "qwen3-30b-a3b",
        "llama-3.2-1b",
        "llama-3.1-8b",
    )
    named = ("reference:qwen3", "reference:llama", "reference:organism")
    real = ("pretrained:smollm2", "pretrained:gemma3-270m")
    bundled = {*named, *real, *(f"shape:{name}" for name in shapes)}
    assert {model["reference"] for model in listed} == bundled
    info = told("models", "info", "shape:qwen3-0.6b")
    assert (info["parameters"], info["hidden_size"], info["num_layers"]) == (596_049_920, 1024, 28)
    assert "7.3 M" in assay("models", "list").out
    told("models", "random", "reference:llama", "-o", tmp_path / "random", "--block-hash", "b")
    assert (tmp_path / "random" / "model.safetensors").is_file()


def test_an_interrupt_during_the_imports_is_no_traceback(monkeypatch):
    from assay.__main__ import main

    class Slow:
        def __getattr__(self, name):
            raise KeyboardInterrupt

    monkeypatch.setitem(sys.modules, "assay.cli.app", Slow())
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 130


def test_a_signal_that_a_library_turns_into_its_own_error_is_no_traceback(monkeypatch, capsys):
    """As pydantic does where a signal meets it while it builds a schema."""

    def wraps():
        try:
            signal.raise_signal(signal.SIGTERM)
        except BaseException as error:
            raise ValueError("a schema that cannot be built") from error

    monkeypatch.setattr(sys.modules["assay.framework.commands"], "own_table", lambda *_: wraps())
    assert run(["models", "list"]) == 128 + signal.SIGTERM
    assert capsys.readouterr().err == "stopped\n"


@pytest.mark.parametrize("kind", [OverflowError, BaseException, SystemExit])
def test_a_fault_of_assay_is_no_verdict(kind, capsys, monkeypatch):
    """A panic of a library in Rust is a BaseException."""
    from assay.__main__ import main

    def broken():
        raise kind("nobody thought of this")

    monkeypatch.setattr(sys.modules["assay.cli.app"], "run", broken)
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2  # 1 means fraud
    assert "nobody thought of this" in capsys.readouterr().err


@pytest.mark.parametrize(
    "variable",
    ["ASSAY_VERSION=1", "ASSAY_HELP=1", "ASSAY_POC_VERIFY_HELP=1", "ASSAY_POC_VERIFY_AS_JSON=1"],
)
def test_verify_verifies_whatever_the_environment_holds(variable, refused, monkeypatch):
    """Exit code 0 means "honest"."""
    monkeypatch.setenv(*variable.split("="))
    said = refused("poc", "verify", "missing.jsonl", "--model", "reference:qwen3")
    assert "error: missing.jsonl: No such file" in said.splitlines()[-3]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ("poc", "prove", "--block-hash", "b", "--public-key", "k", "--model", "m", "-o", "p"),
            "continues it\n",
        ),
        (("poc", "verify", "p", "--model", "m"), "stopped\n"),
    ],
)
def test_an_interruption_promises_only_what_is_true(arguments, said, assay, monkeypatch):
    from assay.poc import Proof

    def stop(*_, **__):
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr("assay.framework.commands.check_new_file", stop)
    monkeypatch.setattr(Proof, "load", stop)
    result = assay(*arguments)
    assert result.code == 128 + signal.SIGTERM
    assert result.err.endswith(said)


@pytest.mark.slow
@pytest.mark.slow
def test_both_instruments_are_there_after_a_plain_import():
    done = subprocess.run(
        [sys.executable, "-c", "import assay; assay.vhack.extract, assay.poc.prove"], check=False
    )
    assert done.returncode == 0


def test_numbers_of_the_services_have_units(assay):
    said = assay("config", "poc", "validator").out
    for name, unit in {
        "epoch": "SECONDS",
        "drain": "SECONDS",
        "max_kept": "BYTES",
        "max_body": "BYTES",
    }.items():
        assert f"[{unit}]\n# {name} = " in said
