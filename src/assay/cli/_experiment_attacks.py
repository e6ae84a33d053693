"""``assay poc experiment redteam`` and ``simulate``: what cheating costs, and a network over a year."""

from pathlib import Path
from typing import Annotated

import typer

from assay.cli._commands import Resumable
from assay.cli._flags import DeviceFlag
from assay.cli._output import JsonFlag, emit_json, progress_bar, table

__all__ = ["register"]

RunNameFlag = Annotated[str, typer.Option(help="Folder of the run; the same name continues it.")]
OutputFlag = Annotated[Path, typer.Option("-o", "--output", help="Where the folders of runs are.")]
EXPERIMENTS = Path("experiments")


def register(app: typer.Typer) -> None:
    """Add the two commands to ``assay poc experiment``."""
    app.command(cls=Resumable)(redteam)
    app.command(cls=Resumable)(simulate)


def redteam(
    models: Annotated[str, typer.Option(help="Models, separated by commas.")] = "reference:qwen3,reference:llama",
    dtypes: Annotated[str, typer.Option(help="Dtypes of provers and attackers, separated by commas.")] = "bfloat16",
    nonces: Annotated[int, typer.Option(help="Nonces that every attacker answers.")] = 64,
    honest: Annotated[int, typer.Option(help="Honest nonces; half of them calibrate, half test.")] = 384,
    searched: Annotated[int, typer.Option(help="Nonces of the search over positions read; 0 skips it.")] = 12,
    block_hash: Annotated[str, typer.Option(help="The attacked block.")] = "block_alpha",
    seq_len: Annotated[int, typer.Option(help="Input positions per nonce.")] = 256,
    batch_size: Annotated[int, typer.Option(help="Nonces per forward pass.")] = 16,
    device: DeviceFlag = None,
    run_name: RunNameFlag = "redteam",
    output: OutputFlag = EXPERIMENTS,
    as_json: JsonFlag = False,
) -> None:
    """Run every attacker against every preset: cost, error, residuals, and who catches it after how many nonces."""
    from assay.research import redteam as team
    from assay.research.redteam import PRESETS, fields
    from assay.research.runs import build_report, read_run, run_folder

    plan = team.RedteamPlan(
        models=_listed(models),
        dtypes=_listed(dtypes),
        nonces=nonces,
        honest=honest,
        searched=searched,
        block_hash=block_hash,
        seq_len=seq_len,
        batch_size=batch_size,
        device=device,
    )
    folder = run_folder(output, run_name)
    with progress_bar("attacking", "cells") as progress:
        team.run_redteam(plan, folder, progress=progress)
    cells = read_run(folder, "redteam").cells
    page = build_report(folder)
    best = [team.paying(cells, model, dtype, preset) for model, dtype in fields(cells) for preset in PRESETS]
    if as_json:
        emit_json("assay.poc.experiment.redteam/1", {"folder": str(folder), "report": str(page), "paying": best})
        return
    for model, dtype in fields(cells):
        for preset in PRESETS:
            rows = team.attack_rows(cells, model, dtype, preset)
            table(team.ATTACK_COLUMNS, rows, title=f"{model}, {dtype}, {preset}")
    columns = ("model", "dtype", "preset", "attack that pays best", "cost", "ε", "over honest", "caught after")
    rounded = [
        (b["model"], b["dtype"], b["preset"], b["attack"], *(f"{b[k]:.2f}" for k in ("cost", "error", "over_honest")))
        for b in best
    ]
    table(columns, [(*row, b["checked_99"] or "never") for row, b in zip(rounded, best, strict=True)])
    typer.echo(f"report: {page}")


def simulate(
    presets: Annotated[str, typer.Option(help="Presets, separated by commas.")] = "poc-2.0,artifact,hardened",
    dtypes: Annotated[str, typer.Option(help="Dtypes of provers, separated by commas.")] = "bfloat16,float16",
    nodes: Annotated[int, typer.Option(help="Nodes of the network.")] = 10_000,
    cheating: Annotated[float, typer.Option(help="Share of the nodes of each kind of cheater.")] = 0.01,
    rounds: Annotated[int, typer.Option(help="Rounds in the simulated time.")] = 365,
    validators: Annotated[int, typer.Option(help="Nodes of the largest stakes, who check the others.")] = 100,
    checkers: Annotated[int, typer.Option(help="Validators that check a node in a round.")] = 5,
    checked: Annotated[int, typer.Option(help="Nonces that a validator recomputes.")] = 32,
    seed: Annotated[int, typer.Option(help="Of everything drawn.", min=0)] = 0,
    run_name: RunNameFlag = "simulate",
    output: OutputFlag = EXPERIMENTS,
    as_json: JsonFlag = False,
) -> None:
    """Simulate a network over a year under each verdict rule: false accusations, time to catch, junk that is paid."""
    from assay.research import simulation
    from assay.research.runs import build_report, read_run, run_folder

    network = simulation.Network(
        nodes=nodes,
        cheating=cheating,
        rounds=rounds,
        validators=validators,
        checkers=checkers,
        checked=checked,
        seed=seed,
    )
    plan = simulation.SimulationPlan(presets=_listed(presets), dtypes=_listed(dtypes), network=network)
    folder = run_folder(output, run_name)
    with progress_bar("simulating", "presets") as progress:
        simulation.run_simulation(plan, folder, progress=progress)
    cells = read_run(folder, "simulate").cells
    page = build_report(folder)
    if as_json:
        emit_json(
            "assay.poc.experiment.simulate/1", {"folder": str(folder), "report": str(page), "presets": list(cells)}
        )
        return
    for cell in cells:
        table(simulation.COLUMNS, simulation.table_rows(cell), title=f"{cell['preset']}, {cell['dtype']}")
    typer.echo(f"report: {page}")


def _listed(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())
