"""``assay vhack check`` and ``assay vhack report``: are hack directions real, and the page that shows it."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from assay.cli._flags import DeviceFlag, GradientDtypeFlag, ModelFlag, PairsFlag
from assay.cli._output import JsonFlag, emit_json, progress_bar, table
from assay.errors import UsageError

if TYPE_CHECKING:
    from assay.vhack.checks import CheckReport

__all__ = ["check", "check_place", "check_table", "report"]


def check(
    context: typer.Context,
    model: ModelFlag,
    pairs: PairsFlag = "authored",
    basis: Annotated[Path | None, typer.Option(help="File of the basis to check; bases are fitted without.")] = None,
    log: Annotated[Path | None, typer.Option(help="Log of a training run, for check 4.")] = None,
    method: Annotated[str, typer.Option(help="How bases are fitted without --basis: lda, mean-diff or svd.")] = "lda",
    k_use: Annotated[int, typer.Option(help="Axes per module.")] = 5,
    alpha: Annotated[float, typer.Option(help="Highest probability that noise passes a check.")] = 0.05,
    seed: Annotated[int, typer.Option(help="Seed of all random draws.", min=0)] = 0,
    dtype: GradientDtypeFlag = None,
    device: DeviceFlag = None,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="File for the result as JSON.")] = None,
    html: Annotated[Path | None, typer.Option(help="File for the report page.")] = None,
    as_json: JsonFlag = False,
) -> None:
    """Test hack directions on held-out pairs. Exit code 0 all pass, 1 a check fails, 2 undecided or bad input."""
    from assay.models import load_model
    from assay.reports import dumps, write_atomic
    from assay.vhack import Basis
    from assay.vhack import checks as vhack_checks
    from assay.vhack.pairs import find_pairs

    settings = vhack_checks.CheckSettings(k_use=k_use, alpha=alpha, seed=seed, method=method)
    for path in (output, html):
        check_place(path)
    found = find_pairs(pairs)
    entries = vhack_checks.read_source_log(log) if log else None
    read = Basis.load(basis) if basis else None
    if few := vhack_checks.too_few_groups(found, settings, read):
        typer.echo(f"warning: {few}", err=True)
    loaded = load_model(model, dtype=dtype, device=device)
    if basis:
        Basis.load(basis, loaded)  # of these weights
    with progress_bar("decompositions and gradients", "steps") as progress:
        result = vhack_checks.check(found, loaded, basis=read, settings=settings, log=entries, progress=progress)
    if output:
        write_atomic(output, dumps(result.as_dict()) + "\n")
    if html:
        vhack_checks.page(result, command=f"assay vhack check --model {model} --pairs {pairs}").write(html)
    if as_json:
        values = result.as_dict()
        emit_json(values.pop("schema"), values)
    else:
        _print(result)
    context.exit(result.exit_code)


def check_place(path: Path | None, *, overwrite: bool = True) -> None:
    """Refuse a file that cannot be written, before any work.

    Raises:
        UsageError: The directory is not there, the path is a directory, or it exists and may not be replaced.
    """
    if path is None:
        return
    if path.is_dir() or not path.parent.is_dir():
        seen = f"{path} is a directory" if path.is_dir() else f"{path.parent} is no directory"
        raise UsageError(seen, wanted="a file in a directory that exists", do="create the directory, or name a file")
    if path.exists() and not overwrite:
        raise UsageError(f"{path} exists", wanted="a new file name", do="choose another, or pass --overwrite")


def report(
    result: Annotated[Path, typer.Argument(help="What `assay vhack check -o` wrote.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="The page to write.")],
    as_json: JsonFlag = False,
) -> None:
    """Draw the page of a check that was made earlier."""
    from assay.reports import read_json
    from assay.vhack.checks import CheckReport, page

    read = CheckReport.from_dict(read_json(result))
    page(read, command=f"assay vhack report {result}").write(output)
    values = {"path": str(output), "verdict": read.verdict}
    if as_json:
        emit_json("assay.vhack.report/1", values)
    else:
        table(("", "value"), list(values.items()))


def check_table(result: "CheckReport") -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Return the columns and the rows of a table of all checks. The p-value is the largest against any null."""
    rows: list[tuple[str, ...]] = []
    for made in result.checks:
        value = made.measured
        shown = ("", "") if value is None else (f"{value.value:.3f}", f"{value.low:.3f} to {value.high:.3f}")
        p = f"{max(made.p_values.values()):.2g}" if made.p_values else ""
        rows.append((made.title, *shown, p, made.verdict))
    return ("check", "value", f"{result.settings.confidence:.0%} interval", "largest p", "verdict"), rows


def _print(result: "CheckReport") -> None:
    table(*check_table(result), title=f"{result.verdict}: {result.design}")
    for made in result.checks:
        if made.verdict != "pass":
            typer.echo(f"{made.title}: {made.reason}")
