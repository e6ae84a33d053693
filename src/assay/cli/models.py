"""``assay models``: what can be loaded, and random-weight checkpoints."""

import json
from dataclasses import asdict
from importlib.resources import files
from pathlib import Path
from typing import Annotated

import click
from pydantic import Field

from assay.cli.flags import ARGUMENT, FOLDER
from assay.cli.framework import Group
from assay.cli.output import emit_json, show_values, table
from assay.settings import Settings

models = Group("models", "Bundled models and random checkpoints.")


class InfoSettings(Settings):
    """Settings of ``assay models info``."""

    reference: Annotated[str, ARGUMENT] = Field(description="Model: a directory, a hub id, reference:… or shape:…")


class RandomSettings(InfoSettings):
    """Settings of ``assay models random``."""

    output: Annotated[Path, FOLDER] = Field(description="Directory of the checkpoint.")
    block_hash: Annotated[str, "TEXT"] = Field("block", description="Block that seeds the weights.")
    weights: Annotated[str, "NAME"] = Field("random-all", description="What is random: random-all or random-embed.")
    dtype: Annotated[str, "NAME"] = Field("bfloat16", description="float32, float16 or bfloat16.")


@models.add("list", example="assay models list")
def list_(as_json: bool) -> None:
    """List the bundled models and the shape presets."""
    found = json.loads((files("assay") / "models" / "catalogue.json").read_text(encoding="utf-8"))
    if as_json:
        emit_json("assay.models.list/1", {"models": found})
        return
    names = ("reference", "num_layers", "hidden_size", "vocab_size")
    rows = [(one["reference"], f"{one['parameters'] / 1e6:.1f} M", *(one[name] for name in names[1:])) for one in found]
    table(("model", "parameters", "layers", "hidden", "vocabulary"), rows)


@models.add("info", InfoSettings, example="assay models info shape:qwen3-0.6b")
def info(chosen: InfoSettings, as_json: bool) -> None:
    """Describe a model without loading its weights."""
    from assay import models

    show_values("assay.models.info/1", asdict(models.model_info(chosen.reference)), as_json)


@models.add("random", RandomSettings, example="assay models random shape:qwen3-0.6b -o checkpoint")
def random(chosen: RandomSettings, as_json: bool) -> None:
    """Write a checkpoint with random weights."""
    from assay import models

    models.save_random(chosen.reference, chosen.output, **chosen.model_dump(exclude={"output", "reference"}))
    if as_json:
        values = {"path": str(chosen.output), "weights": chosen.weights, "block_hash": chosen.block_hash}
        emit_json("assay.models.random/1", values)
    else:
        click.echo(str(chosen.output))
