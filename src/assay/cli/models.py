"""``assay models``: what can be loaded, and random-weight checkpoints."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import click
from pydantic import Field

from assay.cli.flags import ARGUMENT, MODEL_HELP, OUTPUT, TEXT
from assay.cli.framework import Group
from assay.cli.output import emit_json, show_values, table
from assay.settings import Flag, Settings

models = Group("models", "Bundled models and random checkpoints.")


class InfoSettings(Settings):
    """Settings of ``assay models info``."""

    reference: Annotated[str, ARGUMENT] = Field(description=MODEL_HELP)


class RandomSettings(InfoSettings):
    """Settings of ``assay models random``."""

    output: Annotated[Path, OUTPUT] = Field(description="Directory of the checkpoint.")
    block_hash: Annotated[str, TEXT] = Field("block", description="Block that seeds the weights.")
    weights: Annotated[str, Flag(unit="MODE")] = Field(
        "random-all", description="What is random: random-all or random-embed."
    )
    dtype: Annotated[str, Flag(unit="DTYPE")] = Field(
        "bfloat16", description="Dtype of the weights: float32, float16 or bfloat16."
    )


@models.add("list", example="assay models list")
def list_models(as_json: bool) -> None:
    """List the bundled models and the shape presets."""
    from assay.models.info import list_models

    found = list_models()
    if as_json:
        emit_json("assay.models.list/1", {"models": [asdict(info) for info in found]})
        return
    rows = [
        (info.reference, f"{info.parameters / 1e6:.1f} M", info.num_layers, info.hidden_size, info.vocab_size)
        for info in found
    ]
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
