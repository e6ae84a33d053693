"""``assay models``: what can be loaded, and random-weight checkpoints."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from assay.cli.commands import App
from assay.cli.output import JsonFlag, emit_json, show_values, table
from assay.cli.settings import settings

if TYPE_CHECKING:
    from assay.cli.plain_settings import RandomModelSettings


app = App(help="Bundled models, shape presets and random-weight checkpoints.")

Reference = Annotated[str, typer.Argument(help="Model: a directory, a hub id, reference:… or shape:…")]


@app.command("list", epilog="Example: assay models list")
def list_(as_json: JsonFlag = False) -> None:
    """List the bundled models and the shape presets."""
    from assay import models

    found = models.list_models()
    if as_json:
        emit_json("assay.models.list/1", {"models": [asdict(info) for info in found]})
        return
    rows = [
        (info.reference, f"{info.parameters / 1e6:.1f} M", info.num_layers, info.hidden_size, info.vocab_size)
        for info in found
    ]
    table(("model", "parameters", "layers", "hidden", "vocabulary"), rows)


@app.command(epilog="Example: assay models info shape:qwen3-0.6b")
def info(reference: Reference, as_json: JsonFlag = False) -> None:
    """Describe one model without loading its weights."""
    from assay import models

    show_values("assay.models.info/1", asdict(models.model_info(reference)), as_json)


@app.command("random", epilog="Example: assay models random shape:qwen3-0.6b -o checkpoint")
@settings("assay.cli.plain_settings:RandomModelSettings")
def random_(chosen: "RandomModelSettings", reference: Reference, as_json: JsonFlag = False) -> None:
    """Write a checkpoint with random weights."""
    from assay import models

    models.save_random(reference, chosen.output, **chosen.model_dump(exclude={"output"}))
    if as_json:
        values = {"path": str(chosen.output), "weights": chosen.weights, "block_hash": chosen.block_hash}
        emit_json("assay.models.random/1", values)
    else:
        typer.echo(str(chosen.output))
