"""``assay poc experiment``: the published tables measured again, resumable, with one report per run."""

from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from assay.cli._flags import DeviceFlag, DtypeFlag
from assay.cli._output import JsonFlag, emit_json, progress_bar, table

if TYPE_CHECKING:
    from assay.poc.experiments import Configuration

__all__ = ["app"]

app = typer.Typer(help="Measure the published tables again, each number with its noise.", no_args_is_help=True)

BOTH = "reference:qwen3,reference:llama"
BLOCKS = "block_alpha,block_beta,block_gamma"
KEYS = "node_A,node_B,node_C"

ModelsFlag = Annotated[str, typer.Option(help="Models, separated by commas.")]
BlocksFlag = Annotated[str, typer.Option(help="Block hashes, separated by commas.")]
RunNameFlag = Annotated[str, typer.Option(help="Folder of the run; the same name continues it.")]
OutputFlag = Annotated[Path, typer.Option("-o", "--output", help="Where the folders of runs are.")]
SeqLenFlag = Annotated[int, typer.Option(help="Input positions per nonce.")]
BatchSizeFlag = Annotated[int, typer.Option(help="Nonces per forward pass.")]
EXPERIMENTS = Path("experiments")


@app.command()
def matrix(
    models: ModelsFlag = BOTH,
    modes: Annotated[str, typer.Option(help="sign-flips, layer-hooks, or both.")] = "sign-flips,layer-hooks",
    blocks: BlocksFlag = BLOCKS,
    public_keys: Annotated[str, typer.Option(help="Keys of nodes, separated by commas.")] = KEYS,
    duration: Annotated[float, typer.Option(help="Seconds for which every test generates.")] = 40.0,
    r_target: Annotated[float, typer.Option(help="A nonce is valid below this distance.")] = 1.416,
    seq_len: SeqLenFlag = 256,
    batch_size: BatchSizeFlag = 32,
    dtype: DtypeFlag = None,
    device: DeviceFlag = None,
    run_name: RunNameFlag = "matrix",
    output: OutputFlag = EXPERIMENTS,
    as_json: JsonFlag = False,
) -> None:
    """Test models × modes × blocks × keys against live services over HTTP, with a receiver of callbacks."""
    from assay.poc import experiments

    plan = experiments.Plan(
        models=_listed(models),
        modes=_listed(modes),
        blocks=_listed(blocks),
        public_keys=_listed(public_keys),
        duration=duration,
        r_target=r_target,
        seq_len=seq_len,
        batch_size=batch_size,
        dtype=dtype,
        device=device,
    )
    folder = experiments.run_folder(output, run_name)
    with progress_bar("testing", "tests") as progress:
        experiments.run_matrix(plan, folder, progress=progress, note=_note)
    found = experiments.configurations(experiments.read_run(folder, "matrix").cells)
    page = experiments.build_report(folder)
    if as_json:
        emit_json("assay.poc.experiment.matrix/1", _where(page) | {"configurations": [row.as_dict() for row in found]})
    else:
        _print_matrix(found)
        typer.echo(f"report: {page}")


def _print_matrix(found: "list[Configuration]") -> None:
    for configuration in found:
        keys = list(configuration.blocks[0].rates)
        rows = [
            (row.block, *(f"{row.rates[key]:.1%}" if key in row.rates else "" for key in keys), f"{row.rate:.1%}")
            for row in configuration.blocks
        ]
        table(("block", *keys, "mean"), rows, title=f"{configuration.model}, {configuration.mode}")
    rows = [
        (f"{row.model}, {row.mode}", *_spread(row), f"{row.nonces_per_second:.1f}", str(row.undelivered))
        for row in found
    ]
    table(("", "spread", "noise band", "verdict", "nonces/s", "undelivered"), rows, title="cross-block spread")


def _spread(row: "Configuration") -> tuple[str, str, str]:
    if row.spread is None:
        return "", "", row.verdict
    return f"{row.spread.value:.1%}", f"{row.spread.low:.1%} to {row.spread.high:.1%}", row.verdict


@app.command()
def report(run_name: RunNameFlag, output: OutputFlag = EXPERIMENTS, as_json: JsonFlag = False) -> None:
    """Write the page of a run from what its folder holds, while it goes on too."""
    from assay.poc import experiments

    page = experiments.build_report(experiments.run_folder(output, run_name))
    if as_json:
        emit_json("assay.poc.experiment.report/1", _where(page))
    else:
        typer.echo(page)


def _listed(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _note(sentence: str) -> None:
    typer.echo(sentence, err=True)


def _where(page: Path) -> dict[str, object]:
    return {"folder": str(page.parent), "report": str(page)}


if find_spec("assay.cli._experiment_attacks") is not None:
    import_module("assay.cli._experiment_attacks").register(app)
