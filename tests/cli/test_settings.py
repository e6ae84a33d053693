"""One class is the source of flags, variables, configuration keys and defaults."""

import gc
import json
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Literal

import pytest
import typer
from pydantic import Field

from assay.cli.commands import App
from assay.cli.output import JsonFlag
from assay.cli.settings import settings, without_collection
from assay.errors import UsageError
from assay.settings import Device, Flag, Names, Settings, Spelling


class Inner(Settings):
    """Settings inside others."""

    depth: int = Field(3, ge=1, description="How deep.")


class Sample(Settings):
    """Every kind of field."""

    model: Annotated[str, Flag(variable="ASSAY_MODEL")] = Field(description="Which model.")
    share: float = Field(0.5, gt=0, lt=1, description="Which share.")
    engine: Literal["hf", "vllm"] = Field("hf", description="Which engine.")
    blocks: Names = Field(("a", "b"), description="Which blocks.")
    keys: Annotated[tuple[str, ...], Flag(("--key",))] = Field((), description="Which keys.")
    span: Annotated[
        tuple[int, int], Spelling(lambda text: tuple(map(int, text.split(":"))), "{0[0]}:{0[1]}".format)
    ] = Field((1, 2), description="From where to where.")
    folder: Path | None = Field(None, description="Where to.")
    strict: bool = Field(False, description="Whether to be strict.")
    device: Device = None
    inner: Inner = Field(Inner(), description="What is inside.")


@pytest.fixture
def sample(monkeypatch, capsys, tmp_path):
    """Run a command whose settings are :class:`Sample`, with flags, variables and a configuration file."""
    app = App(context_settings={"auto_envvar_prefix": "ASSAY"})

    @app.callback()
    def root() -> None:
        """A group, so that the command has a name."""

    @app.command()
    @settings(f"{__name__}:Sample")
    def show(sample: Sample, name: str = "n", as_json: JsonFlag = False) -> None:
        """Show."""
        typer.echo(sample.model_dump_json())

    def call(*arguments: str, config: dict | None = None, **variables: str) -> dict:
        for key, value in variables.items():
            monkeypatch.setenv(key, value)
        command = typer.main.get_command(app)
        command.main(["show", *arguments], standalone_mode=False, default_map={"show": config or {}}, prog_name="assay")
        return json.loads(capsys.readouterr().out)

    return call


def test_every_kind_of_field_has_its_default(sample):
    assert sample("--model", "m") == Sample(model="m").model_dump(mode="json")


def test_every_kind_of_field_is_read(sample):
    found = sample(
        "--model", "m", "--share", "0.25", "--engine", "vllm", "--blocks", "x, y", "--key", "k1", "--key", "k2",
        "--span", "3:4", "--folder", "/f", "--strict", "--device", "cpu", "--depth", "7",
    )  # fmt: skip
    wanted = Sample(
        model="m", share=0.25, engine="vllm", blocks=("x", "y"), keys=("k1", "k2"), span=(3, 4), folder=Path("/f"),
        strict=True, device="cpu", inner=Inner(depth=7),
    )  # fmt: skip
    assert found == wanted.model_dump(mode="json")


def test_a_flag_beats_a_variable_and_that_beats_the_file(sample):
    assert sample("--model", "m", config={"share": 0.1})["share"] == 0.1
    assert sample("--model", "m", config={"share": 0.1}, ASSAY_SHOW_SHARE="0.2")["share"] == 0.2
    assert sample("--model", "m", "--share", "0.3", config={"share": 0.1})["share"] == 0.3
    assert sample(ASSAY_MODEL="by name", ASSAY_DEVICE="cuda")["device"] == "cuda"


@pytest.mark.parametrize(
    ("arguments", "seen", "do"),
    [
        (("--share", "1.5"), "--share 1.5", "correct --share"),
        (("--engine", "VLLM"), "--engine VLLM", "did you mean --engine vllm?"),
        (("--depth", "0"), "--depth 0", "correct --depth"),
        (("--span", "x:y"), "--span x:y", "correct --span"),
    ],
)
def test_a_bad_value_names_its_flag(arguments, seen: str, do: str, sample):
    with pytest.raises(UsageError) as error:
        sample("--model", "m", *arguments)
    assert error.value.seen == seen
    assert do in error.value.do
    assert "Input should" not in error.value.wanted


def test_settings_are_strict_in_python_too(monkeypatch):
    monkeypatch.setenv("ASSAY_SHOW_SHARE", "0.2")
    monkeypatch.setenv("SHARE", "0.2")
    assert Sample(model="m").share == 0.5, "a value in Python does not depend on the environment"
    with pytest.raises(UsageError, match="did you mean share"):
        Sample(model="m", shar=1)
    with pytest.raises(UsageError, match="no --model"):
        Sample()


def test_help_does_not_wait_for_torch():
    program = "import sys\nfrom assay.cli import run\nrun(['poc', '--help'])\nsys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], stdout=subprocess.DEVNULL, check=False).returncode == 0


def test_nothing_is_collected_during_imports_and_then_it_is_again():
    with without_collection():
        assert not gc.isenabled()
    assert gc.isenabled()
    with pytest.raises(ImportError), without_collection():
        raise ImportError
    assert gc.isenabled()
