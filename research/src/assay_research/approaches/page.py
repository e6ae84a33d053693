"""What the approaches and the weight modes show."""

from collections.abc import Sequence

from assay.files.jsonl import JsonObject
from assay.pages.html import Cell
from assay_research.runs.report import Section, Table
from assay_research.runs.runs import RunRecords


def section(run: RunRecords) -> Section:
    """Return, per model, the distances against the law, the spread of the blocks, separability and cost."""
    tables: dict[str, Table] = {}
    for model in dict.fromkeys(cell["model"] for cell in run.cells):
        cells = [cell for cell in run.cells if cell["model"] == model]
        size = f"{cells[0]['nonces']} nonces of {len(cells[0]['blocks'])} blocks"
        tables[f"{model}: {size}"] = _distances(cells)
        tables[f"{model}: residuals against a float32 validator, medians"] = _separability(cells)
        tables[f"{model}: random numbers, and time over the plain forward pass"] = _costs(cells)
    about = (
        "Distances of every approach against those of a random direction. An approach breaks the structure where "
        "neither the block means nor the spread of the blocks can be told from chance at 1 % each (yes), or where the "
        "spread is at least below the published limit of 5 % (partly)."
    )
    return Section("Which approach breaks the structure of a trained model?", about, tables)


def _distances(cells: Sequence[JsonObject]) -> Table:
    rows: list[list[Cell]] = []
    for cell in cells:
        main, tail = cell["spreads"]
        rows.append(
            [
                cell["approach"],
                f"{cell['mean']:.4f}",
                f"{cell['std']:.4f}",
                f"{cell['p10']:.4f}",
                f"{cell['mean_off_in_standard_errors']:.1f}",
                f"{main['spread']:.1%}",
                _band(main["noise_band"]),
                f"{tail['spread']:.1%}",
                _band(tail["noise_band"]),
                _band(tail["band_of_states"]),
                cell["breaks_structure"],
            ]
        )
    first, second = (f"spread at {spread['rate']:.0%}" for spread in cells[0]["spreads"])
    columns = ("approach", "mean", "sd", "p10", "largest offset in SE", first, "noise band", second, "noise band")
    return (*columns, "band of its states", "breaks structure"), rows


def _band(ends: Sequence[float] | None) -> str | None:
    return None if ends is None else f"{ends[0]:.1%} to {ends[1]:.1%}"


def _separability(cells: Sequence[JsonObject]) -> Table:
    rows: list[list[Cell]] = [
        [
            cell["approach"],
            f"{cell['honest_residual']:.2g}",
            f"{cell['int4_residual']:.2g}",
            f"{cell['separation']:.1f}",
            f"{cell['auc']:.3f}",
            "{:.3f} to {:.3f}".format(*cell["auc_interval"]),
            None if cell["effective_dimension"] is None else f"{cell['effective_dimension']:.0f}",
        ]
        for cell in cells
    ]
    return ("approach", "honest bf16", "int4 weights", "ratio", "AUC", "95 % interval", "effective dimension"), rows


def _costs(cells: Sequence[JsonObject]) -> Table:
    rows: list[list[Cell]] = [
        [
            cell["approach"],
            f"{cell['bytes_per_nonce'] / 1024:.1f}",
            f"{cell['bytes_per_block'] / 2**20:.2f}",
            None if cell["overhead"] is None else f"{cell['overhead']:.1%}",
            cell["per_nonce"],
            cell["tensor_parallel"],
            cell["pipeline_parallel"],
        ]
        for cell in cells
    ]
    return ("approach", "KiB per nonce", "MiB per block", "overhead", "per nonce", "TP-safe", "PP-safe"), rows
