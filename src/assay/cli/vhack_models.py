"""``assay vhack merge``, ``sample`` and ``evaluate``: what a trained δS has made of a model."""

import os
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import typer

from assay.cli.commands import App, Resumable
from assay.cli.output import JsonFlag, emit_json, progress_bar, show_values, table
from assay.cli.settings import settings
from assay.errors import DataError, UsageError

if TYPE_CHECKING:
    from assay.cli.vhack_settings import EvaluateCommand, MergeCommand, SampleCommand
    from assay.files.jsonl import JsonObject
    from assay.models.load import Model
    from assay.vhack.delta.delta import DeltaS
    from assay.vhack.training.own import Task


_EVALUATE = "assay.vhack.evaluate/1"


def add_to(app: App) -> None:
    """Add the commands to ``assay vhack``."""
    merged = "assay vhack merge --model reference:organism --delta run/delta.safetensors -o merged"
    app.command("merge", epilog=f"Example: {merged}")(merge)
    sampled = "assay vhack sample --model reference:organism -o samples.jsonl"
    app.command("sample", cls=Resumable, epilog=f"Example: {sampled}")(sample)
    evaluated = "assay vhack evaluate --model reference:organism --delta run/delta.safetensors"
    app.command("evaluate", epilog=f"Example: {evaluated}")(evaluate)


@settings("assay.cli.vhack_settings:MergeCommand")
def merge(chosen: "MergeCommand", as_json: JsonFlag = False) -> None:
    """Write a trained δS into the weights of its model, or as LoRA, for anything that loads such a directory."""
    from assay.files.storage import storage_error
    from assay.models.load import load_model
    from assay.streams.backends import dtype_name
    from assay.vhack.delta.file import delta_lengths

    if chosen.output.exists() and not (
        chosen.output.is_dir() and (chosen.overwrite or not any(chosen.output.iterdir()))
    ):
        raise UsageError(
            f"{chosen.output}, which exists", wanted="a new or empty directory", do="choose another, or --overwrite"
        )
    lengths = delta_lengths(chosen.delta)
    loaded = load_model(chosen.model, dtype=chosen.dtype, device=chosen.device)
    adapter = _adapted(loaded, chosen.delta, lengths)
    values = {"path": str(chosen.output), "model": loaded.reference, "modules": len(lengths)}
    try:
        if chosen.lora is not None:
            made = adapter.save_lora(chosen.output, chosen.lora)
            form = {"form": "lora", "rank": made.rank, "relative_error": made.error}
            values |= {**form, "worst_module": made.worst, "worst_error": made.errors[made.worst]}
        else:
            adapter.merge().save_pretrained(chosen.output)
            values |= {"form": "merged", "dtype": dtype_name(loaded.dtype)}
        if loaded.tokenizer is not None:
            loaded.tokenizer.save_pretrained(chosen.output)
    except OSError as error:
        raise storage_error(chosen.output, error) from error
    show_values("assay.vhack.merge/1", values, as_json)


@settings("assay.cli.vhack_settings:SampleCommand")
def sample(chosen: "SampleCommand", as_json: JsonFlag = False) -> None:
    """Sample completions of tasks from a model into a file. The same command continues an interrupted one."""
    from assay.files.storage import check_new_file
    from assay.vhack.training.own import tasks_of

    check_new_file(chosen.output, overwrite=chosen.overwrite)
    tasks, _ = tasks_of(chosen, least=1, why="to complete")
    tasks = [task for task in tasks for _ in range(chosen.per_task)]
    records, first = _sampled(chosen, chosen.model, tasks, chosen.output)
    values = {"path": str(chosen.output), "completions": len(records), "resumed_from": first}
    show_values("assay.vhack.sample/1", {**values, "at_limit": _at_limit(records)}, as_json)


@settings("assay.cli.vhack_settings:EvaluateCommand")
def evaluate(chosen: "EvaluateCommand", context: typer.Context, as_json: JsonFlag = False) -> None:
    """Say how often a model, or a file of completions, solves its tasks and how often it hacks, by loophole.

    Nothing is kept of an interrupted call. For a long one write completions with assay vhack sample, which goes on
    where it was, and grade that file with --samples.
    """
    from assay.files.jsonl import dumps
    from assay.files.storage import check_new_file, write_atomic, write_jsonl
    from assay.vhack import training
    from assay.vhack.training.own import check_gradable, named_function, tasks_of
    from assay.vhack.training.samples import read_samples

    if chosen.samples is None and chosen.model is None:
        raise UsageError("neither --model nor --samples", wanted="what to evaluate", do="name a model or a file")
    given = context.get_parameter_source("model")
    has_model = given is not None and given.name == "COMMANDLINE"  # ASSAY_MODEL is for all commands
    for flag, is_given in (("--model", has_model), ("--delta", chosen.delta is not None)):
        if chosen.samples is not None and is_given:
            raise UsageError(f"{flag} with --samples", wanted="one of them", do=f"leave {flag} out: nothing is sampled")
    for path in filter(None, (chosen.output, chosen.graded)):
        check_new_file(path, overwrite=chosen.overwrite)
    reward = named_function(chosen.reward, "--reward") if chosen.reward else None
    tasks, source = tasks_of(chosen, least=1, why="to evaluate")
    records: list[JsonObject] = []
    if chosen.samples is not None:
        (records, tasks), source = read_samples(chosen.samples, tasks), str(chosen.samples)
    if reward is None:
        check_gradable(tasks, source, allow_unsandboxed=chosen.allow_unsandboxed)
    if chosen.samples is None:
        assert chosen.model is not None
        tasks = [task for task in tasks for _ in range(chosen.per_task)]
        with TemporaryDirectory() as folder:
            records, _ = _sampled(chosen, chosen.model, tasks, Path(folder) / "samples.jsonl")
    completions = [record["completion"] for record in records]
    with progress_bar("grades", "completions") as progress:
        found = training.evaluate(
            tasks, completions, reward=reward, allow_unsandboxed=chosen.allow_unsandboxed, progress=progress
        )
    if chosen.graded:
        grades = [{name: value for name, value in asdict(one).items() if value is not None} for one in found.grades]
        write_jsonl(chosen.graded, [record | grade for record, grade in zip(records, grades, strict=True)])
    origins = {dumps(record.get("origin")): record.get("origin") for record in records}
    values = {
        **found.as_dict(),
        "at_limit": _at_limit(records),
        "by_mechanism": {name: part.as_dict() for name, part in found.by_mechanism().items()},
        "origin": origins.popitem()[1] if len(origins) == 1 else None,
    }
    if chosen.output:
        write_atomic(chosen.output, dumps({"schema": _EVALUATE, **values}) + "\n")
    if as_json:
        emit_json(_EVALUATE, values)
    else:
        _print_rates(values)


def cache_of(model: "Model", asked: Path | None = None) -> Path | None:
    """Return the directory of decompositions that was asked for, or on a CPU the user's, if it can be written."""
    if asked is not None or model.device.type != "cpu":
        return asked
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "assay"
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # a user without a home is a RuntimeError
        return None
    return folder if os.access(folder, os.W_OK) else None


def _adapted(loaded: "Model", path: Path, lengths: dict[str, int]) -> "DeltaS":
    """Return an adapter of the model with the δS of a file, which has so many coordinates of each module."""
    from assay.vhack.delta.delta import DeltaS
    from assay.vhack.gradients.svd import weight_svd
    from assay.vhack.gradients.targets import target_modules

    modules = target_modules(loaded)
    if modules.keys() != lengths.keys():
        raise DataError(f"{path} has δS of other modules", wanted="those of this model", do="correct --model")
    is_cut = any(length < min(modules[name].weight.shape) for name, length in lengths.items())
    with progress_bar("decompositions", "matrices") as progress:
        rank = max(lengths.values()) if is_cut else None
        svd = weight_svd(loaded, rank=rank, cache=cache_of(loaded), min_coverage=0.0, progress=progress)
    adapter = DeltaS(loaded, svd)
    adapter.load(path)
    return adapter


def _sampled(
    chosen: "SampleCommand | EvaluateCommand", reference: str, tasks: "list[Task]", path: Path
) -> "tuple[list[JsonObject], int]":
    """Return completions that are sampled into a file, and how many of them an earlier call had left there."""
    from assay.files.jsonl import read_jsonl
    from assay.models.load import load_model
    from assay.vhack.delta.file import delta_lengths
    from assay.vhack.training.own import prompt_of
    from assay.vhack.training.pool import check_prompts
    from assay.vhack.training.samples import sample_tasks

    lengths = delta_lengths(chosen.delta) if chosen.delta else {}
    check_prompts(reference, [prompt_of(task) for task in tasks], chosen.max_new_tokens)
    loaded, origin = load_model(reference, dtype=chosen.dtype, device=chosen.device), {}
    if chosen.delta:
        _adapted(loaded, chosen.delta, lengths).merge()
        origin = {"delta": sha256(chosen.delta.read_bytes()).hexdigest()}
    with progress_bar("completions", "completions") as progress:
        first = sample_tasks(
            path, loaded, tasks, origin=origin, overwrite=chosen.overwrite, progress=progress, **chosen.how
        )
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
    from assay.vhack.training.evaluate import Rate

    names = list(values["rates"])
    rows = []
    for name, part in {"all": values, **values["by_mechanism"]}.items():
        shown = (Rate(**part["rates"][rate]).text if rate in part["rates"] else "" for rate in names)
        rows.append((name, part["tasks"], part["completions"], *shown))
    title = (
        f"{values['completions']} completions, {values['at_limit']} as long as allowed, {values['faults']} not graded"
    )
    table(("mechanism", "tasks", "completions", *names), rows, title=title)
