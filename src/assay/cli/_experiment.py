"""``assay poc experiment``: the published tables measured again, resumable, with one report per run."""

from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from assay.cli._commands import App, Resumable
from assay.cli._flags import DeviceFlag, DtypeFlag
from assay.cli._output import JsonFlag, emit_json, progress_bar, table

if TYPE_CHECKING:
    from assay.reports import JsonObject
    from assay.research.matrix import Configuration
    from assay.research.weights import WeightRow

__all__ = ["app"]

app = App(help="Measure the published tables again, each number with its noise.")

BOTH = "reference:qwen3,reference:llama"
BLOCKS = "block_alpha,block_beta,block_gamma"
KEYS = "node_A,node_B,node_C"

ModelsFlag = Annotated[str, typer.Option(help="Models, separated by commas.")]
BlocksFlag = Annotated[str, typer.Option(help="Block hashes, separated by commas.")]
RunNameFlag = Annotated[str, typer.Option(help="Folder of the run; the same name continues it.")]
OutputFlag = Annotated[Path, typer.Option("-o", "--output", help="Where the folders of runs are.")]
NoncesFlag = Annotated[int, typer.Option(help="Nonces per block.")]
SeqLenFlag = Annotated[int, typer.Option(help="Input positions per nonce.")]
BatchSizeFlag = Annotated[int, typer.Option(help="Nonces per forward pass.")]
EXPERIMENTS = Path("experiments")


@app.command(cls=Resumable)
def approaches(
    models: ModelsFlag = BOTH,
    approaches: Annotated[str, typer.Option(help="Presets, separated by commas; all when left out.")] = "",
    blocks: BlocksFlag = BLOCKS,
    nonces: NoncesFlag = 1024,
    valid_rate: Annotated[float, typer.Option(help="Share of valid nonces at the calibrated r_target.")] = 0.5,
    checked: Annotated[int, typer.Option(help="Nonces that the validator recomputes.")] = 64,
    timed: Annotated[int, typer.Option(help="Batches for which an approach is timed; 0 skips it.")] = 5,
    seq_len: SeqLenFlag = 256,
    batch_size: BatchSizeFlag = 32,
    dtype: DtypeFlag = None,
    device: DeviceFlag = None,
    run_name: RunNameFlag = "approaches",
    output: OutputFlag = EXPERIMENTS,
    as_json: JsonFlag = False,
) -> None:
    """Measure every approach: distances against the chord law, spread of blocks, separability, cost."""
    from assay.research.approaches import APPROACHES, ApproachPlan, run_approaches
    from assay.research.runs import build_report, read_run, run_folder

    plan = ApproachPlan(
        models=_listed(models),
        approaches=_listed(approaches) or APPROACHES,
        blocks=_listed(blocks),
        nonces=nonces,
        valid_rate=valid_rate,
        checked=checked,
        timed=timed,
        seq_len=seq_len,
        batch_size=batch_size,
        dtype=dtype,
        device=device,
    )
    folder = run_folder(output, run_name)
    with progress_bar("measuring", "approaches") as progress:
        run_approaches(plan, folder, progress=progress)
    page = build_report(folder)
    cells = read_run(folder, "approaches").cells
    if as_json:
        emit_json("assay.poc.experiment.approaches/1", _where(page) | {"approaches": cells})
        return
    for model in dict.fromkeys(cell["model"] for cell in cells):
        chosen = [cell for cell in cells if cell["model"] == model]
        columns = ("approach", "mean", "offset/SE", "spread", "noise band", "int4/honest", "AUC", "breaks it")
        table(columns, [_approach(cell) for cell in chosen], title=f"{model}: spread at {valid_rate:.0%} valid")
    typer.echo(f"report: {page}")


def _approach(cell: "JsonObject") -> tuple[str, ...]:
    spread = cell["spreads"][0]
    return (
        cell["approach"],
        f"{cell['mean']:.4f}",
        f"{cell['mean_off_in_standard_errors']:.1f}",
        f"{spread['spread']:.1%}",
        "{:.1%} to {:.1%}".format(*spread["noise_band"]),
        f"{cell['separation']:.1f}",
        f"{cell['auc']:.3f}",
        cell["breaks_structure"],
    )


@app.command(cls=Resumable)
def weights(
    models: ModelsFlag = BOTH,
    preset: Annotated[str, typer.Option(help="A row of the pipeline table.")] = "hidden-reflections",
    blocks: BlocksFlag = BLOCKS,
    nonces: NoncesFlag = 1024,
    seq_len: SeqLenFlag = 256,
    batch_size: BatchSizeFlag = 32,
    dtype: DtypeFlag = None,
    device: DeviceFlag = None,
    run_name: RunNameFlag = "weights",
    output: OutputFlag = EXPERIMENTS,
    as_json: JsonFlag = False,
) -> None:
    """Compare trained weights with weights drawn per block, all of them or the embeddings alone."""
    from dataclasses import asdict

    from assay.research.runs import build_report, read_run, run_folder
    from assay.research.weights import WeightPlan, run_weights, weight_rows

    plan = WeightPlan(
        models=_listed(models),
        preset=preset,
        blocks=_listed(blocks),
        nonces=nonces,
        seq_len=seq_len,
        batch_size=batch_size,
        dtype=dtype,
        device=device,
    )
    folder = run_folder(output, run_name)
    with progress_bar("measuring", "blocks") as progress:
        run_weights(plan, folder, progress=progress)
    page = build_report(folder)
    rows = weight_rows(read_run(folder, "weights").cells)
    if as_json:
        emit_json("assay.poc.experiment.weights/1", _where(page) | {"rows": [asdict(row) for row in rows]})
        return
    columns = ("weights", *rows[0].blocks, "spread of means", "noise band", "verdict")
    for model in dict.fromkeys(row.model for row in rows):
        table(columns, [_weights(row) for row in rows if row.model == model], title=model)
    typer.echo(f"report: {page}")


def _weights(row: "WeightRow") -> tuple[str, ...]:
    verdict = "inside noise" if row.inside else "beyond noise"
    means = (f"{mean:.4f}" for mean in row.means)
    return (row.weights, *means, f"{row.spread:.4f}", f"{row.low:.4f} to {row.high:.4f}", verdict)


@app.command(cls=Resumable)
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
    from assay.research.matrix import Plan, configurations, run_matrix
    from assay.research.runs import build_report, read_run, run_folder

    plan = Plan(
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
    folder = run_folder(output, run_name)
    with progress_bar("testing", "tests") as progress:
        run_matrix(plan, folder, progress=progress, note=_note)
    page = build_report(folder)
    found = configurations(read_run(folder, "matrix").cells)
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
    from assay.research.runs import build_report, run_folder

    page = build_report(run_folder(output, run_name))
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
