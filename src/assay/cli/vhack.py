"""``assay vhack``: extract hack directions from pairs, check them, and train away from them."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import click
from pydantic import Field

import assay.vhack.pairs
from assay.cli.flags import (
    ARGUMENT,
    DTYPE,
    FILE,
    FileSettings,
    FolderSettings,
    LoadSettings,
    ModelSettings,
    NewFileSettings,
    ResultSettings,
    Seed,
    Unsandboxed,
)
from assay.errors import DataError, UsageError
from assay.files.jsonl import JsonObject, dumps, read_json, read_jsonl
from assay.files.storage import check_folder, write_atomic
from assay.framework.groups import Group, extension
from assay.framework.output import emit_document, progress_bar, say, show_tables, show_values, table
from assay.settings import Flag, Settings
from assay.vhack.names import CHECK, LOG, STUDY, check_basis, check_trackers

if TYPE_CHECKING:
    from assay.stats.bootstrap import BootstrapInterval
    from assay.vhack.detectors.comparison import Comparison
    from assay.vhack.training.settings import TrainSettings


vhack = Group("vhack", "Directions along which training would cheat.", elsewhere=("fuzz",))
pairs = vhack.group_of("pairs", "Pairs of a cheat and an honest answer.")

Method = Annotated[Literal["lda", "svd"], Field(description="Method of extraction: lda or svd.")]
Batch = Annotated[
    int | None,
    "TOKENS",
    Field(ge=1, description="Tokens per batch; by default what fits into memory."),
]
BASIS = Flag(reads="assay.vhack.names:check_basis")
PAIRS_HELP = "Pairs: authored, generated:N, environment:N, exploits:N, or a pair file."
# Settings that assay.vhack.extract takes as they are.
_PASSED = {
    *("n_heldout", "heldout_groups", "top_k", "tau_axis", "method"),
    *("rank", "factors", "max_tokens", "checkpointing"),
}


class WeightLoadSettings(LoadSettings):
    """How a model is loaded whose weights have 16 bits or more."""

    dtype: Annotated[Literal["float32", "float16", "bfloat16"] | None, DTYPE] = Field(
        None, description="float32 or bfloat16; by default the stored one."
    )


class WeightSettings(WeightLoadSettings, ModelSettings):
    """Settings of a command that takes gradients."""


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


class ExtractSettings(FileSettings, GradientSettings):
    """Settings of ``assay vhack extract``."""

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
    cache: Annotated[Path | None, Flag(variable="ASSAY_CACHE")] = Field(
        None,
        description="Directory of decompositions; on a CPU by default the user's cache directory.",
    )
    no_cache: bool = Field(False, description="Keep no decompositions on disk.")
    max_tokens: Batch = None
    checkpointing: bool = Field(
        False, description="Recompute layers in the backward pass to save memory."
    )


class CheckCommand(ResultSettings, RuleSettings, GradientSettings):
    """Settings of ``assay vhack check``."""

    basis: Annotated[Path | None, BASIS] = Field(
        None, description="Basis to check; without it, bases are fitted."
    )
    method: Method = "lda"
    html: Annotated[Path | None, FILE] = Field(None, description="File for the report page.")


class PoolSettings(ResultSettings, RuleSettings, WeightSettings):
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


class ReportSettings(NewFileSettings):
    """Settings of ``assay vhack report``."""

    results: Annotated[tuple[Path, ...], ARGUMENT] = Field(
        description="Result of a check, runs, or logs of TRL."
    )
    check: tuple[Path, ...] = Field((), description="Check to show beside logs; may be repeated.")


class TrainCommand(FolderSettings):
    """Settings of ``assay vhack train`` that do not decide its result."""

    tracker: Annotated[tuple[str, ...], "NAME"] = Field(
        (), description="A tracker of TRL's, such as wandb; repeatable."
    )
    allow_unsandboxed: Unsandboxed = False


@vhack.add(
    "extract",
    ExtractSettings,
    shown="model pairs output method top_k heldout_groups cache dtype device overwrite",
    example="assay vhack extract --model reference:qwen3 --pairs generated:48 -o basis.safetensors",
)
def extract(chosen: ExtractSettings, as_json: bool) -> None:
    """Extract a basis of hack directions."""
    from assay.vhack.pairs.selection import fewest_groups, select_pairs

    pairs = assay.vhack.pairs.find_pairs(chosen.pairs)  # before torch is imported
    if chosen.cache is not None:
        check_folder(chosen.cache)
    select_pairs(pairs, **chosen.model_dump(include={"n_heldout", "heldout_groups", "method"}))
    if (groups := len({pair.group for pair in pairs})) < (least := fewest_groups(chosen.method)):
        say(
            f"warning: {len(pairs)} pairs in {groups} groups are too few to show that directions "
            f"are real: "
            f"by {chosen.method}, assay vhack check needs {least} (--pairs generated:48 has 30 "
            f"groups)"
        )
    from assay.vhack.directions.delta.delta_models import user_cache

    loaded = _load(chosen)
    with progress_bar("decompositions and gradients", "steps") as progress:
        basis = assay.vhack.extract(
            pairs,
            loaded,
            **chosen.model_dump(include=_PASSED),
            cache=None if chosen.no_cache else user_cache(loaded, chosen.cache),
            min_coverage=0.0 if chosen.allow_partial else assay.vhack.MIN_COVERAGE,
            progress=progress,
        )
    basis.save(chosen.output)
    origin = basis.origin
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
        "groups_held_out": sorted({pair.group for pair in pairs} - set(origin.groups)),
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
    from assay.vhack.pairs.selection import check_groups

    all_pairs = assay.vhack.pairs.find_pairs(chosen.pairs)  # before torch is imported
    grouping = [pair.group for pair in all_pairs], chosen.method, chosen.seed, chosen.alpha
    few = None if chosen.basis else check_groups(*grouping)
    from assay.vhack.directions.checks.check_page import make_page

    rules = assay.vhack.checks.CheckSettings(
        **chosen.model_dump(include={"k_use", "alpha", "seed", "method"})
    )
    read = assay.vhack.Basis.load(chosen.basis) if chosen.basis else None
    if few := check_groups(*grouping, read.origin.groups) if read else few:
        say(f"warning: {few}")
    loaded = _load(chosen)
    if chosen.basis:
        assay.vhack.Basis.load(chosen.basis, loaded)  # of these weights
    with progress_bar("decompositions and gradients", "steps") as progress:
        result = assay.vhack.checks.check(
            all_pairs,
            loaded,
            basis=read,
            settings=rules,
            min_coverage=0.0 if chosen.allow_partial else assay.vhack.MIN_COVERAGE,
            progress=progress,
        )
    if chosen.html:
        make_page(
            result, command=f"assay vhack check --model {chosen.model} --pairs {chosen.pairs}"
        ).write(chosen.html)
    if not keep_result(result.as_dict(), chosen.output, as_json):
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

    rules = assay.vhack.checks.CheckSettings(
        **chosen.model_dump(include={"k_use", "alpha", "seed"})
    )
    basis = assay.vhack.Basis.load(chosen.basis)
    loaded = _load(chosen)
    with progress_bar("decompositions and gradients", "steps") as progress:
        result = assay.vhack.checks.check_two_pools(
            hack,
            clean,
            loaded,
            basis,
            settings=rules,
            max_tokens=chosen.max_tokens,
            progress=progress,
        )
    if keep_result(result.as_dict(), chosen.output, as_json):
        return result.exit_code
    outcome = result.check
    rows = [
        ("samples that cheat", str(len(result.hack))),
        ("samples that do not", str(len(result.clean))),
        ("left out, of groups of the basis", str(result.left_out)),
        ("AUROC of cin", "{} ({})".format(*_with_interval(outcome.measured))),
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
    first, *more = chosen.results
    command = f"assay vhack report {first}"
    is_log = bool(more) or first.suffix != ".json"
    # What can be refused before torch is imported.
    head = _read_head(first) if is_log else read_json(first)
    is_check = not is_log and head.get("schema") == CHECK
    if not is_log and not is_check and not isinstance(head.get("log_history"), list):
        raise DataError(
            f"{first} is no check and no log of TRL",
            wanted=f"a result of schema {CHECK}, or trainer_state.json of TRL",
            do="name another file",
        )
    if more or (is_log and head.get("schema") != LOG):
        extension("vhack report --runs")(chosen, as_json)
        return
    from assay.vhack.directions.checks.check_page import make_page
    from assay.vhack.training.page import training_page

    values = {"path": str(chosen.output)}
    if is_check:
        read = assay.vhack.checks.CheckReport.from_dict(head)
        page = make_page(read, command=command)
        values["verdict"] = read.verdict
    else:
        page = training_page(first, command=command)
    if chosen.check:
        raise UsageError(
            f"--check {chosen.check[0]} beside one result", wanted="logs of runs", do="leave it out"
        )
    page.write(chosen.output)
    show_values("assay.vhack.report/1", values, as_json)


def _read_head(path: Path) -> JsonObject:
    """Return the first line of the log of a run; empty for a directory of several runs."""
    if path.is_dir():
        if not any(path.glob("*.jsonl")) and not any(path.glob("*/log.jsonl")):
            raise DataError(
                f"{path} without a log",
                wanted="the directory of a run, with its log",
                do="wait for a step, or name another directory",
            )
        path = path / "log.jsonl"
        if not path.exists():
            return {}
    _, head = next(read_jsonl(path), (0, None))
    if head is None:
        raise DataError(
            f"{path} is empty",
            wanted="the log of a run",
            do="wait for a step, or name another file",
        )
    if head.get("schema") not in (LOG, STUDY):
        raise DataError(
            f"{path}, line 1",
            wanted=f"the log of a run, {LOG}",
            do="name logs of a study, or of assay vhack train",
        )
    return head


@vhack.add(
    "train",
    TrainCommand,
    "assay.vhack.training.settings:TrainSettings",
    shown="model output arm detector pairs steps reward allow_unsandboxed seed device",
    rare="teacher",
    example="assay vhack train --model reference:organism -o run",
    resumable=True,
)
def train(options: TrainCommand, chosen: "TrainSettings", as_json: bool) -> int:
    """Train one arm by reinforcement with TRL.

    The same command goes on after the last checkpoint. Exit code 1 if the detector missed an
    exploit.
    """
    from assay.vhack.training.pool import RolloutPool
    from assay.vhack.training.tasks import import_function

    # Check everything else that needs no torch.
    check_folder(options.output)
    check_trackers(options.tracker)
    if chosen.basis:
        check_basis(chosen.basis)
    if chosen.teacher:
        RolloutPool.load(chosen.teacher, None, max_new_tokens=chosen.max_new_tokens)
    for flag, where in (("--reward", chosen.reward), ("--tasks", chosen.tasks)):
        if isinstance(where, str):
            import_function(where, flag)
    assay.vhack.pairs.find_pairs(chosen.pairs)
    from assay.vhack.training.run import train
    from assay.vhack.training.step_log import SHOWN

    check_tokenizer(chosen.model)
    result = train(
        chosen,
        options.output,
        console=say,
        trackers=options.tracker,
        allow_unsandboxed=options.allow_unsandboxed,
    )
    if result.is_first:  # one of several processes prints
        values = {
            "path": str(result.folder),
            "arm": result.arm,
            "steps": result.steps,
            "resumed_from": result.resumed_from,
            "last": result.last,
            "alarm": result.alarm,
        }
        rows = [
            (name.replace("_", " "), f"{result.last[name]:.4f}")
            for name in SHOWN
            if name in result.last
        ]
        title = f"{result.arm}: {result.steps} steps in {result.folder}"
        shown = (("", "mean of the last 10 steps"), rows, title)
        show_tables("assay.vhack.train.result/1", values, as_json, shown)
    return 0 if result.alarm is None else 1


def keep_result(result: dict[str, Any], path: Path | None, as_json: bool) -> bool:
    """Write a result into its file, and print it where JSON is wanted; return whether it was."""
    if path:
        write_atomic(path, dumps(result) + "\n")
    if as_json:
        emit_document(result)
    return as_json


def _load(chosen: WeightSettings) -> "assay.models.Model":
    """Load the model of a command about texts."""
    check_tokenizer(chosen.model)
    return assay.models.load_model(chosen.model, dtype=chosen.dtype, device=chosen.device)


def check_tokenizer(model: str) -> None:
    """Refuse a model that cannot read texts, before its weights are read."""
    if assay.models.load_tokenizer(model) is None:
        raise UsageError(
            f"--model {model} has no tokenizer",
            wanted="a model that reads texts",
            do="save its tokenizer beside its weights, or pass another --model",
        )


def print_checks(result: "assay.vhack.checks.CheckReport", *, title: str) -> None:
    """Print the table of checks with their largest null p-values, and why failed ones failed."""
    rows = [
        (
            outcome.title,
            *_with_interval(outcome.measured),
            f"{max(outcome.p_values.values()):.2g}" if outcome.p_values else "",
            outcome.verdict,
        )
        for outcome in result.checks
    ]
    table(
        ("check", "value", f"{result.settings.confidence:.0%} interval", "largest p", "verdict"),
        rows,
        title=title,
    )
    for outcome in result.checks:
        if outcome.verdict != "pass":
            click.echo(f"{outcome.title}: {outcome.reason}")
    _print_detectors(result.detectors)


def _with_interval(value: "BootstrapInterval | None") -> tuple[str, str]:
    """Return a measured value and its interval as text; empty where nothing was measured."""
    if value is None:
        return "", ""
    return f"{value.value:.3f}", f"{value.low:.3f} to {value.high:.3f}"


def _print_detectors(compared: "Comparison | None") -> None:
    if compared is not None:
        table(*compared.table, title=f"detectors, on groups held out: {compared.says}")
