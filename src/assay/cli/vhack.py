"""``assay vhack``: extract hack directions from pairs, check them, train away from them, and draw the pages."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from assay.cli import vhack_fuzz as _vhack_fuzz
from assay.cli import vhack_models as _vhack_models
from assay.cli import vhack_pairs as _vhack_pairs
from assay.cli.commands import App, Resumable
from assay.cli.output import JsonFlag, emit_document, emit_json, progress_bar, show_values, table
from assay.cli.settings import settings
from assay.errors import UsageError

if TYPE_CHECKING:
    from assay_research.study.summary import ArmResult

    from assay.cli.vhack_settings import CheckCommand, ExtractCommand, PoolsCommand
    from assay.models.load import Model
    from assay.vhack.basis.basis import Basis
    from assay.vhack.checks.judge import CheckReport
    from assay.vhack.checks.pools import PoolReport
    from assay.vhack.pairs.pairs import Pair
    from assay.vhack.training.settings import TrainSettings


app = App(help="Directions along which training would learn to cheat.")
app.add_typer(_vhack_pairs.app, name="pairs")
_vhack_fuzz.add_to(app)
_vhack_models.add_to(app)

_SELECTION = {"n_heldout", "heldout_groups", "top_k", "tau_axis", "method"}
_PASSED = _SELECTION | {"rank", "factors", "max_tokens", "checkpointing"}
"""Settings that :func:`assay.vhack.extract` takes as they are."""
_SHOWN = ("hack", "solve", "reward", "cin_s", "cin_t", "cin", "cout", "leak", "displacement", "seconds")


@app.command(epilog="Example: assay vhack extract --model reference:qwen3 --pairs generated:48 -o basis.safetensors")
@settings("assay.cli.vhack_settings:ExtractCommand")
def extract(chosen: "ExtractCommand", as_json: JsonFlag = False) -> None:
    """Extract a basis of hack directions and write it to a file."""
    from assay import vhack
    from assay.files.storage import check_new_file
    from assay.vhack import checks
    from assay.vhack.basis.extract import select_pairs
    from assay.vhack.checks.folds import fewest_groups
    from assay.vhack.gradients.svd import check_rank
    from assay.vhack.pairs.reference import find_pairs

    check_new_file(chosen.output, overwrite=chosen.overwrite)
    pairs = find_pairs(chosen.pairs)
    groups, least = len({pair.group for pair in pairs}), fewest_groups(checks.CheckSettings(method="svd"))
    if groups < least:
        typer.echo(
            f"warning: {len(pairs)} pairs in {groups} groups are too few to show that directions are real; "
            f"assay vhack check needs {least} groups, and 20 are better (--pairs generated:48 has 30)",
            err=True,
        )
    select_pairs(pairs, **chosen.model_dump(include=_SELECTION))
    check_rank(chosen.rank)
    loaded = _load(chosen)
    with progress_bar("decompositions and gradients", "steps") as progress:
        basis = vhack.extract(
            pairs,
            loaded,
            **chosen.model_dump(include=_PASSED),
            cache=None if chosen.no_cache else _vhack_models.cache_of(loaded, chosen.cache),
            min_coverage=0.0 if chosen.allow_partial else vhack.MIN_COVERAGE,
            progress=progress,
        )
    basis.save(chosen.output)
    _print_basis(basis, pairs, chosen.output, as_json)


@app.command(epilog="Example: assay vhack check --model reference:qwen3 --pairs generated:48 --html check.html")
@settings("assay.cli.vhack_settings:CheckCommand")
def check(chosen: "CheckCommand", context: typer.Context, as_json: JsonFlag = False) -> None:
    """Test hack directions on held-out pairs. Exit code 0 all pass, 1 a check fails, 2 undecided or bad input."""
    from assay.files.jsonl import dumps
    from assay.files.storage import check_new_file, write_atomic
    from assay.vhack import checks
    from assay.vhack.basis.basis import Basis
    from assay.vhack.checks.folds import check_groups
    from assay.vhack.checks.run import too_few_groups
    from assay.vhack.checks.sources import read_source_log
    from assay.vhack.gradients.targets import MIN_COVERAGE
    from assay.vhack.pairs.reference import find_pairs

    rules = checks.CheckSettings(**chosen.model_dump(include={"k_use", "alpha", "seed", "method"}))
    for path in filter(None, (chosen.output, chosen.html)):
        check_new_file(path, overwrite=True)
    found = find_pairs(chosen.pairs)
    entries = read_source_log(chosen.log) if chosen.log else None
    read = Basis.load(chosen.basis) if chosen.basis else None
    check_groups([pair.group for pair in found], rules, read)
    if few := too_few_groups(found, rules, read):
        typer.echo(f"warning: {few}", err=True)
    loaded = _load(chosen)
    if chosen.basis:
        Basis.load(chosen.basis, loaded)  # of these weights
    with progress_bar("decompositions and gradients", "steps") as progress:
        result = checks.check(
            found,
            loaded,
            basis=read,
            settings=rules,
            log=entries,
            min_coverage=0.0 if chosen.allow_partial else MIN_COVERAGE,
            progress=progress,
        )
    if chosen.output:
        write_atomic(chosen.output, dumps(result.as_dict()) + "\n")
    if chosen.html:
        checks.page(result, command=f"assay vhack check --model {chosen.model} --pairs {chosen.pairs}").write(
            chosen.html
        )
    if as_json:
        emit_document(result.as_dict())
    else:
        print_checks(result, title=f"{result.verdict}: {result.design}")
    context.exit(result.exit_code)


@app.command(
    epilog="Example: assay vhack pools --model reference:qwen3 --basis B.safetensors --hack H.jsonl --clean C.jsonl"
)
@settings("assay.cli.vhack_settings:PoolsCommand")
def pools(chosen: "PoolsCommand", context: typer.Context, as_json: JsonFlag = False) -> None:
    """Score two pools of samples that are not paired. Exit code 0 pass, 1 fail, 2 undecided or bad input."""
    from assay.files.jsonl import dumps
    from assay.files.storage import check_new_file, write_atomic
    from assay.vhack import checks
    from assay.vhack.basis.basis import Basis

    rules = checks.CheckSettings(**chosen.model_dump(include={"k_use", "alpha", "seed"}))
    if chosen.output:
        check_new_file(chosen.output, overwrite=True)
    hack, clean = (checks.read_pool(path, most=chosen.limit, seed=chosen.seed) for path in (chosen.hack, chosen.clean))
    basis = Basis.load(chosen.basis)
    loaded = _load(chosen)
    with progress_bar("decompositions and gradients", "steps") as progress:
        result = checks.check_two_pools(
            hack, clean, loaded, basis, settings=rules, max_tokens=chosen.max_tokens, progress=progress
        )
    if chosen.output:
        write_atomic(chosen.output, dumps(result.as_dict()) + "\n")
    if as_json:
        emit_document(result.as_dict())
    else:
        _print_pools(result)
    context.exit(result.exit_code)


@app.command(epilog="Example: assay vhack report runs/*.jsonl -o page.html")
def report(
    results: Annotated[
        list[Path],
        typer.Argument(
            help="Result that `assay vhack check -o` wrote; or logs of training runs, as files or directories."
        ),
    ],
    output: Annotated[Path, typer.Option("-o", "--output", help="Page to write.")],
    checks: Annotated[
        list[Path] | None, typer.Option("--check", help="Check to show beside logs; may be repeated.")
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Draw the page of an earlier check, or of training runs with their rates over steps and a final table."""
    from assay_research.study.log import read_logs
    from assay_research.study.page import study_page
    from assay_research.study.summary import summarise

    from assay.files.jsonl import read_json
    from assay.vhack.checks.judge import CheckReport
    from assay.vhack.checks.page import page

    if len(results) == 1 and results[0].suffix == ".json":
        if checks:
            raise UsageError(f"--check {checks[0]} beside a check", wanted="logs of runs", do="leave it out")
        read = CheckReport.from_dict(read_json(results[0]))
        page(read, command=f"assay vhack report {results[0]}").write(output)
        values = {"path": str(output), "verdict": read.verdict}
        show_values("assay.vhack.report/1", values, as_json)
        return
    logs = read_logs(results)
    shown = [CheckReport.from_dict(read_json(path)) for path in checks or ()]
    command = " ".join(["assay vhack report", *(path.name for path in results)])
    study_page(logs, checks=shown, command=command).write(output)
    found = summarise(logs)
    if as_json:
        arms = [result.as_dict() for result in found]
        emit_json("assay.vhack.report/1", {"path": str(output), "runs": len(logs), "arms": arms})
    else:
        _print_arms(found, output)


@app.command(cls=Resumable, epilog="Example: assay vhack train --model reference:organism -o run")
@settings("assay.vhack.training:TrainSettings")
def train(
    chosen: "TrainSettings",
    output: Annotated[Path, typer.Option("-o", "--output", help="Directory of the run; the same one continues it.")],
    tracker: Annotated[list[str] | None, typer.Option(help="A tracker of TRL's, such as wandb; repeatable.")] = None,
    allow_unsandboxed: Annotated[
        bool, typer.Option("--allow-unsandboxed", help="Run the programs even where nothing can isolate them.")
    ] = False,
    as_json: JsonFlag = False,
) -> None:
    """Train one arm by reinforcement with TRL. The same command goes on after the last checkpoint."""
    from assay.vhack import training

    _check_tokenizer(chosen.model)
    result = training.train(
        chosen,
        output,
        console=lambda line: typer.echo(line, err=True),
        trackers=tuple(tracker or ()),
        allow_unsandboxed=allow_unsandboxed,
    )
    if not result.is_first:  # one of several processes prints
        return
    if as_json:
        values = {"path": str(result.folder), "arm": result.arm, "steps": result.steps}
        emit_json("assay.vhack.train.result/1", {**values, "resumed_from": result.resumed_from, "last": result.last})
        return
    rows = [(name.replace("_", " "), f"{result.last[name]:.4f}") for name in _SHOWN if name in result.last]
    table(("", "mean of the last 10 steps"), rows, title=f"{result.arm}: {result.steps} steps in {result.folder}")


def _load(chosen: "ExtractCommand | CheckCommand | PoolsCommand") -> "Model":
    """Load the model of a command about texts."""
    from assay.models.load import load_model

    _check_tokenizer(chosen.model)
    return load_model(chosen.model, dtype=chosen.dtype, device=chosen.device)


def _check_tokenizer(model: str) -> None:
    """Refuse a model that cannot read texts, before its weights are read."""
    from assay.models.resolve import load_tokenizer

    if load_tokenizer(model) is None:
        raise UsageError(
            f"--model {model} has no tokenizer",
            wanted="a model that reads texts",
            do="save its tokenizer beside its weights, or pass another --model",
        )


def _print_basis(basis: "Basis", pairs: "list[Pair]", path: Path, as_json: bool) -> None:
    origin = basis.origin
    energy = [float(shares[:5].sum()) for shares in basis.energy.values()]
    left_out = len(origin.coverage.left_out)
    held_out = sorted({pair.group for pair in pairs} - set(origin.groups))
    values = {
        "path": str(path),
        "model": origin.model,
        "weights": origin.weights,
        "method": origin.method,
        "modules": len(basis.axes),
        "modules_left_out": left_out,
        "weights_covered": round(origin.coverage.share, 4),
        "axes_per_module": max(len(axes) for axes in basis.axes.values()),
        "pairs_used": len(origin.pairs),
        "pairs_skipped": len(origin.skipped),
        "pairs_held_out": len(pairs) - len(origin.given),
        "groups_held_out": held_out,
        "undecided_axes": len(basis.undecided),
        "energy_of_5_axes": round(sum(energy) / len(energy), 4),
        "captured_energy": round(origin.captured, 6),
    }
    if as_json:
        emit_json("assay.vhack.extract/1", values)
        return
    shown = {**values, "groups_held_out": ", ".join(held_out) or "none"}
    table(("", "basis"), [(name.replace("_", " "), value) for name, value in shown.items()])


def check_table(result: "CheckReport") -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Return the columns and the rows of a table of all checks. The p-value is the largest against any null."""
    rows: list[tuple[str, ...]] = []
    for made in result.checks:
        value = made.measured
        shown = ("", "") if value is None else (f"{value.value:.3f}", f"{value.low:.3f} to {value.high:.3f}")
        p = f"{max(made.p_values.values()):.2g}" if made.p_values else ""
        rows.append((made.title, *shown, p, made.verdict))
    return ("check", "value", f"{result.settings.confidence:.0%} interval", "largest p", "verdict"), rows


def print_checks(result: "CheckReport", *, title: str) -> None:
    """Print the table of all checks, and why those that did not pass did not."""
    table(*check_table(result), title=title)
    for made in result.checks:
        if made.verdict != "pass":
            typer.echo(f"{made.title}: {made.reason}")


def _print_pools(result: "PoolReport") -> None:
    made, measured = result.check, result.check.measured
    assert measured is not None
    rows = [
        ("samples that cheat", str(len(result.hack))),
        ("samples that do not", str(len(result.clean))),
        ("left out, of groups of the basis", str(result.left_out)),
        ("AUROC of cin", f"{measured.value:.3f} ({measured.low:.3f} to {measured.high:.3f})"),
        *((f"largest p, {null}", f"{p:.2g}") for null, p in made.p_values.items()),
        *((name.replace("_", " "), f"{value:.3f}") for name, value in made.details.items()),
        *((f"guard, {item.name}", f"{item.verdict}: {item.reason}") for item in result.guard),
    ]
    table(("", "pools"), rows, title=f"{result.verdict}: {result.reason}")


def _print_arms(found: "list[ArmResult]", output: Path) -> None:
    rows = []
    for result in found:
        rates = [result.rates[name] for name in ("hack", "solve")]
        rows.append((result.condition, rates[0].n, *(rate.text for rate in rates), result.tipped.text, result.verdict))
    table(("condition", "seeds", "hack rate", "solve rate", "tipped", "verdict"), rows, title=str(output))
