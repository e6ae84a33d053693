"""``assay vhack``: extract hack directions from pairs, check them, and train away from them."""

import os
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from assay.cli import _vhack_check, _vhack_pairs, _vhack_report, _vhack_train
from assay.cli._commands import App, Resumable
from assay.cli._output import JsonFlag, emit_json, progress_bar, table
from assay.cli._settings import settings

if TYPE_CHECKING:
    from assay.cli._vhack_settings import ExtractCommand
    from assay.models import Model
    from assay.vhack import Basis, Pair

app = App(help="Directions along which training would learn to cheat.")
app.add_typer(_vhack_pairs.app, name="pairs")
app.command(epilog="Example: assay vhack check --model reference:qwen3 --pairs generated:48 --html check.html")(
    _vhack_check.check
)
app.command(epilog="Example: assay vhack report runs/*.jsonl -o page.html")(_vhack_report.report)
app.command(cls=Resumable, epilog="Example: assay vhack train --model reference:organism -o run")(_vhack_train.train)

PASSED = {
    "n_heldout",
    "heldout_groups",
    "top_k",
    "tau_axis",
    "method",
    "rank",
    "factors",
    "max_tokens",
    "checkpointing",
}
"""Settings that :func:`assay.vhack.extract` takes as they are."""


@app.command(epilog="Example: assay vhack extract --model reference:qwen3 --pairs generated:48 -o basis.safetensors")
@settings("assay.cli._vhack_settings:ExtractCommand")
def extract(chosen: "ExtractCommand", as_json: JsonFlag = False) -> None:
    """Extract a basis of hack directions and write it to a file."""
    from assay import vhack
    from assay.models import load_model
    from assay.reports import check_new_file
    from assay.vhack import checks
    from assay.vhack.basis import select_pairs
    from assay.vhack.gradients import check_rank
    from assay.vhack.pairs import find_pairs

    check_new_file(chosen.output, overwrite=chosen.overwrite)
    pairs = find_pairs(chosen.pairs)
    groups, least = len({pair.group for pair in pairs}), checks.fewest_groups(checks.CheckSettings(method="svd"))
    if groups < least:
        typer.echo(
            f"warning: {len(pairs)} pairs in {groups} groups are too few to show that directions are real; "
            f"assay vhack check needs {least} groups, and 20 are better (--pairs generated:48 has 30)",
            err=True,
        )
    select_pairs(pairs, **chosen.model_dump(include=PASSED - {"rank", "factors", "max_tokens", "checkpointing"}))
    check_rank(chosen.rank)
    loaded = load_model(chosen.model, dtype=chosen.dtype, device=chosen.device)
    with progress_bar("decompositions and gradients", "steps") as progress:
        basis = vhack.extract(
            pairs,
            loaded,
            **chosen.model_dump(include=PASSED),
            cache=None if chosen.no_cache else _cache(chosen.cache, loaded),
            min_coverage=0.0 if chosen.allow_partial else vhack.MIN_COVERAGE,
            progress=progress,
        )
    basis.save(chosen.output)
    _print(basis, pairs, chosen.output, as_json)


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
