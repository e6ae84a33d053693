"""``assay vhack merge``, ``sample`` and ``evaluate``: what training made of a model."""

from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

import assay
from assay.cli.flags import (
    FILE,
    MODEL,
    FileSettings,
    FolderSettings,
    ReplacingSettings,
    ResultSettings,
    Unsandboxed,
)
from assay.cli.vhack import WeightLoadSettings, WeightSettings, keep_result, vhack
from assay.errors import UsageError
from assay.files.jsonl import JsonObject, dumps, read_jsonl
from assay.files.reading import digest_file
from assay.files.storage import check_folder, write_jsonl
from assay.framework.output import progress_bar, show_values, table
from assay.settings import Flag

if TYPE_CHECKING:
    from assay.vhack.training.settings import SampleSettings
    from assay.vhack.training.tasks import Task

SAMPLING = "assay.vhack.training.settings:SampleSettings"
DELTA = Flag(reads="assay.vhack.names:check_delta")

Delta = Annotated[
    Path | None, DELTA, Field(description="File of δS of this model, merged into its weights.")
]


class MergeSettings(ReplacingSettings, FolderSettings, WeightSettings):
    """Settings of ``assay vhack merge``."""

    delta: Annotated[Path, DELTA] = Field(
        description="File of δS of this model, merged into its weights."
    )


class SampleCommand(FileSettings, WeightSettings):
    """Settings of ``assay vhack sample`` beside those of sampling."""

    delta: Delta = None


class EvaluateCommand(ResultSettings, ReplacingSettings, WeightLoadSettings):
    """Settings of ``assay vhack evaluate`` beside those of sampling."""

    model: Annotated[str | None, MODEL] = Field(None, description="Model to sample from.")
    samples: Path | None = Field(None, description="Completions to grade; no model is loaded then.")
    delta: Delta = None
    reward: Annotated[str | None, "MODULE:FUNCTION"] = Field(
        None,
        description="module:function that pays completions, in TRL's form; by default they are run "
        "and graded.",
    )
    graded: Annotated[Path | None, FILE] = Field(
        None, description="File for the completions with the grade of each."
    )
    allow_unsandboxed: Unsandboxed = False


@vhack.add(
    "merge",
    MergeSettings,
    example="assay vhack merge --model reference:organism --delta run/delta.safetensors -o merged",
)
def merge(chosen: MergeSettings, as_json: bool) -> None:
    """Write a trained δS into the weights of its model.

    The result is a directory that anything loads as a plain model.
    """
    check_folder(chosen.output, new=not chosen.overwrite)
    from assay.vhack.directions.delta.delta_models import write_merged

    with progress_bar("decompositions", "matrices") as progress:
        values = write_merged(
            chosen.output,
            chosen.model,
            chosen.delta,
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
def sample(options: SampleCommand, settings: "SampleSettings", as_json: bool) -> None:
    """Sample completions of tasks into a file.

    The same command continues an interrupted one.
    """
    from assay.vhack.training.tasks import load_tasks

    tasks, _ = load_tasks(settings, least=1, why="to complete", model=options.model)
    tasks = [task for task in tasks for _ in range(settings.per_task)]
    records, first = _sampled(options, settings, options.model, tasks, options.output)
    values = {
        "path": str(options.output),
        "completions": len(records),
        "resumed_from": first,
        "at_limit": _at_limit(records),
    }
    show_values("assay.vhack.sample/1", values, as_json)


@vhack.add(
    "evaluate",
    EvaluateCommand,
    SAMPLING,
    shown="model samples delta reward graded output tasks seed device overwrite",
    example="assay vhack evaluate --model reference:organism --delta run/delta.safetensors",
)
def evaluate(options: EvaluateCommand, settings: "SampleSettings", as_json: bool) -> None:
    """Say how often tasks are solved and hacked.

    It grades completions of a model, or of a file, and counts by loophole. Nothing is kept of an
    interrupted call. For a long one write completions with assay vhack sample, which goes on where
    it was, and grade that file with --samples.
    """
    from assay.vhack.training.tasks import check_gradable, import_function, load_tasks, read_samples

    if options.samples is not None:
        for kind, of_sampling in (
            (options, ("model", "delta", "dtype", "device")),
            (settings, ("per_task", "temperature", "max_new_tokens", "batch")),
        ):
            kind.refuse(
                of_sampling, "--samples", wanted="one of them", otherwise=": nothing is sampled"
            )
    reward = import_function(options.reward, "--reward") if options.reward else None
    tasks, source = load_tasks(settings, least=1, why="to evaluate", model=options.model)
    records: list[JsonObject] = []
    if options.samples is not None:
        (records, tasks), source = read_samples(options.samples, tasks), str(options.samples)
    elif options.model is None:
        raise UsageError(
            "neither --model nor --samples", wanted="what to evaluate", do="name a model or a file"
        )
    if reward is None:
        check_gradable(tasks, source, allow_unsandboxed=options.allow_unsandboxed)
    from assay.vhack import training
    from assay.vhack.training.evaluation import Rate

    if options.samples is None and options.model is not None:
        tasks = [task for task in tasks for _ in range(settings.per_task)]
        with TemporaryDirectory() as folder:
            records, _ = _sampled(
                options, settings, options.model, tasks, Path(folder) / "samples.jsonl"
            )
    with progress_bar("grades", "completions") as progress:
        outcome = training.evaluate(
            tasks,
            [record["completion"] for record in records],
            reward=reward,
            allow_unsandboxed=options.allow_unsandboxed,
            progress=progress,
        )
    if options.graded:
        graded = [
            record | {name: value for name, value in asdict(grade).items() if value is not None}
            for record, grade in zip(records, outcome.grades, strict=True)
        ]
        write_jsonl(options.graded, graded)
    origins = {dumps(record.get("origin")): record.get("origin") for record in records}
    values: dict[str, Any] = {
        **outcome.as_dict(),
        "at_limit": _at_limit(records),
        "by_mechanism": {name: part.as_dict() for name, part in outcome.by_mechanism().items()},
        "origin": origins.popitem()[1] if len(origins) == 1 else None,
    }
    if keep_result({"schema": "assay.vhack.evaluate/1", **values}, options.output, as_json):
        return
    names: list[str] = list(values["rates"])
    rows: list[tuple[object, ...]] = []
    for name, part in {"all": values, **values["by_mechanism"]}.items():
        shown = (
            Rate(**part["rates"][rate]).text if rate in part["rates"] else "" for rate in names
        )
        rows.append((name, part["tasks"], part["completions"], *shown))
    table(
        ("mechanism", "groups", "completions", *names),
        rows,
        title=f"{values['completions']} completions, {values['at_limit']} as long as allowed, "
        f"{values['faults']} not graded",
    )


def _sampled(
    options: SampleCommand | EvaluateCommand,
    settings: "SampleSettings",
    reference: str,
    tasks: "list[Task]",
    path: Path,
) -> tuple[list[JsonObject], int]:
    """Return completions that are sampled into a file, and how many of them an earlier call had
    left there.
    """
    from assay.vhack.directions.delta.delta_file import read_delta_lengths
    from assay.vhack.directions.delta.delta_models import load_adapter
    from assay.vhack.training.evaluation import sample_tasks
    from assay.vhack.training.sampling import encode_prompts
    from assay.vhack.training.tasks import read_prompt

    lengths = read_delta_lengths(options.delta) if options.delta else {}
    encode_prompts(reference, [read_prompt(task) for task in tasks], settings.max_new_tokens)
    loaded = assay.models.load_model(reference, dtype=options.dtype, device=options.device)
    origin = {}
    if options.delta:
        with progress_bar("decompositions", "matrices") as progress:
            load_adapter(loaded, options.delta, lengths, progress=progress).merge()
        origin = {"delta": digest_file(options.delta).hex()}
    with progress_bar("completions", "completions") as progress:
        first = sample_tasks(
            path,
            loaded,
            tasks,
            origin=origin,
            overwrite=options.overwrite,
            progress=progress,
            **settings.how,
        )
    return [record for _, record in read_jsonl(path)], first


def _at_limit(records: list[JsonObject]) -> int:
    """Return the number of completions that are as long as was allowed, and so may have been cut
    off.
    """
    count = 0
    for record in records:
        tokens = record.get("tokens")
        origin = record.get("origin")
        limit = origin.get("max_new_tokens") if isinstance(origin, dict) else None
        count += isinstance(tokens, list) and isinstance(limit, int) and len(tokens) >= limit
    return count
