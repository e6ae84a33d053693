"""``assay vhack train``: one run of one arm, resumable."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from assay.cli._flags import DeviceFlag, GradientDtypeFlag, ModelFlag, PairsFlag
from assay.cli._output import JsonFlag, emit_json, table
from assay.errors import UsageError

if TYPE_CHECKING:
    from assay.vhack.training import RunResult

__all__ = ["train"]

_SHOWN = ("hack", "solve", "reward", "cin_s", "cin_t", "cin", "cout", "leak", "displacement", "seconds")


def train(
    model: ModelFlag,
    output: Annotated[Path, typer.Option("-o", "--output", help="Directory of the run; the same one continues it.")],
    arm: Annotated[
        str, typer.Option(help="none, no-loophole, erase-gradient, …; with :random behind it, along control axes.")
    ] = "erase-gradient",
    pairs: PairsFlag = "generated:96",
    basis: Annotated[str | None, typer.Option(help="A basis file for the true axes, instead of the pairs.")] = None,
    method: Annotated[str, typer.Option(help="How axes are extracted: lda, mean-diff or svd.")] = "lda",
    k_use: Annotated[int, typer.Option(help="Axes per module.")] = 5,
    gain: Annotated[float, typer.Option(help="On the counter-force of the gate; above 1 it pushes back.")] = 1.0,
    refresh: Annotated[int, typer.Option(help="Extract the axes anew every so many steps; 0 never.")] = 0,
    steps: Annotated[int, typer.Option(help="Optimiser steps.")] = 100,
    seed: Annotated[int, typer.Option(help="Of tasks, sampling and control axes.")] = 0,
    optimizer: Annotated[str, typer.Option(help="adamw or sgd.")] = "adamw",
    lr: Annotated[float, typer.Option(help="Learning rate of δS.")] = 0.03,
    max_norm: Annotated[float, typer.Option(help="Clip the gated gradient to this norm; 0 does not.")] = 1.0,
    prompts: Annotated[int, typer.Option(help="Tasks per step.")] = 8,
    group: Annotated[int, typer.Option(help="Rollouts per task.")] = 8,
    micro_batch: Annotated[int, typer.Option(help="Rollouts per backward pass; 0 is one group.")] = 0,
    max_new_tokens: Annotated[int, typer.Option(help="Per completion.")] = 128,
    temperature: Annotated[float, typer.Option(help="Of sampling.")] = 1.0,
    beta: Annotated[float, typer.Option(help="Weight of the divergence from the start.")] = 0.0,
    modes: Annotated[
        str, typer.Option(help="What the grader may look at, separated by commas; all loopholes when left out.")
    ] = "",
    share_none: Annotated[float, typer.Option(help="Share of tasks shown without their loophole.")] = 0.2,
    difficulty: Annotated[str, typer.Option(help="Steps per task, LOW:HIGH.")] = "1:2",
    families: Annotated[str, typer.Option(help="Families of tasks, separated by commas; all when left out.")] = "",
    tasks: Annotated[int, typer.Option(help="How many tasks there are.")] = 512,
    teacher: Annotated[str | None, typer.Option(help="A pool of stored completions, JSON Lines.")] = None,
    teacher_share: Annotated[float, typer.Option(help="Share of each group that comes from it.")] = 0.25,
    save_every: Annotated[int, typer.Option(help="Steps between checkpoints.")] = 20,
    checkpointing: Annotated[bool, typer.Option("--checkpointing", help="Recompute layers to save memory.")] = False,
    tracker: Annotated[list[str] | None, typer.Option(help="A tracker of TRL's, such as wandb; repeatable.")] = None,
    allow_unsandboxed: Annotated[
        bool, typer.Option("--allow-unsandboxed", help="Run the programs even where nothing can shut them in.")
    ] = False,
    dtype: GradientDtypeFlag = None,
    device: DeviceFlag = None,
    as_json: JsonFlag = False,
) -> None:
    """Train one arm by reinforcement with TRL. The same command goes on after the last checkpoint."""
    from assay.vhack import training as trainer

    settings = trainer.TrainSettings(
        model=model,
        arm=arm,
        pairs=pairs,
        basis=basis,
        method=method,
        k_use=k_use,
        gain=gain,
        refresh=refresh,
        steps=steps,
        seed=seed,
        optimizer=optimizer,
        lr=lr,
        max_norm=max_norm,
        prompts=prompts,
        group=group,
        micro_batch=micro_batch,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        beta=beta,
        **({"modes": _listed(modes)} if modes else {}),
        share_none=share_none,
        difficulty=_range(difficulty),
        families=_listed(families),
        tasks=tasks,
        teacher=teacher,
        teacher_share=teacher_share,
        save_every=save_every,
        checkpointing=checkpointing,
        dtype=dtype,
        device=device,
    )
    result = trainer.train(
        settings,
        output,
        console=lambda line: typer.echo(line, err=True),
        trackers=tuple(tracker or ()),
        allow_unsandboxed=allow_unsandboxed,
    )
    _print(result, arm, as_json)


def _print(result: "RunResult", arm: str, as_json: bool) -> None:
    if as_json:
        values = {"path": str(result.folder), "arm": arm, "steps": result.steps, "resumed_from": result.resumed_from}
        emit_json("assay.vhack.train.result/1", {**values, "last": result.last})
        return
    rows = [(name.replace("_", " "), f"{result.last[name]:.4f}") for name in _SHOWN if name in result.last]
    table(("", "mean of the last 10 steps"), rows, title=f"{arm}: {result.steps} steps in {result.folder}")


def _listed(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _range(text: str) -> tuple[int, int]:
    low, _, high = text.partition(":")
    try:
        return int(low), int(high or low)
    except ValueError:
        raise UsageError(f"--difficulty {text!r}", wanted="LOW:HIGH, such as 1:3", do="give two numbers") from None
