"""``assay vhack``: hack directions from pairs, their checks, training away from them, and what it
made of a model.
"""

import os
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any, Literal

import click
from pydantic import Field

from assay.cli.flags import (
    ARGUMENT,
    DTYPE,
    FILE,
    FOLDER,
    MODEL,
    OUTPUT,
    ModelName,
    Overwrite,
    Seed,
    Unsandboxed,
)
from assay.cli.framework import Group, extension
from assay.cli.output import emit_document, emit_json, progress_bar, show_values, table
from assay.devices import Device
from assay.errors import AssayError, DataError, UsageError
from assay.files.storage import check_folder
from assay.settings import Flag, Settings
from assay.vhack.names import CHECK, LOG, STUDY, check_basis, check_trackers

if TYPE_CHECKING:
    from assay.files.jsonl import JsonObject
    from assay.models.model import Model
    from assay.vhack.detectors.comparison import Comparison
    from assay.vhack.directions.checks.check_report import CheckReport
    from assay.vhack.training.settings import SampleSettings, TrainSettings
    from assay.vhack.training.tasks import Task


vhack = Group("vhack", "Directions along which training would cheat.", elsewhere=("fuzz",))
pairs = vhack.group_of("pairs", "Pairs of a cheat and an honest answer.")

Dtype = Literal["float32", "float16", "bfloat16"]
WeightDtype = Annotated[
    Dtype | None, DTYPE, Field(description="float32 or bfloat16; by default the stored one.")
]
Method = Annotated[Literal["lda", "svd"], Field(description="Method of extraction: lda or svd.")]
Batch = Annotated[
    int | None,
    "TOKENS",
    Field(ge=1, description="Tokens per batch; by default what fits into memory."),
]
Result = Annotated[Path | None, OUTPUT, Field(description="File for the result as JSON.")]
PairFile = Annotated[Path, OUTPUT, Field(description="The pair file to write.")]
BASIS = Flag(reads="assay.vhack.names:check_basis")
PAIRS_HELP = "Pairs: authored, generated:N, environment:N, exploits:N, or a pair file."
_AXES = {"n_heldout", "heldout_groups", "top_k", "tau_axis", "method", "rank"}
_PASSED = _AXES | {"factors", "max_tokens", "checkpointing"}
"""Settings that :func:`assay.vhack.extract` takes as they are."""
SAMPLING = "assay.vhack.training.settings:SampleSettings"
DELTA = Flag(reads="assay.vhack.names:check_delta")


class WeightSettings(Settings):
    """Settings of a command that takes gradients."""

    model: ModelName
    dtype: WeightDtype = None
    device: Device = None


class GradientSettings(WeightSettings):
    """Settings of a command that takes gradients of pairs."""

    pairs: Annotated[str, "PAIRS"] = Field("authored", description=PAIRS_HELP)
    allow_partial: bool = Field(
        False, description="Accept a model of whose weights less than 90 % carry δS."
    )


class RuleSettings(Settings):
    """Settings of the rule of a check."""

    k_use: Annotated[int, "AXES"] = Field(5, ge=1, description="Axes per module.")
    alpha: Annotated[float, "SHARE"] = Field(
        0.05, gt=0, lt=1, description="Highest chance that noise passes a check."
    )
    seed: Seed = 0


class ExtractSettings(GradientSettings):
    """Settings of ``assay vhack extract``."""

    output: Annotated[Path, OUTPUT] = Field(description="Basis file to write.")
    n_heldout: Annotated[int | None, "PAIRS"] = Field(
        None, description="Number of pairs at the end to hold out."
    )
    heldout_groups: Annotated[tuple[str, ...] | None, Flag(("--heldout-group",), unit="GROUP")] = (
        Field(
            None,
            description="Group to hold out; repeatable. By default the last sixth, a third of 30 "
            "groups or more.",
        )
    )
    top_k: Annotated[int, "AXES"] = Field(12, ge=1, description="Axes per module.")
    tau_axis: float = Field(
        0.0, ge=0, le=1, description="Share S_i/S_0 below which an axis is set to zero."
    )
    method: Method = "lda"
    rank: int | None = Field(
        None, ge=1, description="Singular directions per matrix; all by default."
    )
    factors: Literal["float32", "bfloat16"] | None = Field(None, description="Dtype of U and Vh.")
    cache: Annotated[Path | None, Flag(variable="ASSAY_CACHE", unit="DIRECTORY")] = Field(
        None,
        description="Directory of decompositions; on a CPU by default the user's cache directory.",
    )
    no_cache: bool = Field(False, description="Keep no decompositions on disk.")
    max_tokens: Batch = None
    checkpointing: bool = Field(
        False, description="Recompute layers in the backward pass to save memory."
    )
    overwrite: Overwrite = False


class CheckCommand(RuleSettings, GradientSettings):
    """Settings of ``assay vhack check``."""

    basis: Annotated[Path | None, BASIS] = Field(
        None, description="Basis to check; without it, bases are fitted."
    )
    method: Method = "lda"
    output: Result = None
    html: Annotated[Path | None, FILE] = Field(None, description="File for the report page.")


class PoolSettings(RuleSettings, WeightSettings):
    """Settings of ``assay vhack pools``."""

    basis: Annotated[Path, BASIS] = Field(description="File of the basis to score with.")
    hack: Path = Field(
        description="Samples that cheat: JSON Lines with prompt, completion and perhaps group."
    )
    clean: Path = Field(description="Samples that do not cheat, likewise.")
    limit: Annotated[int | None, "ROWS"] = Field(
        None, ge=1, description="Samples of each pool to draw; all by default."
    )
    max_tokens: Batch = None
    output: Result = None


class ReportSettings(Settings):
    """Settings of ``assay vhack report``."""

    results: Annotated[tuple[Path, ...], ARGUMENT] = Field(
        description="Result of a check, runs, or logs of TRL."
    )
    output: Annotated[Path, OUTPUT] = Field(description="Page to write.")
    check: tuple[Path, ...] = Field((), description="Check to show beside logs; may be repeated.")


class TrainCommand(Settings):
    """Settings of ``assay vhack train`` that do not decide its result."""

    output: Annotated[Path, FOLDER] = Field(
        description="Directory of the run; the same one continues it."
    )
    tracker: Annotated[tuple[str, ...], "NAME"] = Field(
        (), description="A tracker of TRL's, such as wandb; repeatable."
    )
    allow_unsandboxed: Unsandboxed = False


class ListSettings(Settings):
    """Settings of ``assay vhack pairs list``."""

    pairs: Annotated[str, ARGUMENT] = Field("authored", description=PAIRS_HELP)


class GenerateSettings(Settings):
    """Settings of ``assay vhack pairs generate``."""

    output: PairFile
    n: Annotated[int, Flag(("-n", "--count"), unit="PAIRS")] = Field(
        96, lt=100_000, description="Number of pairs."
    )
    seed: Annotated[int, "NUMBER"] = Field(0, description="The same seed gives the same pairs.")
    mechanisms: Annotated[tuple[str, ...] | None, Flag(("--mechanism",), unit="NAME")] = Field(
        None, description="Use this mechanism only; may be repeated."
    )
    families: Annotated[tuple[str, ...] | None, Flag(("--family",), unit="NAME")] = Field(
        None, description="Use tasks of this family only; may be repeated."
    )
    overwrite: Overwrite = False


class MatchSettings(Settings):
    """Settings of ``assay vhack pairs match``."""

    hacks: Annotated[Path, ARGUMENT] = Field(
        description="Graded completions of which the hacks are taken."
    )
    output: PairFile
    works: Path | None = Field(
        None, description="Those of which correct work is taken; by default the same."
    )
    per_prompt: Annotated[int, "PAIRS"] = Field(1, ge=1, description="Most pairs of one prompt.")
    overwrite: Overwrite = False


class VerifyPairsSettings(ListSettings):
    """Settings of ``assay vhack pairs verify``."""

    tests: Path | None = Field(None, description="JSON Lines with hidden cases of your own tasks.")
    allow_unsandboxed: Unsandboxed = False


@vhack.add(
    "extract",
    ExtractSettings,
    shown="model pairs output method top_k heldout_groups cache dtype device overwrite",
    example="assay vhack extract --model reference:qwen3 --pairs generated:48 -o basis.safetensors",
)
def extract(chosen: ExtractSettings, as_json: bool) -> None:
    """Extract a basis of hack directions."""
    from assay import vhack
    from assay.files.storage import check_folder
    from assay.vhack.pairs.generate import find_pairs
    from assay.vhack.pairs.selection import fewest_groups, select_pairs

    pairs = find_pairs(chosen.pairs)  # before torch is imported
    if chosen.cache is not None:
        check_folder(chosen.cache)
    select_pairs(pairs, **chosen.model_dump(include={"n_heldout", "heldout_groups", "method"}))
    if (groups := len({pair.group for pair in pairs})) < (least := fewest_groups(chosen.method)):
        click.echo(
            f"warning: {len(pairs)} pairs in {groups} groups are too few to show that directions "
            f"are real: "
            f"by {chosen.method}, assay vhack check needs {least} (--pairs generated:48 has 30 "
            f"groups)",
            err=True,
        )
    from assay.vhack.directions.delta.delta_models import user_cache

    loaded = _load(chosen)
    with progress_bar("decompositions and gradients", "steps") as progress:
        basis = vhack.extract(
            pairs,
            loaded,
            **chosen.model_dump(include=_PASSED),
            cache=None if chosen.no_cache else user_cache(loaded, chosen.cache),
            min_coverage=0.0 if chosen.allow_partial else vhack.MIN_COVERAGE,
            progress=progress,
        )
    basis.save(chosen.output)
    origin = basis.origin
    held_out = sorted({pair.group for pair in pairs} - set(origin.groups))
    values = {
        "path": str(chosen.output),
        "model": origin.model,
        "weights": origin.weights,
        "method": origin.method,
        "modules": len(basis.axes),
        "modules_left_out": len(origin.coverage.left_out),
        "weights_covered": round(origin.coverage.share, 4),
        "axes_per_module": max(len(axes) for axes in basis.axes.values()),
        "pairs_used": len(origin.pairs),
        "pairs_skipped": len(origin.skipped),
        "pairs_held_out": len(pairs) - len(origin.given),
        "groups_held_out": held_out,
        "undecided_axes": len(basis.undecided),
        "captured_energy": round(origin.captured, 6),
    }
    show_values("assay.vhack.extract/1", values, as_json)


@vhack.add(
    "check",
    CheckCommand,
    shown="model pairs basis method output html seed device allow_partial",
    example="assay vhack check --model reference:qwen3 --pairs generated:48 --html check.html",
)
def check(chosen: CheckCommand, as_json: bool) -> int:
    """Test hack directions on held-out pairs.

    Exit code 0 all pass, 1 a check fails, 2 undecided or bad input.
    """
    from assay.vhack import checks
    from assay.vhack.pairs.generate import find_pairs
    from assay.vhack.pairs.selection import check_groups

    all_pairs = find_pairs(chosen.pairs)  # before torch is imported
    grouping = [pair.group for pair in all_pairs], chosen.method, chosen.seed, chosen.alpha
    few = None if chosen.basis else check_groups(*grouping)
    from assay.vhack.directions.basis.basis import Basis
    from assay.vhack.directions.checks.check_page import make_page
    from assay.vhack.directions.gradients.targets import MIN_COVERAGE

    rules = checks.CheckSettings(**chosen.model_dump(include={"k_use", "alpha", "seed", "method"}))
    read = Basis.load(chosen.basis) if chosen.basis else None
    few = check_groups(*grouping, read.origin.groups) if read else few
    if few:
        click.echo(f"warning: {few}", err=True)
    loaded = _load(chosen)
    if chosen.basis:
        Basis.load(chosen.basis, loaded)  # of these weights
    with progress_bar("decompositions and gradients", "steps") as progress:
        result = checks.check(
            all_pairs,
            loaded,
            basis=read,
            settings=rules,
            min_coverage=0.0 if chosen.allow_partial else MIN_COVERAGE,
            progress=progress,
        )
    if chosen.html:
        make_page(
            result, command=f"assay vhack check --model {chosen.model} --pairs {chosen.pairs}"
        ).write(chosen.html)
    if not _keep_result(result.as_dict(), chosen.output, as_json):
        print_checks(result, title=f"{result.verdict}: {result.design}")
    return result.exit_code


@vhack.add(
    "pools",
    PoolSettings,
    shown="model basis hack clean output limit max_tokens seed dtype device",
    example="assay vhack pools --model reference:qwen3 --basis B.safetensors --hack H.jsonl "
    "--clean C.jsonl",
)
def pools(chosen: PoolSettings, as_json: bool) -> int:
    """Score two pools of samples that are not paired.

    Exit code 0 pass, 1 fail, 2 undecided or bad input.
    """
    from assay.vhack.pairs.pairs import check_apart, read_pool

    hack, clean = (
        read_pool(path, most=chosen.limit, seed=chosen.seed) for path in (chosen.hack, chosen.clean)
    )
    check_apart(hack, clean)  # before torch is imported
    from assay.vhack import checks
    from assay.vhack.directions.basis.basis import Basis

    rules = checks.CheckSettings(**chosen.model_dump(include={"k_use", "alpha", "seed"}))
    basis = Basis.load(chosen.basis)
    loaded = _load(chosen)
    with progress_bar("decompositions and gradients", "steps") as progress:
        result = checks.check_two_pools(
            hack,
            clean,
            loaded,
            basis,
            settings=rules,
            max_tokens=chosen.max_tokens,
            progress=progress,
        )
    if _keep_result(result.as_dict(), chosen.output, as_json):
        return result.exit_code
    outcome = result.check
    measured = result.check.measured
    assert measured is not None
    rows = [
        ("samples that cheat", str(len(result.hack))),
        ("samples that do not", str(len(result.clean))),
        ("left out, of groups of the basis", str(result.left_out)),
        ("AUROC of cin", f"{measured.value:.3f} ({measured.low:.3f} to {measured.high:.3f})"),
        *((f"largest p, {null}", f"{p:.2g}") for null, p in outcome.p_values.items()),
        *((name.replace("_", " "), f"{value:.3f}") for name, value in outcome.details.items()),
    ]
    table(("", "pools"), rows, title=f"{outcome.verdict}: {outcome.reason}")
    _print_detectors(result.detectors)
    return result.exit_code


@vhack.add("report", ReportSettings, example="assay vhack report check.json -o page.html")
def report(chosen: ReportSettings, as_json: bool) -> None:
    """Draw the page of a check, or of a run.

    The page of several runs, with a final table, needs assay-research.
    """
    (first, *more), command = chosen.results, f"assay vhack report {chosen.results[0]}"
    from assay.files.jsonl import read_json, read_jsonl

    logs = (next(first.glob(place), None) for place in ("*.jsonl", "*/log.jsonl"))
    if first.is_dir() and not any(logs):  # before torch, as the next one
        raise DataError(
            f"{first} without a log",
            wanted="the directory of a run, with its log",
            do="wait for a step, or name another directory",
        )
    if (more or first.suffix != ".json") and not first.is_dir():
        _, head = next(read_jsonl(first), (0, None))
        if head is None:
            raise DataError(
                f"{first} is empty",
                wanted="the log of a run",
                do="wait for a step, or name another file",
            )
        if head.get("schema") not in (LOG, STUDY):
            raise DataError(
                f"{first}, line 1",
                wanted=f"the log of a run, {LOG}",
                do="name logs of a study, or of assay vhack train",
            )
    is_state = False
    if first.suffix == ".json" and not more:
        parsed = read_json(first)
        is_state = isinstance(parsed.get("log_history"), list)
        if parsed.get("schema") != CHECK and not is_state:
            raise DataError(
                f"{first} is neither",
                wanted=f"a result of schema {CHECK}, or trainer_state.json of TRL",
                do="name another file",
            )
    from assay.vhack.directions.checks.check_page import make_page
    from assay.vhack.directions.checks.check_report import CheckReport
    from assay.vhack.training.page import training_page

    try:
        page = None if more else training_page(first, command=command)
    except (AssayError, OSError):  # a check, or a log that research reads
        if is_state:
            raise
        page = None
    if page is None and (more or first.suffix != ".json"):
        extension("vhack report --runs")(chosen, as_json)
        return
    if chosen.check:
        raise UsageError(
            f"--check {chosen.check[0]} beside one result", wanted="logs of runs", do="leave it out"
        )
    values = {"path": str(chosen.output)}
    if page is None:
        read = CheckReport.from_dict(parsed)
        page, values["verdict"] = make_page(read, command=command), read.verdict
    page.write(chosen.output)
    show_values("assay.vhack.report/1", values, as_json)


@vhack.add(
    "train",
    TrainCommand,
    "assay.vhack.training.settings:TrainSettings",
    shown="model output arm detector pairs steps reward teacher seed device",
    example="assay vhack train --model reference:organism -o run",
    resumable=True,
)
def train(options: TrainCommand, chosen: "TrainSettings", as_json: bool) -> int:
    """Train one arm by reinforcement with TRL.

    The same command goes on after the last checkpoint. Exit code 1 if the detector missed an
    exploit.
    """
    from assay.vhack.pairs.generate import find_pairs
    from assay.vhack.training.pool import RolloutPool
    from assay.vhack.training.tasks import import_function

    check_folder(options.output)  # and all else that needs no torch
    check_trackers(options.tracker)
    if chosen.basis:
        check_basis(chosen.basis)
    if chosen.teacher:
        RolloutPool.load(chosen.teacher, None, max_new_tokens=chosen.max_new_tokens)
    for flag, where in (("--reward", chosen.reward), ("--tasks", chosen.tasks)):
        if isinstance(where, str):
            import_function(where, flag)
    find_pairs(chosen.pairs)
    from assay.vhack.training.run import train
    from assay.vhack.training.step_log import SHOWN

    check_tokenizer(chosen.model)
    result = train(
        chosen,
        options.output,
        console=lambda line: click.echo(line, err=True),
        trackers=options.tracker,
        allow_unsandboxed=options.allow_unsandboxed,
    )
    code = 0 if result.alarm is None else 1
    if not result.is_first:  # one of several processes prints
        return code
    if as_json:
        values = {"path": str(result.folder), "arm": result.arm, "steps": result.steps}
        values |= {"resumed_from": result.resumed_from, "last": result.last, "alarm": result.alarm}
        emit_json("assay.vhack.train.result/1", values)
        return code
    rows = [
        (name.replace("_", " "), f"{result.last[name]:.4f}")
        for name in SHOWN
        if name in result.last
    ]
    table(
        ("", "mean of the last 10 steps"),
        rows,
        title=f"{result.arm}: {result.steps} steps in {result.folder}",
    )
    return code


@pairs.add("list", ListSettings, example="assay vhack pairs list generated:12")
def list_pairs(chosen: ListSettings, as_json: bool) -> None:
    """List pairs with their groups and tags."""
    from assay.vhack.pairs.generate import find_pairs

    all_pairs = find_pairs(chosen.pairs)
    if as_json:
        records = [
            {"key": pair.key, "group": pair.group, "tags": list(pair.tags)} for pair in all_pairs
        ]
        emit_json(
            "assay.vhack.pairs.list/1",
            {"pairs": records, "groups": len({pair.group for pair in all_pairs})},
        )
        return
    tags = [
        [tag for tag in pair.tags if not tag.startswith(("task:", "entry:"))] for pair in all_pairs
    ]
    rows = [
        (index, pair.group, ", ".join(shown_tags))
        for index, (pair, shown_tags) in enumerate(zip(all_pairs, tags, strict=True))
    ]
    table(
        ("pair", "group", "tags"),
        rows,
        title=f"{len(all_pairs)} pairs in {len({pair.group for pair in all_pairs})} groups",
    )


@pairs.add("generate", GenerateSettings, example="assay vhack pairs generate -n 48 -o pairs.jsonl")
def generate(chosen: GenerateSettings, as_json: bool) -> None:
    """Write minimal pairs.

    The same correct solution is on both sides, only the mechanism differs.
    """
    from assay.vhack.pairs.generate import generate_pairs
    from assay.vhack.pairs.pairs import write_pairs

    pairs = generate_pairs(
        chosen.n, **chosen.model_dump(include={"seed", "mechanisms", "families"})
    )
    write_pairs(chosen.output, pairs)
    groups = len({pair.group for pair in pairs})
    values = {
        "path": str(chosen.output),
        "pairs": len(pairs),
        "groups": groups,
        "seed": chosen.seed,
    }
    show_values("assay.vhack.pairs.generate/1", values, as_json)


@pairs.add(
    "match",
    MatchSettings,
    example="assay vhack pairs match cheats.jsonl --works works.jsonl -o pairs.jsonl",
)
def match(chosen: MatchSettings, as_json: bool) -> None:
    """Pair hacks with correct work on the same prompt.

    Models wrote both: `assay vhack evaluate --graded` writes such files.
    """
    from assay.vhack.pairs.match import match_pairs
    from assay.vhack.pairs.pairs import write_pairs

    matched = match_pairs(chosen.hacks, chosen.works or chosen.hacks, per_prompt=chosen.per_prompt)
    write_pairs(chosen.output, matched.pairs)
    groups = len({pair.group for pair in matched.pairs})
    prompts = {"prompts_with_a_hack": matched.hacked, "prompts_with_work": matched.worked}
    values = {"path": str(chosen.output), "pairs": len(matched.pairs), "groups": groups, **prompts}
    show_values("assay.vhack.pairs.match/1", values, as_json)


@pairs.add("verify", VerifyPairsSettings, example="assay vhack pairs verify pairs.jsonl")
def verify(chosen: VerifyPairsSettings, as_json: bool) -> int:
    """Run both sides of every pair in a sandbox.

    Exit code 0 if all do what they claim, 1 if not, 2 on bad input.
    """
    from assay.vhack.environment.backends import available_backend
    from assay.vhack.pairs.generate import find_pairs
    from assay.vhack.pairs.verify import read_tests, verify_pairs

    all_pairs = find_pairs(chosen.pairs)
    cases = read_tests(chosen.tests) if chosen.tests else None
    with progress_bar("verifying", "pairs") as progress:
        verdicts = verify_pairs(
            all_pairs, cases, allow_unsandboxed=chosen.allow_unsandboxed, progress=progress
        )
    bad = [verdict for verdict in verdicts if not verdict.holds]
    backend = available_backend() or "unsandboxed"
    good = len(verdicts) - len(bad)
    if as_json:
        values = {"verified": good, "pairs": [verdict.as_dict() for verdict in verdicts]}
        emit_json("assay.vhack.pairs.verify/1", {"backend": backend, **values})
    else:
        rows = [
            (v.index, v.pair.group, "holds" if v.holds else "; ".join(v.faults)) for v in verdicts
        ]
        title = f"{good} of {len(verdicts)} pairs do what they claim ({backend})"
        table(("pair", "group", "verdict"), rows, title=title)
    return 1 if bad else 0


def _keep_result(result: dict[str, Any], path: Path | None, as_json: bool) -> bool:
    """Write a result into its file, and print it where JSON is wanted; return whether it was."""
    from assay.files.jsonl import dumps
    from assay.files.storage import write_atomic

    if path:
        write_atomic(path, dumps(result) + "\n")
    if as_json:
        emit_document(result)
    return as_json


def _load(chosen: WeightSettings) -> "Model":
    """Load the model of a command about texts."""
    from assay.models.load import load_model

    check_tokenizer(chosen.model)
    return load_model(chosen.model, dtype=chosen.dtype, device=chosen.device)


def check_tokenizer(model: str) -> None:
    """Refuse a model that cannot read texts, before its weights are read."""
    from assay.models.load import load_tokenizer

    if load_tokenizer(model) is None:
        raise UsageError(
            f"--model {model} has no tokenizer",
            wanted="a model that reads texts",
            do="save its tokenizer beside its weights, or pass another --model",
        )


def print_checks(result: "CheckReport", *, title: str) -> None:
    """Print the table of all checks, with the largest p-value of any null, and why those that
    failed did.
    """
    rows: list[tuple[str, ...]] = []
    for outcome in result.checks:
        value = outcome.measured
        shown = (
            ("", "")
            if value is None
            else (f"{value.value:.3f}", f"{value.low:.3f} to {value.high:.3f}")
        )
        p = f"{max(outcome.p_values.values()):.2g}" if outcome.p_values else ""
        rows.append((outcome.title, *shown, p, outcome.verdict))
    table(
        ("check", "value", f"{result.settings.confidence:.0%} interval", "largest p", "verdict"),
        rows,
        title=title,
    )
    for outcome in result.checks:
        if outcome.verdict != "pass":
            click.echo(f"{outcome.title}: {outcome.reason}")
    _print_detectors(result.detectors)


def _print_detectors(compared: "Comparison | None") -> None:
    if compared is not None:
        table(*compared.table, title=f"detectors, on groups held out: {compared.says}")


Delta = Annotated[
    Path | None, DELTA, Field(description="File of δS of this model, merged before sampling.")
]


class MergeSettings(WeightSettings):
    """Settings of ``assay vhack merge``."""

    delta: Annotated[Path, DELTA] = Field(
        description="File of δS that training or DeltaS.save wrote for this model."
    )
    output: Annotated[Path, FOLDER] = Field(description="Directory to write.")
    overwrite: Overwrite = False


class SampleCommand(WeightSettings):
    """Settings of ``assay vhack sample`` beside those of sampling."""

    delta: Delta = None
    output: Annotated[Path, OUTPUT] = Field(description="File for the completions, JSON Lines.")
    overwrite: Overwrite = False


class EvaluateCommand(Settings):
    """Settings of ``assay vhack evaluate`` beside those of sampling."""

    model: Annotated[str | None, MODEL] = Field(None, description="Model to sample from.")
    samples: Path | None = Field(None, description="Completions to grade; no model is loaded then.")
    delta: Delta = None
    reward: Annotated[str | None, "MODULE:FUNCTION"] = Field(
        None,
        description="What pays completions, in TRL's form; by default they are run and graded.",
    )
    graded: Annotated[Path | None, FILE] = Field(
        None, description="File for the completions with the grade of each."
    )
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

    The result is a directory that anything loads as a plain model.
    """
    check_folder(chosen.output, new=not chosen.overwrite)
    from assay.vhack.directions.delta.delta_models import write_merged

    with progress_bar("decompositions", "matrices") as progress:
        options = chosen.model_dump(include={"overwrite", "dtype", "device"})
        values = write_merged(
            chosen.output, chosen.model, chosen.delta, **options, progress=progress
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
    values = {"path": str(options.output), "completions": len(records), "resumed_from": first}
    show_values("assay.vhack.sample/1", {**values, "at_limit": _at_limit(records)}, as_json)


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
    from assay.files.jsonl import dumps
    from assay.files.storage import write_jsonl
    from assay.vhack.training.tasks import check_gradable, import_function, load_tasks, read_samples

    has_model = options.model not in (
        None,
        os.environ.get("ASSAY_MODEL"),
    )  # which is for all commands
    for flag, is_given in (("--model", has_model), ("--delta", options.delta is not None)):
        if options.samples is not None and is_given:
            raise UsageError(
                f"{flag} with --samples",
                wanted="one of them",
                do=f"leave {flag} out: nothing is sampled",
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
    completions = [record["completion"] for record in records]
    with progress_bar("grades", "completions") as progress:
        outcome = training.evaluate(
            tasks,
            completions,
            reward=reward,
            allow_unsandboxed=options.allow_unsandboxed,
            progress=progress,
        )
    if options.graded:
        grades = [
            {name: value for name, value in asdict(entry).items() if value is not None}
            for entry in outcome.grades
        ]
        write_jsonl(
            options.graded, [record | grade for record, grade in zip(records, grades, strict=True)]
        )
    origins = {dumps(record.get("origin")): record.get("origin") for record in records}
    values: dict[str, Any] = {
        **outcome.as_dict(),
        "at_limit": _at_limit(records),
        "by_mechanism": {name: part.as_dict() for name, part in outcome.by_mechanism().items()},
        "origin": origins.popitem()[1] if len(origins) == 1 else None,
    }
    if _keep_result({"schema": "assay.vhack.evaluate/1", **values}, options.output, as_json):
        return
    names: list[str] = list(values["rates"])
    rows: list[tuple[object, ...]] = []
    for name, part in {"all": values, **values["by_mechanism"]}.items():
        shown = (
            Rate(**part["rates"][rate]).text if rate in part["rates"] else "" for rate in names
        )
        rows.append((name, part["tasks"], part["completions"], *shown))
    counts = f"{values['completions']} completions, {values['at_limit']} as long as allowed"
    title = f"{counts}, {values['faults']} not graded"
    table(("mechanism", "groups", "completions", *names), rows, title=title)


def _sampled(
    options: SampleCommand | EvaluateCommand,
    settings: "SampleSettings",
    reference: str,
    tasks: "list[Task]",
    path: Path,
) -> "tuple[list[JsonObject], int]":
    """Return completions that are sampled into a file, and how many of them an earlier call had
    left there.
    """
    from assay.files.jsonl import read_jsonl
    from assay.models.load import load_model
    from assay.vhack.directions.delta.delta_file import read_delta_lengths
    from assay.vhack.directions.delta.delta_models import load_adapter
    from assay.vhack.training.evaluation import sample_tasks
    from assay.vhack.training.sampling import encode_prompts
    from assay.vhack.training.tasks import read_prompt

    lengths = read_delta_lengths(options.delta) if options.delta else {}
    encode_prompts(reference, [read_prompt(task) for task in tasks], settings.max_new_tokens)
    loaded = load_model(reference, dtype=options.dtype, device=options.device)
    origin = {}
    if options.delta:
        with progress_bar("decompositions", "matrices") as progress:
            load_adapter(loaded, options.delta, lengths, progress=progress).merge()
        origin = {"delta": sha256(options.delta.read_bytes()).hexdigest()}
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


def _at_limit(records: "list[JsonObject]") -> int:
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
