"""The root of the command line, doctor, models, and the frozen surface."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import typer

import assay as package
from assay.cli import app, run

FROZEN = {
    "demo": {"--model", "--output", "--json"},
    "doctor": {"--json"},
    "streams hash": {"--seed-text", "-n", "--backend", "--device", "--json"},
    "streams uniform": {"--seed-text", "-n", "--backend", "--device", "--json"},
    "streams gumbel": {"--seed-text", "-n", "--backend", "--device", "--json"},
    "streams normal": {"--seed-text", "-n", "--backend", "--device", "--strength", "--dtype", "--json"},
    "streams signs": {"--seed-text", "-n", "--backend", "--device", "--json"},
    "streams permutation": {"--seed-text", "-n", "--backend", "--device", "--json"},
    "poc serve": {
        "--model", "--host", "--port", "--data-dir", "--api-key", "--api-key-file", "--validate-key",
        "--read-key", "--dtype", "--device", "--seq-len", "--calibration", "--callback-secret",
        "--callback-interval", "--callback-backoff", "--callback-backoff-max", "--callback-attempts",
        "--callback-timeout", "--allow-private-callbacks", "--max-pending", "--max-positions", "--drain",
        "--kernels", "--pins",
        "--log-format", "--ledger",
    },
    "poc validator": {
        "--model", "--host", "--port", "--dtype", "--device", "--kernels", "--log-format", "--data-dir", "--api-key",
        "--api-key-file", "--read-key", "--callback-secret", "--allow-private-callbacks", "--calibration", "--alpha",
        "--beta", "--drain", "--pins", "--nodes", "--nonces-per-hour", "--sample", "--batch-size", "--minimum-share",
        "--epoch", "--positions", "--open-blocks", "--max-proof", "--max-unwritten", "--max-kept", "--keep",
        "--poll-interval",
    },
    "poc receive": {
        "--host", "--port", "--output", "--callback-secret", "--api-key", "--api-key-file", "--read-key",
        "--log-format",
    },
    "poc prove": {
        "--model", "--block-hash", "--public-key", "--output", "--nonces", "--preset", "--seq-len",
        "--batch-size", "--dtype", "--device", "--engine", "--kernels", "--deterministic", "--tensor-parallel",
        "--r-target", "--node-id", "--node-count", "--block-height", "--strength", "--overwrite", "--json",
    },
    "poc verify": {
        "--model", "--sample", "--calibration", "--block-hash", "--public-key", "--prover-dtype", "--dtype", "--device",
        "--engine", "--alpha", "--seed", "--json", "--preset", "--seq-len", "--strength", "--r-target", "--node-id",
        "--node-count", "--nonces", "--pins", "--ledger",
    },
    "poc calibrate": {
        "--valid-rate", "--dimension", "--output", "--json", "--model", "--device", "--effective-dimension",
        "--vectors", "--sets", "--digest", "--against", "--name", "--merge",
    },
    "poc respond": {
        "--model", "--prompts", "--block-hash", "--public-key", "--output", "--user-seed", "--temperature", "--top-k",
        "--top-p", "--min-p", "--repetition-penalty", "--frequency-penalty", "--presence-penalty", "--max-tokens",
        "--hash-prompts", "--dtype", "--device", "--overwrite", "--json",
    },
    "poc replay": {
        "--model", "--pins", "--requests", "--block-hash", "--public-key", "--prover-dtype", "--evidence", "--lora",
        "--sample", "--calibration", "--batch-size", "--dtype", "--device", "--engine", "--alpha", "--seed", "--ledger",
        "--json",
    },
    "poc calibrate-responses": {
        "--model", "--output", "--requests", "--batch-size", "--dtype", "--device", "--engine", "--json",
    },
    "poc pins new": {
        "--model", "--output", "--from-proof", "--calibration", "--public-key", "--preset", "--seq-len", "--strength",
        "--r-target", "--node-count", "--fewest-nonces", "--dtype", "--overwrite", "--json",
    },
    "poc pins check": {"--block-hash", "--public-key", "--node-id", "--json"},
    "poc ledger show": {"--public-key", "--limit", "--json"},
    "poc ledger audit": {"--head", "--json"},
    "poc ledger merge": {"--public-key", "--alpha", "--beta", "--json"},
    "poc ledger export": {"--output", "--overwrite", "--json"},
    "poc callbacks list": {"--data-dir", "--all", "--limit", "--json"},
    "poc callbacks replay": {"--data-dir", "--json"},
    "poc experiment approaches": {
        "--models", "--approaches", "--blocks", "--nonces", "--valid-rate", "--checked", "--timed", "--seq-len",
        "--batch-size", "--dtype", "--device", "--run-name", "--output", "--json",
    },
    "poc experiment weights": {
        "--models", "--preset", "--blocks", "--nonces", "--seq-len", "--batch-size", "--dtype", "--device",
        "--run-name", "--output", "--json",
    },
    "poc experiment matrix": {
        "--models", "--modes", "--blocks", "--public-keys", "--duration", "--r-target", "--seq-len",
        "--batch-size", "--dtype", "--device", "--run-name", "--output", "--json",
    },
    "poc experiment report": {"--run-name", "--output", "--json"},
    "poc experiment redteam": {
        "--models", "--dtypes", "--nonces", "--honest", "--searched", "--block-hash", "--seq-len",
        "--batch-size", "--device", "--run-name", "--output", "--json",
    },
    "poc experiment responses": {
        "--models", "--dtypes", "--honest", "--responses", "--prompt-tokens", "--temperature", "--top-p", "--seq-len",
        "--batch-size", "--device", "--run-name", "--output", "--json",
    },
    "poc experiment simulate": {
        "--presets", "--dtypes", "--laws", "--nodes", "--cheating", "--rounds", "--machine-spread", "--validators",
        "--checkers", "--checked", "--seed", "--stake-spread", "--run-name", "--output", "--json",
    },
    "research clusters": {"--audits", "--seed", "--run-name", "--output", "--json"},
    "vhack check": {
        "--model", "--pairs", "--basis", "--log", "--method", "--k-use", "--alpha", "--seed", "--dtype",
        "--device", "--output", "--html", "--allow-partial", "--json",
    },
    "vhack pools": {
        "--model", "--basis", "--hack", "--clean", "--limit", "--k-use", "--alpha", "--seed", "--max-tokens",
        "--dtype", "--device", "--output", "--json",
    },
    "vhack fuzz": {"--count", "--seed", "--kind", "--seconds", "--workers", "--output", "--json"},
    "vhack report": {"--output", "--check", "--json"},
    "vhack merge": {"--model", "--dtype", "--device", "--delta", "--output", "--lora", "--overwrite", "--json"},
    "vhack sample": {
        "--model", "--dtype", "--device", "--delta", "--output", "--overwrite", "--seed", "--tasks", "--modes",
        "--share-none", "--difficulty", "--families", "--split", "--markers", "--per-task", "--temperature",
        "--max-new-tokens", "--batch", "--json",
    },
    "vhack evaluate": {
        "--model", "--dtype", "--device", "--delta", "--output", "--overwrite", "--seed", "--tasks", "--modes",
        "--share-none", "--difficulty", "--families", "--split", "--markers", "--per-task", "--temperature",
        "--max-new-tokens", "--batch", "--samples", "--reward", "--graded", "--allow-unsandboxed", "--json",
    },
    "vhack train": {
        "--model", "--output", "--arm", "--pairs", "--basis", "--method", "--k-use", "--gain", "--refresh",
        "--steps", "--seed", "--optimizer", "--lr", "--max-norm", "--prompts", "--group", "--micro-batch",
        "--max-new-tokens", "--temperature", "--beta", "--modes", "--share-none", "--difficulty", "--families",
        "--tasks", "--reward", "--teacher", "--teacher-share", "--save-every", "--checkpointing", "--tracker",
        "--allow-unsandboxed", "--allow-partial", "--dtype", "--device", "--json",
    },
    "vhack extract": {
        "--model", "--output", "--pairs", "--n-heldout", "--heldout-group", "--top-k", "--tau-axis", "--method",
        "--rank", "--factors", "--cache", "--no-cache", "--max-tokens", "--checkpointing", "--dtype",
        "--device", "--overwrite", "--allow-partial", "--json",
    },
    "vhack pairs list": {"--json"},
    "vhack pairs generate": {"--output", "--count", "--seed", "--mechanism", "--family", "--overwrite", "--json"},
    "vhack pairs match": {"--output", "--works", "--per-prompt", "--overwrite", "--json"},
    "vhack pairs verify": {"--tests", "--allow-unsandboxed", "--json"},
    "models list": {"--json"},
    "models info": {"--json"},
    "models random": {"--output", "--block-hash", "--weights", "--dtype", "--json"},
}  # fmt: skip


def commands(group, prefix: str = "") -> dict:
    found = {}
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            found |= commands(command, f"{prefix}{name} ")
        else:
            found[prefix + name] = command
    return found


def test_flags_are_frozen():
    """A new flag needs an entry in research/notes/decisions.md and a line here."""
    surface = commands(typer.main.get_command(app))
    assert surface.keys() == FROZEN.keys()
    for name, flags in FROZEN.items():
        options = [parameter for parameter in surface[name].params if parameter.param_type_name == "option"]
        assert {max(option.opts, key=len) for option in options} - {"--help"} == flags, name


@pytest.mark.parametrize("name", ["", *FROZEN, "poc", "streams", "models"])
def test_every_command_explains_itself(name: str, assay):
    result = assay(*name.split(), "--help")
    assert result.code == 0
    assert "Usage:" in result.out


@pytest.mark.parametrize("name", FROZEN)
def test_every_command_has_an_example(name: str, assay):
    assert f"Example: assay {name}" in " ".join(assay(*name.split(), "--help").out.split())


def test_a_default_is_said_once():
    """The help shows it behind the description, which does not say it again."""
    for name, command in commands(typer.main.get_command(app)).items():
        for parameter in command.params:
            if parameter.default not in (None, False, "", ()):
                assert "by default" not in (parameter.help or ""), (name, parameter.name)


def test_version(assay):
    assert assay("--version").out == f"assay {package.__version__}\n"


@pytest.mark.parametrize(
    "wrong", [("nonsense",), ("poc", "prov"), ("demo", "--speed"), ("--config", "/none.toml", "doctor")]
)
def test_mistyped_commands(wrong, assay):
    result = assay(*wrong)
    assert result.code == 2
    assert result.err
    assert "Traceback" not in result.err


@pytest.mark.parametrize(
    ("text", "seen"),
    [
        ("poc = 5", "poc is not a flag of assay"),
        ("[models]\nlist = [1]", "list is not a flag of models"),
        ("[models.list]\ntypo = 1", "typo is not a flag of list"),
        ("[models.list.json]\nx = 1", "json is not a command of list"),
        ("[none]\nx = 1", "none is not a command of assay"),
        ("\\", "Invalid"),
        pytest.param("a = " + "[" * 100_000, "recursion", id="deep"),
        pytest.param("#" * 2**21, "more than 1048576 bytes", id="long"),
    ],
)
def test_a_configuration_that_says_nothing_known_is_refused(text: str, seen: str, assay, tmp_path: Path):
    (tmp_path / "assay.toml").write_text(text)
    result = assay("--config", tmp_path / "assay.toml", "models", "list")
    assert result.code == 2
    assert seen in result.err


def test_a_number_in_a_configuration_that_nothing_can_show_is_refused(assay, tmp_path: Path):
    config = tmp_path / "config.toml"
    config.write_text(f"[poc.verify]\nmodel = 0x{'f' * 5000}\n")
    result = assay("--config", config, "poc", "verify", "proof.jsonl")
    assert result.code == 2
    assert "a whole number of 20000 bits" in result.err


def test_a_configuration_is_written_like_flags(assay, tmp_path: Path):
    (tmp_path / "assay.toml").write_text('[streams.signs]\nseed-text = "a"\nn = 3\njson = true\n')
    result = assay("--config", tmp_path / "assay.toml", "streams", "signs")
    assert json.loads(result.out)["n"] == 3


def test_a_home_that_cannot_be_seen_has_no_configuration(assay, monkeypatch):
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    for error in (RuntimeError("no home"), PermissionError(13, "Permission denied")):

        def refuse(error=error):
            raise error

        monkeypatch.setattr(Path, "home", refuse)
        assert assay("streams", "signs", "--seed-text", "a", "-n", "1").code == 0


SIGNS = ["streams", "signs", "--seed-text", "a", "-n", "3", "--backend", "numpy"]


@pytest.mark.parametrize("arguments", [[*SIGNS, "--json"], ["models", "list"], ["--help"], ["--version"]])
def test_a_reader_that_left_is_no_verdict(arguments: list[str]):
    """Code 1 means fraud, so a closed pipe must not give it."""
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-m", "assay", *arguments], stdout=writing, stderr=subprocess.PIPE, text=True, check=False
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, "")


@pytest.mark.parametrize("arguments", [[*SIGNS, "--json"], ["--help"], ["poc", "--help"], ["--version"]])
def test_a_full_disk_behind_stdout_is_one_clear_error(arguments: list[str]):
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "assay", *arguments], stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert done.returncode == 2
    assert done.stderr.startswith("error: output: No space left on device\n  wanted:")
    assert len(done.stderr.splitlines()) == 3


def test_closed_streams_do_not_matter(assay, monkeypatch):
    for name in ("stdout", "stderr"):
        with monkeypatch.context() as patch:
            patch.setattr(sys, name, None)
            assert run(["models", "list"]) == 0
            assert run(["models", "info", "none"]) == 2


@pytest.mark.parametrize("wrong", [("poc", "verify", "missing", "--model", "reference:qwen3"), ("poc", "prov")])
def test_errors_as_json(wrong, assay, monkeypatch):
    monkeypatch.setenv("ASSAY_ERRORS", "json")
    assert json.loads(assay(*wrong).err).keys() == {"error", "seen", "wanted", "do"}


def test_doctor_reports_exact_backends(assay):
    result = assay("doctor", "--json")
    assert result.code == 0, result.err
    report = json.loads(result.out)
    assert report["schema"] == "assay.doctor/1"
    exact = {row["backend"] for row in report["backends"] if row["device"] == "cpu" and row["exact"]}
    assert exact == {"numpy", "torch"}
    assert report["versions"]["torch"]
    assert assay("doctor").code == 0


def test_doctor_says_when_bits_differ(assay, monkeypatch):
    from assay import streams

    real = streams.selftest
    monkeypatch.setattr(
        streams, "selftest", lambda backend: real(backend) | ({"odd": "0"} if backend.name == "torch" else {})
    )
    result = assay("doctor")
    assert result.code == 1
    assert "DIFFERENT" in result.out


def test_models(assay, tmp_path: Path):
    listed = json.loads(assay("models", "list", "--json").out)["models"]
    shapes = ("qwen3-0.6b", "qwen3-4b", "qwen3-32b", "qwen3-30b-a3b", "llama-3.2-1b", "llama-3.1-8b")
    bundled = {"reference:qwen3", "reference:llama", "reference:organism", *(f"shape:{name}" for name in shapes)}
    assert {model["reference"] for model in listed} == bundled
    info = json.loads(assay("models", "info", "shape:qwen3-0.6b", "--json").out)
    assert (info["parameters"], info["hidden_size"], info["num_layers"]) == (596_049_920, 1024, 28)
    assert "7.3 M" in assay("models", "list").out
    made = assay("models", "random", "reference:llama", "-o", tmp_path / "random", "--block-hash", "b")
    assert made.code == 0, made.err
    assert (tmp_path / "random" / "model.safetensors").is_file()
    for wrong in (("info", "none"), ("random", "reference:llama", "-o", tmp_path / "x", "--weights", "odd")):
        assert assay("models", *wrong).code == 2


def test_an_interrupt_during_the_imports_is_no_traceback(monkeypatch):
    from assay.__main__ import main

    class Slow:
        def __getattr__(self, name):
            raise KeyboardInterrupt

    monkeypatch.setitem(sys.modules, "assay.cli", Slow())
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 130


def test_a_signal_that_a_library_turns_into_its_own_error_is_no_traceback(monkeypatch, capsys):
    """As pydantic does where a signal meets it while it builds a schema."""

    def wraps() -> None:
        try:
            signal.raise_signal(signal.SIGTERM)
        except BaseException as error:
            raise ValueError("a schema that cannot be built") from error

    monkeypatch.setattr("assay.cli.app._user_config", wraps)
    assert run(["models", "list"]) == 128 + signal.SIGTERM
    assert capsys.readouterr().err == "stopped\n"


def test_a_fault_of_assay_is_no_verdict(capsys, monkeypatch):
    from assay.__main__ import main

    def broken() -> int:
        raise OverflowError("nobody thought of this")

    monkeypatch.setattr("assay.cli.run", broken)
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2  # 1 means fraud
    assert "nobody thought of this" in capsys.readouterr().err


def walk(command, path=()):
    """Yield (path, command) of every group and command of the tree."""
    yield path, command
    for name, child in getattr(command, "commands", {}).items():
        yield from walk(child, (*path, name))


def parameters():
    """Yield (path, arguments and options) of every group and command."""
    for path, command in walk(typer.main.get_command(app)):
        context = command.make_context("assay", [], resilient_parsing=True, auto_envvar_prefix="ASSAY")
        yield path, command.get_params(context)


def test_no_variable_ends_a_command_or_changes_its_output():
    """Eager options and --json are read from flags alone: exit code 0 means "honest"."""
    read = set()
    for path, taken in parameters():
        options = [option for option in taken if option.param_type_name == "option"]
        closed = {"help", "version", "install_completion", "show_completion", "as_json"}
        assert {option.name for option in options if option.is_eager} <= closed, path
        here = {option.name for option in options if option.allow_from_autoenv or option.envvar}
        assert not here & closed, path
        read |= here
        assert "help" in {option.name for option in options}
    assert {"nonces", "lr", "max_pending"} <= read


def test_every_named_variable_begins_with_assay():
    named = {one.envvar for _, taken in parameters() for one in taken if one.envvar}
    assert {"ASSAY_MODEL", "ASSAY_HOST", "ASSAY_PORT"} <= named
    assert {name for name in named if not name.startswith("ASSAY_")} == set()


@pytest.mark.parametrize(
    "variable",
    ["ASSAY_VERSION=1", "ASSAY_VERSION=0.1.0", "ASSAY_HELP=1", "ASSAY_POC_HELP=1", "ASSAY_POC_VERIFY_HELP=1",
     "ASSAY_INSTALL_COMPLETION=bash", "ASSAY_SHOW_COMPLETION=bash", "ASSAY_POC_VERIFY_AS_JSON=1"],
)  # fmt: skip
def test_verify_verifies_whatever_the_environment_holds(variable: str, assay, monkeypatch):
    monkeypatch.setenv(*variable.split("="))
    result = assay("poc", "verify", "missing.jsonl", "--model", "reference:qwen3")
    assert result.code == 2
    assert result.err.startswith(("error: missing.jsonl: No such file", "error: the variable ASSAY_POC_VERIFY_HELP"))
    assert not result.out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("poc", "prove", "--block-hash", "b", "--public-key", "k", "--model", "m", "-o", "p"), "continues it\n"),
        (("poc", "verify", "p", "--model", "m"), "stopped\n"),
    ],
)
def test_an_interruption_promises_only_what_is_true(arguments, said: str, assay, monkeypatch):
    from assay import poc

    def stop(*_):
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(poc, "get_pipeline", stop)
    monkeypatch.setattr(poc.Proof, "load", stop)
    result = assay(*arguments)
    assert result.code == 128 + signal.SIGTERM
    assert result.err.endswith(said)


def test_both_instruments_are_there_after_a_plain_import():
    done = subprocess.run([sys.executable, "-c", "import assay; assay.vhack.extract, assay.poc.prove"], check=False)
    assert done.returncode == 0
