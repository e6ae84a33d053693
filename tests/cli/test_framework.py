"""One class is the source of options, variables, keys of the configuration file, defaults and
help.
"""

import errno
import json
import os
import re
import subprocess
import sys
import tomllib
import tracemalloc
from pathlib import Path
from typing import Annotated, Literal

import click
import pytest
from pydantic import Field

from assay.cli import app
from assay.devices import Device
from assay.errors import UsageError
from assay.framework.commands import Command
from assay.framework.groups import leaves
from assay.framework.interruption import resumable
from assay.framework.results import is_result
from assay.framework.variables import NAMES
from assay.poc.vllm.preflight import PluginSettings
from assay.poc.vllm.throttle import OperatorsThrottle
from assay.settings import Flag, Names, Settings, Spelling
from tests.wordings import refuses

ROOT = Path(__file__).parents[2]


SHOWN = "model share engine blocks keys span folder device bits depth"


class Sample(Settings):
    """Every kind of field."""

    model: Annotated[str, Flag(variable="ASSAY_MODEL")] = Field(description="Which model.")
    share: float = Field(0.5, gt=0, lt=1, description="Which share.")
    engine: Literal["hf", "vllm"] = Field("hf", description="Which engine.")
    blocks: Names = Field(("a", "b"), description="Which blocks.")
    keys: Annotated[tuple[str, ...], Flag(("--key",))] = Field((), description="Which keys.")
    span: Annotated[
        tuple[int, int],
        Spelling(lambda text: tuple(map(int, text.split(":"))), "{0[0]}:{0[1]}".format),
    ] = Field((1, 2), description="From where to where.")
    folder: Path | None = Field(None, description="Where to.")
    bits: Literal[32, 256] = Field(32, description="How many bits.")
    strict: bool = Field(False, description="Whether to be strict.")
    secret: Annotated[str, Flag(secret=True)] = Field("", description="What nobody sees.")
    device: Device = None


class Inner(Settings):
    """Further settings of the same command."""

    depth: int = Field(3, ge=1, description="How deep.")


@pytest.fixture
def sample(assay, monkeypatch, tmp_path):
    """Run a command whose settings are those above; give what it got."""

    def show(one, two):
        """Show."""
        click.echo(json.dumps(one.model_dump(mode="json") | two.model_dump()))

    monkeypatch.setitem(app.commands, "show", Command("show", show, (Sample, Inner), shown=SHOWN))

    def call(*arguments, config="", **variables):
        for key, value in variables.items():
            monkeypatch.setenv(key, value)
        (tmp_path / "show.toml").write_text(f"[show]\n{config}")
        return assay("show", "--config", tmp_path / "show.toml", *arguments)

    return call


def test_every_kind_of_field_is_read(sample):
    assert json.loads(sample("--model", "m").out) == Sample(model="m").model_dump(mode="json") | {
        "depth": 3
    }
    found = sample(
        "--model", "m", "--share", "0.25", "--engine", "vllm", "--blocks", "x, y", "--key", "k1", "--key", "k2",
        "--span", "3:4", "--folder", "/f", "--device", "cpu", "--depth", "7", "--bits", "256", config="strict = true",
    )  # fmt: skip
    wanted = Sample(
        model="m", share=0.25, engine="vllm", blocks=("x", "y"), keys=("k1", "k2"), span=(3, 4), folder=Path("/f"),
        strict=True, device="cpu", bits=256,
    )  # fmt: skip
    assert json.loads(found.out) == wanted.model_dump(mode="json") | {"depth": 7}
    config = 'model = "m"\nblocks = ["x"]\nkey = ["k"]\nspan = "3:4"\nstrict = true\nbits = 256\ndepth = 2'
    found = json.loads(sample(config=config).out)
    assert [found[name] for name in ("blocks", "keys", "span", "bits", "depth")] == [
        ["x"],
        ["k"],
        [3, 4],
        256,
        2,
    ]


def test_an_option_beats_a_variable_and_that_beats_the_file(sample):
    assert json.loads(sample(config='model = "file"').out)["model"] == "file"
    assert (
        json.loads(sample(config='model = "file"', ASSAY_MODEL="variable").out)["model"]
        == "variable"
    )
    assert json.loads(sample("--model", "option", config='model = "file"').out)["model"] == "option"
    assert json.loads(sample(ASSAY_DEVICE="cpu:0").out)["device"] == "cpu:0"


@pytest.mark.parametrize(
    ("arguments", "seen", "do"),
    [
        (("--share", "1.5"), "--share 1.5", "correct --share"),
        (("--engine", "VLLM"), "--engine VLLM", "did you mean --engine vllm?"),
        (("--depth", "0"), "--depth 0", "correct --depth"),
        (("--span", "x:y"), "--span x:y", "correct --span"),
        (("--bits", "64"), "--bits 64", "correct --bits"),
        (("--shares", "1"), "--shares", "did you mean --share?"),
        (("--xyz", "1"), "--xyz", "see assay show --help"),
        (("--share",), "--share", "see assay show --help"),
        (("surplus",), "surplus", "see assay show --help"),
    ],
)
def test_a_bad_value_names_its_option(arguments, seen, do, sample):
    found = sample("--model", "m", *arguments)
    assert found.code == 2
    errors = found.err[found.err.index("error: ") :].splitlines()
    assert seen in errors[0]
    assert "Input should" not in errors[1]
    assert do in errors[2]


def test_a_setting_that_is_no_option_is_named_as_a_key_of_the_file(sample):
    """On 0944c8c1 it is read, with a warning that it will go."""
    found = sample("--model", "m", "--strict")
    assert found.code == 2
    assert "write --set strict=…, or `strict = …` under [show]" in found.err
    secret = sample("--model", "m", "--secret", "abc")
    assert secret.code == 2
    assert "abc" not in secret.err
    assert "write `secret = …` under [show]" in secret.err
    assert json.loads(sample("--model", "m", config="strict = true").out)["strict"]


def test_any_setting_but_a_secret_is_set_on_the_command_line(sample):
    """On 0944c8c1 a setting that the help leaves out needs a file."""
    words = ("strict=true", "key=a", "keys=b", "keys=c", "span=3:4", "share=0.3", "blocks=x,y")
    line = [word for text in words for word in ("--set", text)]
    values = json.loads(sample("--set", "model=m", *line, "--share", "0.2").out)
    assert values == Sample(
        model="m", strict=True, keys=("b", "c"), span=(3, 4), share=0.2, blocks=("x", "y")
    ).model_dump(mode="json") | {"depth": 3}
    assert json.loads(sample("--set", "depth=4", config='model = "m"\ndepth = 2').out)["depth"] == 4
    for text, seen, do in (
        ("strict", "--set strict", "NAME=VALUE"),
        ("strikt=true", "strikt in --set is not a setting of show", "did you mean strict?"),
        ("strict=maybe", "`strict` maybe", "write --set strict=…"),
        ("secret=abc", "--set secret", "a file for --config"),
    ):
        refusal = sample("--model", "m", "--set", text)
        assert refusal.code == 2
        assert f"error: {seen}" in refusal.err
        assert do in refusal.err
        assert "abc" not in refusal.err


def test_a_flag_that_left_the_help_is_read_as_before(assay):
    """Scripts of 0.3 call `verify --seq-len`; the ten options of the help have no room for it."""
    verify = {" ".join(path): command for path, command in leaves(app)}["poc verify"]
    texts = {name: click.unstyle(assay("poc", name, "--help").out) for name in ("prove", "verify")}
    for name, flag in (("prove", "--seq-len"), ("verify", "--seq-len"), ("verify", "--r-target")):
        assert flag not in texts[name]
        assert f"assay config poc {name}" in texts[name]
    assert verify.key_of("--r-target") is None
    said = assay("poc", "verify", "none.jsonl", "--model", "reference:qwen3", "--r-target", "far")
    assert "--r-target far" in said.err


def test_a_full_disk_in_a_part_that_continues_says_so(assay, monkeypatch):
    """`calibrate --model` keeps what it measured, and did not say so of a full disk."""

    def fill():
        """Fill."""
        with resumable():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "law.json.part")

    monkeypatch.setitem(app.commands, "fill", Command("fill", fill))
    assert "the same command continues it" in assay("fill").err


def test_a_misspelt_variable_draws_a_warning_and_that_of_another_command_none(sample):
    found = sample("--model", "m", ASSAY_MODLE="x").err
    assert "ASSAY_MODLE is set, but no command reads it: did you mean ASSAY_MODEL?" in found
    assert sample("--model", "m", ASSAY_PINS="x").err.count("did you mean") == 1


def test_a_variable_that_no_command_reads_draws_a_warning(sample):
    """`prove` has a --batch-size without a variable, so an operator may take this for one."""
    assert "ASSAY_BATCH_SIZE" in sample("--model", "m", ASSAY_BATCH_SIZE="lots").err


@pytest.mark.parametrize("name", ["ASSAY_SERVICE_HOST", "ASSAY_PORT_8100_TCP", "ASSAY_VLLM_SHARE"])
def test_a_variable_of_kubernetes_or_the_plugin_draws_no_warning(sample, name):
    assert "warning" not in sample("--model", "m", **{name: "1"}).err


def test_the_known_variables_are_those_of_the_page():
    page = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert set(re.findall(r"\bASSAY_([A-Z_0-9]+)", page)) == NAMES


def test_settings_are_strict_in_python_too(monkeypatch):
    monkeypatch.setenv("SHARE", "0.2")
    assert Sample(model="m").share == 0.5, "a value in Python does not depend on the environment"
    with refuses(UsageError, "settings are strict in python too"):
        Sample(model="m", shar=1)
    with refuses(UsageError, "settings are strict in python too, 2"):
        Sample()


@pytest.mark.parametrize(
    ("text", "seen"),
    [
        ("poc = 5", "poc is not a table"),
        ("[models]\ninfo = [1]", "info is not a table"),
        ("[models.info]\ntypo = 1", "typo in the configuration file"),
        ("[none]\nx = 1", "none is not a command"),
        ("\\", "Invalid"),
        pytest.param("a = " + "[" * 100_000, "recursion", id="deep"),
        pytest.param("#" * (2**22 + 1), "longer than 4194304 bytes", id="long"),
    ],
)
def test_a_configuration_that_says_nothing_known_is_refused(
    text, seen, refused, tmp_path, monkeypatch
):
    (tmp_path / "assay.toml").write_text(text)
    command = "models", "info", "reference:qwen3"
    assert seen in refused(*command, "--config", tmp_path / "assay.toml")
    monkeypatch.setenv("ASSAY_CONFIG", str(tmp_path / "assay.toml"))
    assert seen in refused(*command)


@pytest.mark.parametrize("name", ["poc prove", "poc serve", "vhack extract", "models random"])
def test_a_printed_configuration_has_every_setting_and_changes_nothing(name, assay, tmp_path):
    printed = assay("config", *name.split())
    assert printed.code == 0
    assert tomllib.loads(printed.out)
    command = {" ".join(path): command for path, command in leaves(app)}[name]
    lines = re.findall(r"^# (\w+) = (.+)$", printed.out, flags=re.MULTILINE)
    wanted = [one for one, setting in command.settings.items() if not setting.flag.argument]
    assert [one for one, _ in lines] == wanted
    defaults = "\n".join(f"{one} = {value}" for one, value in lines if value != "…")
    assert tomllib.loads(defaults).keys() == {
        one for one in wanted if command.settings[one].default is not None
    }
    assert assay("config", "poc", "nothing").code == 2


MOST_SETTINGS = 250


def test_settings_are_few_and_each_stands_on_the_page(assay):
    """A setting is a name with one meaning; `assay config` prints those that are no arguments."""
    page = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    found = set()
    for words, command in leaves(app):
        printed = assay("config", *words).out if command.settings else ""
        for name, setting in command.settings.items():
            found.add((name, setting.field.description))
            assert f": {setting.field.description}\n" in page, (words, name)
            assert setting.flag.argument or f"\n# {name} = " in printed, (words, name)
    for kind in (PluginSettings, OperatorsThrottle):
        found |= {(name, field.description) for name, field in kind.model_fields.items()}
    assert len(found) <= MOST_SETTINGS, len(found)


WRONG_FLAGS = """
import sys
from assay.cli import app, run
from assay.framework.groups import leaves

for path, command in leaves(app):
    assert run([*path, "--bogus"]) == 2, path
    assert "torch" not in sys.modules, path
for line in ("poc --help", "poc prove --help", "models list", "config poc verify", "poc prove --nonces x"):
    run(line.split())
    assert "torch" not in sys.modules, line
"""


@pytest.mark.slow
def test_no_command_waits_for_torch_where_no_model_is_needed():
    done = subprocess.run(
        [sys.executable, "-c", WRONG_FLAGS], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("error: --bogus\n") == sum(1 for _ in leaves(app))


def test_defaults_are_those_of_the_library():
    from assay.models import list_models
    from assay.poc import Round
    from assay.poc.protocol.pins import FEWEST_NONCES
    from assay.poc.responses import Sampling
    from assay.poc.responses.requests import DEFAULT_MAX_TOKENS
    from assay.vhack import Origin
    from assay.vhack.directions.checks import CheckSettings

    found = {" ".join(path): command.settings for path, command in leaves(app)}
    pairs = (
        ("poc prove", Round, ("block_height",)),
        ("poc respond", Sampling, ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")),
        ("poc respond", Sampling, ("frequency_penalty", "presence_penalty")),
        ("vhack extract", Origin(), ("top_k", "tau_axis", "method")),
        ("vhack train", Origin(), ("method",)),
        ("vhack check", Origin(), ("method",)),
        ("vhack check", CheckSettings(), ("k_use", "alpha", "seed", "method")),
    )
    for command, kind, names in pairs:
        assert {name: found[command][name].default for name in names} == {
            name: getattr(kind, name) for name in names
        }
    assert found["poc respond"]["max_tokens"].default == DEFAULT_MAX_TOKENS
    assert found["poc pins new"]["fewest_nonces"].default == FEWEST_NONCES
    listed = json.loads(
        (Path(sys.modules["assay.models"].__file__).parent / "catalogue.json").read_text()
    )
    facts = [
        {name: value for name, value in row.items() if name not in ("wheel", "digest")}
        for row in listed
    ]
    assert facts == [vars(model) for model in list_models()]


@pytest.mark.parametrize("text", ["output = 5", "commit = 5", 'output = ["a"]'])
def test_a_result_that_is_no_path_is_refused(text, refused, tmp_path):
    (tmp_path / "prove.toml").write_text(f"[poc.prove]\n{text}\n")
    words = ["poc", "prove", "--model", "reference:qwen3", "--block-hash", "b", "--public-key", "k"]
    words += [] if "output" in text else ["-o", tmp_path / "proof.jsonl"]
    assert f"error: --{text.split()[0]}" in refused(*words, "--config", tmp_path / "prove.toml")


def test_a_result_does_not_replace_its_source(assay, refused, tmp_path):
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).write_text(name)
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "a.jsonl")
    a, b, link = (tmp_path / name for name in ("a.jsonl", "b.jsonl", "link.jsonl"))
    check = ("vhack", "check", "--model", "reference:qwen3")
    for command, flags in (
        (("poc", "calibrate", a, b, "-o", link), ("--output", "PROOFS")),
        (("poc", "calibrate-responses", a, b, "--model", "m", "-o", b), ("--output", "RECEIPTS")),
        ((*check, "--pairs", a, "--html", a), ("--html", "--pairs")),
        ((*check, "-o", tmp_path / "new", "--html", tmp_path / "new"), ("--output", "--html")),
    ):
        said = refused(*command)
        assert f"error: {flags[0]} " in said
        assert f", which is {flags[1]} too" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "b.jsonl", "link.jsonl"]
    merged = assay(
        "poc",
        "calibrate",
        "--merge",
        tmp_path / "c",
        "--merge",
        tmp_path / "d",
        "-o",
        tmp_path / "c",
    )
    assert "No such file" in merged.err, "builds are added to a calibration file"


@pytest.mark.parametrize("word", ["false", "0"])
def test_a_refusal_to_overwrite_is_read_by_its_meaning(word, assay, tmp_path):
    """Any text but an empty one was taken for a permission."""
    (tmp_path / "pairs.jsonl").write_text("mine")
    words = ("vhack", "pairs", "generate", "-n", 2, "-o", tmp_path / "pairs.jsonl")
    assert assay(*words, "--set", f"overwrite={word}").code == 2
    assert (tmp_path / "pairs.jsonl").read_text() == "mine"
    assert assay(*words, "--set", "overwrite=true").code == 0


def test_a_long_file_in_the_place_of_a_result_is_not_read_whole(tmp_path):
    (tmp_path / "mine").touch()
    os.truncate(tmp_path / "mine", 2**30)  # without a line end
    tracemalloc.start()
    assert not is_result(tmp_path / "mine")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2**28


@pytest.mark.parametrize("content", ["nodes = [1]\n", '{"prompt": "a"}\n{"prompt": "b"}\n', "\0"])
def test_a_result_replaces_no_file_of_another_kind(refused, assay, tmp_path, content):
    """A command without --overwrite replaces its earlier result, and nothing that a user wrote."""
    (tmp_path / "mine").write_text(content)
    said = refused("poc", "calibrate", "--model", "reference:qwen3", "-o", tmp_path / "mine")
    assert "no result of this command" in said
    assert "--output" in said
    assert (tmp_path / "mine").read_text() == content
    for earlier in ("", '{"kind":"assay.poc.calibration","schema":1}\n', "<!doctype html>\n"):
        (tmp_path / "mine").write_text(earlier)
        after = assay("poc", "calibrate", "--model", tmp_path / "none", "-o", tmp_path / "mine")
        assert "no result of this command" not in after.err


@pytest.mark.parametrize(
    ("words", "advice"),
    [
        (("ledger", "show"), "did you mean assay poc ledger?"),
        (("poc", "calibrate", "--valid-rate", "10%"), "a number such as 0.1"),
        (("poc", "prove", "--model", "reference:qwen3", "--node-count", "1e9"), "a whole number"),
        (("vhack", "pairs", "generate", "-n", "0"), "ask for more, for instance 48"),
    ],
)
def test_a_mistake_is_answered_in_plain_words(words, advice, refused, tmp_path):
    output = ("-o", tmp_path / "x") if words[1] in ("prove", "pairs") else ()
    assert advice in refused(*words, *output)


def test_advice_names_the_key_of_a_file_where_the_help_has_no_flag(refused, tmp_path):
    """On 0944c8c1 it names a flag of which a warning says that it will go."""
    config = tmp_path / "c.toml"
    config.write_text('[poc.prove]\nkernels = "compiled"\npreset = "decode"\n')
    known = ("--model", "reference:qwen3", "--block-hash", "b", "--public-key", "k")
    said = refused("poc", "prove", *known, "--config", config, "-o", tmp_path / "p.jsonl")
    assert "leave `kernels` out" in said
    assert "[poc.prove] in a file for --config" in said
