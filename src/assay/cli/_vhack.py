"""``assay vhack``: extract hack directions from pairs, check them, and train away from them."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from assay.cli import _vhack_check, _vhack_pairs, _vhack_study, _vhack_train
from assay.cli._commands import App, Resumable
from assay.cli._flags import DeviceFlag, GradientDtypeFlag, ModelFlag, PairsFlag
from assay.cli._output import JsonFlag, emit_json, progress_bar, table
from assay.errors import UsageError

if TYPE_CHECKING:
    from assay.models import Model
    from assay.vhack import Basis, Pair

__all__ = ["app"]

app = App(help="Directions along which training would learn to cheat.")
app.add_typer(_vhack_pairs.app, name="pairs")
app.command("check")(_vhack_check.check)
app.command("report")(_vhack_study.report)
app.command("train", cls=Resumable)(_vhack_train.train)


@app.command()
def extract(
    model: ModelFlag,
    output: Annotated[Path, typer.Option("-o", "--output", help="The basis file to write.")],
    pairs: PairsFlag = "authored",
    n_heldout: Annotated[int | None, typer.Option(help="Hold out this many pairs from the end.")] = None,
    heldout_group: Annotated[
        list[str] | None,
        typer.Option(
            help="Hold out this group; may be repeated. Default: the last sixth of the pairs, a third of 30 groups."
        ),
    ] = None,
    top_k: Annotated[int, typer.Option(help="Axes per module.")] = 12,
    tau_axis: Annotated[float, typer.Option(help="Zero axes whose S_i/S_0 is below this.")] = 0.0,
    method: Annotated[str, typer.Option(help="lda, mean-diff or svd.")] = "lda",
    rank: Annotated[int | None, typer.Option(help="Singular directions per matrix; all when left out.")] = None,
    factors: Annotated[str | None, typer.Option(help="Dtype of U and Vh: float32 or bfloat16.")] = None,
    cache: Annotated[
        Path | None,
        typer.Option(
            help="Keep weight decompositions in this directory. On a CPU they are kept in the user's cache directory; "
            "a GPU computes them faster than it reads them.",
            envvar="ASSAY_CACHE",
        ),
    ] = None,
    allow_partial: Annotated[
        bool, typer.Option("--allow-partial", help="Accept a model of whose weights less than 90 % carry δS.")
    ] = False,
    no_cache: Annotated[bool, typer.Option("--no-cache", help="Keep no weight decompositions on disk.")] = False,
    max_tokens: Annotated[int | None, typer.Option(help="Tokens per batch; chosen from memory when left out.")] = None,
    checkpointing: Annotated[bool, typer.Option("--checkpointing", help="Recompute layers to save memory.")] = False,
    dtype: GradientDtypeFlag = None,
    device: DeviceFlag = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing basis file.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Extract a basis of hack directions and write it to a file."""
    from assay import vhack
    from assay.models import load_model
    from assay.vhack import checks
    from assay.vhack.pairs import find_pairs

    _vhack_check.check_place(output, overwrite=overwrite)
    if max_tokens is not None and max_tokens < 1:
        raise UsageError(f"--max-tokens {max_tokens}", wanted="at least 1", do="leave it out")
    chosen = find_pairs(pairs)
    groups, least = len({pair.group for pair in chosen}), checks.fewest_groups(checks.CheckSettings(method="svd"))
    if groups < least:
        typer.echo(
            f"warning: {len(chosen)} pairs in {groups} groups are too few to show that directions are real; "
            f"assay vhack check needs {least} groups, and 20 are better (--pairs generated:48 has 30)",
            err=True,
        )
    loaded = load_model(model, dtype=dtype, device=device)
    with progress_bar("decompositions and gradients", "steps") as progress:
        basis = vhack.extract(
            chosen,
            loaded,
            n_heldout=n_heldout,
            heldout_groups=heldout_group or None,
            top_k=top_k,
            tau_axis=tau_axis,
            method=method,
            rank=rank,
            factors=factors,
            cache=None if no_cache else _cache(cache, loaded),
            min_coverage=0.0 if allow_partial else vhack.MIN_COVERAGE,
            max_tokens=max_tokens,
            checkpointing=checkpointing,
            progress=progress,
        )
    basis.save(output)
    _print(basis, chosen, output, as_json)


def _cache(asked: Path | None, model: "Model") -> Path | None:
    """Return the directory that was asked for, or on a CPU the cache directory of the user."""
    if asked is not None or model.device.type != "cpu":
        return asked
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "assay"


def _print(basis: "Basis", pairs: "list[Pair]", path: Path, as_json: bool) -> None:
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
