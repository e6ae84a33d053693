"""``assay vhack merge``, ``sample`` and ``evaluate``: what a trained δS has made of a model."""

import os
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from assay.cli.flags import MODEL, OUTPUT, ModelName, Overwrite, Unsandboxed
from assay.cli.output import emit_json, progress_bar, show_values, table
from assay.cli.vhack import Result, WeightDtype, WeightSettings, vhack
from assay.errors import UsageError
from assay.settings import Device, Flag, Settings

if TYPE_CHECKING:
    from assay.files.jsonl import JsonObject
    from assay.vhack.training.rewards import Task
    from assay.vhack.training.settings import SampleSettings

SAMPLING = "assay.vhack.training.settings:SampleSettings"
_EVALUATE = "assay.vhack.evaluate/1"


Delta = Annotated[Path | None, Field(description="File of δS of this model, merged before sampling.")]


class MergeSettings(WeightSettings):
    """Settings of ``assay vhack merge``."""

    delta: Path = Field(description="File of δS that training or DeltaS.save wrote for this model.")
    output: Annotated[Path, OUTPUT] = Field(description="Directory to write.")
    lora: Annotated[int | None, Flag(unit="RANK")] = Field(None, ge=1, description="Write a LoRA of this rank instead.")
    overwrite: Overwrite = False


class SampleCommand(Settings):
    """Settings of ``assay vhack sample`` beside those of sampling."""

    model: ModelName
    delta: Delta = None
    dtype: WeightDtype = None
    device: Device = None
    output: Annotated[Path, OUTPUT] = Field(description="File for the completions, JSON Lines.")
    overwrite: Overwrite = False


class EvaluateCommand(Settings):
    """Settings of ``assay vhack evaluate`` beside those of sampling."""

    model: Annotated[str | None, MODEL] = Field(None, description="Model to sample from.")
    samples: Path | None = Field(None, description="Completions to grade; no model is loaded then.")
    delta: Delta = None
    reward: Annotated[str | None, Flag(unit="MODULE:FUNCTION")] = Field(
        None, description="What pays completions, in TRL's form; by default they are run and graded."
    )
    graded: Path | None = Field(None, description="File for the completions with the grade of each.")
    output: Result = None
    dtype: WeightDtype = None
    device: Device = None
    overwrite: Overwrite = False
    allow_unsandboxed: Unsandboxed = False


@vhack.add(
    "merge",
    MergeSettings,
    example="assay vhack merge --model reference:organism --delta run/delta.safetensors -o merged",
)
def merge(chosen: MergeSettings, as_json: bool) -> None:
    """Write a trained δS into the weights of its model.

    The result is a directory for anything that loads such: of merged weights, or of an adapter with --lora.
    """
    from assay.vhack.delta.merge import write_merged

    with progress_bar("decompositions", "matrices") as progress:
        values = write_merged(
            chosen.output,
            chosen.model,
            chosen.delta,
            lora=chosen.lora,
            overwrite=chosen.overwrite,
            dtype=chosen.dtype,
            device=chosen.device,
            progress=progress,
        )
    show_values("assay.vhack.merge/1", values, as_json)


@vhack.add(
    "sample",
    SampleCommand,
    SAMPLING,
    shown="model delta output tasks per_task temperature max_new_tokens seed device overwrite",
    example="assay vhack sample --model reference:organism -o samples.jsonl",
    resumable=True,
)
def sample(own: SampleCommand, how: "SampleSettings", as_json: bool) -> None:
    """Sample completions of tasks into a file.

    The same command continues an interrupted one.
    """
    from assay.files.storage import check_new_file
    from assay.vhack.training.rewards import load_tasks

    check_new_file(own.output, overwrite=own.overwrite)
    tasks, _ = load_tasks(how, least=1, why="to complete")
    tasks = [task for task in tasks for _ in range(how.per_task)]
    records, first = _sampled(own, how, own.model, tasks, own.output)
    values = {"path": str(own.output), "completions": len(records), "resumed_from": first}
    show_values("assay.vhack.sample/1", {**values, "at_limit": _at_limit(records)}, as_json)


@vhack.add(
    "evaluate",
    EvaluateCommand,
    SAMPLING,
    shown="model samples delta reward graded output tasks seed device overwrite",
    example="assay vhack evaluate --model reference:organism --delta run/delta.safetensors",
)
def evaluate(own: EvaluateCommand, how: "SampleSettings", as_json: bool) -> None:
    """Say how often tasks are solved and hacked.

    It grades completions of a model, or of a file, and counts by loophole. Nothing is kept of an interrupted call. For
    a long one write completions with assay vhack sample, which goes on where it was, and grade that file with
    --samples.
    """
    from assay.files.jsonl import dumps
    from assay.files.storage import check_new_file, write_atomic, write_jsonl
    from assay.vhack import training
    from assay.vhack.training.evaluation import read_samples
    from assay.vhack.training.rewards import check_gradable, import_function, load_tasks

    if own.samples is None and own.model is None:
        raise UsageError("neither --model nor --samples", wanted="what to evaluate", do="name a model or a file")
    has_model = own.model not in (None, os.environ.get("ASSAY_MODEL"))  # which is for all commands
    for flag, is_given in (("--model", has_model), ("--delta", own.delta is not None)):
        if own.samples is not None and is_given:
            raise UsageError(f"{flag} with --samples", wanted="one of them", do=f"leave {flag} out: nothing is sampled")
    for path in filter(None, (own.output, own.graded)):
        check_new_file(path, overwrite=own.overwrite)
    reward = import_function(own.reward, "--reward") if own.reward else None
    tasks, source = load_tasks(how, least=1, why="to evaluate")
    records: list[JsonObject] = []
    if own.samples is not None:
        (records, tasks), source = read_samples(own.samples, tasks), str(own.samples)
    if reward is None:
        check_gradable(tasks, source, allow_unsandboxed=own.allow_unsandboxed)
    if own.samples is None:
        assert own.model is not None
        tasks = [task for task in tasks for _ in range(how.per_task)]
        with TemporaryDirectory() as folder:
            records, _ = _sampled(own, how, own.model, tasks, Path(folder) / "samples.jsonl")
    completions = [record["completion"] for record in records]
    with progress_bar("grades", "completions") as progress:
        found = training.evaluate(
            tasks, completions, reward=reward, allow_unsandboxed=own.allow_unsandboxed, progress=progress
        )
    if own.graded:
        grades = [{name: value for name, value in asdict(one).items() if value is not None} for one in found.grades]
        write_jsonl(own.graded, [record | grade for record, grade in zip(records, grades, strict=True)])
    origins = {dumps(record.get("origin")): record.get("origin") for record in records}
    values = {
        **found.as_dict(),
        "at_limit": _at_limit(records),
        "by_mechanism": {name: part.as_dict() for name, part in found.by_mechanism().items()},
        "origin": origins.popitem()[1] if len(origins) == 1 else None,
    }
    if own.output:
        write_atomic(own.output, dumps({"schema": _EVALUATE, **values}) + "\n")
    if as_json:
        emit_json(_EVALUATE, values)
    else:
        _print_rates(values)


def _sampled(
    own: SampleCommand | EvaluateCommand, how: "SampleSettings", reference: str, tasks: "list[Task]", path: Path
) -> "tuple[list[JsonObject], int]":
    """Return completions that are sampled into a file, and how many of them an earlier call had left there."""
    from assay.files.jsonl import read_jsonl
    from assay.models.load import load_model
    from assay.vhack.delta.file import read_delta_lengths
    from assay.vhack.delta.merge import load_adapter
    from assay.vhack.training.evaluation import sample_tasks
    from assay.vhack.training.pool import check_prompts
    from assay.vhack.training.rewards import read_prompt

    lengths = read_delta_lengths(own.delta) if own.delta else {}
    check_prompts(reference, [read_prompt(task) for task in tasks], how.max_new_tokens)
    loaded, origin = load_model(reference, dtype=own.dtype, device=own.device), {}
    if own.delta:
        with progress_bar("decompositions", "matrices") as progress:
            load_adapter(loaded, own.delta, lengths, progress=progress).merge()
        origin = {"delta": sha256(own.delta.read_bytes()).hexdigest()}
    with progress_bar("completions", "completions") as progress:
        first = sample_tasks(path, loaded, tasks, origin=origin, overwrite=own.overwrite, progress=progress, **how.how)
    return [record for _, record in read_jsonl(path)], first


def _at_limit(records: "list[JsonObject]") -> int:
    """Return the number of completions that are as long as was allowed, and so may have been cut off."""
    found = 0
    for record in records:
        tokens, origin = record.get("tokens"), record.get("origin")
        limit = origin.get("max_new_tokens") if isinstance(origin, dict) else None
        found += isinstance(tokens, list) and isinstance(limit, int) and len(tokens) >= limit
    return found


def _print_rates(values: dict[str, Any]) -> None:
    from assay.vhack.training.evaluation import Rate

    names = list(values["rates"])
    rows = []
    for name, part in {"all": values, **values["by_mechanism"]}.items():
        shown = (Rate(**part["rates"][rate]).text if rate in part["rates"] else "" for rate in names)
        rows.append((name, part["tasks"], part["completions"], *shown))
    title = (
        f"{values['completions']} completions, {values['at_limit']} as long as allowed, {values['faults']} not graded"
    )
    table(("mechanism", "tasks", "completions", *names), rows, title=title)
