"""The tables of the experiment, for the terminal, the documentation and the page of a run."""

from collections.abc import Iterable, Iterator

from assay.files.jsonl import JsonObject
from assay.pages.html import Cell
from assay_research.responses.audits import GRID
from assay_research.responses.field import BYTES, OURS
from assay_research.runs.report import Curves, Section, Table
from assay_research.runs.runs import RunRecords

Cells = Iterable[JsonObject]
Place = tuple[str, str, str]
"""Model, dtype of provers, and whether tokens are sampled or greedy."""

CLASSES = {
    "no bytes": tuple(name for name, size in BYTES.items() if size == 0),
    "0.75 bytes": tuple(name for name, size in BYTES.items() if 0 < size <= OURS["sketches"]),
    "more bytes": tuple(name for name, size in BYTES.items() if size > OURS["sketches"]),
}
"""Methods by what they publish per token."""

CURVES = ("int4 weights", "fp8 weights", "int8 weights", "int4 tokens that lead by 2")
DRAWN = ("margins", "sketches", "Token-DiFR", "Activation-DiFR, 1 in 32", "TOPLOC, top 128")


def _of(cells: Cells, kind: str, place: Place | None = None) -> Iterator[JsonObject]:
    for cell in cells:
        if cell.get("kind") == kind and place in (None, (cell.get("model"), cell.get("dtype"), cell.get("mode"))):
            yield cell


def places(cells: Cells) -> list[Place]:
    """Return the models, dtypes and modes that honest responses were measured on."""
    return [(cell["model"], cell["dtype"], cell["mode"]) for cell in _of(cells, "honest")]


def caught_table(cells: Cells, place: Place) -> Table:
    """Return, for every cheat, the tokens until it is caught by ours, and at a threshold by every method."""
    rows: list[list[Cell]] = []
    for cell in _of(cells, "cheat", place):
        methods = cell["methods"]
        rows.append([
            cell["name"],
            f"{cell['matches']:.1%}",
            *(_needs(methods[name]["sequential_99"]) for name in OURS),
            *(_needs(methods[name]["threshold_99"]) for name in BYTES),
        ])  # fmt: skip
    columns = ("cheat", "tokens that match", *(f"{name}, sequential" for name in OURS), *BYTES)
    return columns, rows


def honest_table(cells: Cells) -> Table:
    """Return how often honest provers match the verifier's tokens, and how many of their audits ours accuse."""
    provers = [(f"{cell['dtype']} for float32, {cell['mode']}", cell) for cell in _of(cells, "honest")]
    provers += [(f"{cell['prover']} for {cell['verifier']}", cell) for cell in _of(cells, "pair")]
    rows: list[list[Cell]] = [
        [cell["model"], name, f"{cell['matches']:.2%}", f"{cell['residual_median']:.4f}", *_accused(cell)]
        for name, cell in provers
    ]
    for cell in _of(cells, "others"):
        for name, accused in cell["provers"].items():
            named = {"audits": cell["audits"], "accused": accused}
            rows.append([cell["model"], f"{cell['dtype']} for float32, {name}", "", "", *_accused(named)])
    columns = ("model", "prover", "tokens that match", "median residual", "audits", *(f"accused, {n}" for n in OURS))
    return columns, rows


def standing_table(cells: Cells) -> Table:
    """Return, for int4 weights, our figures beside the best rival of the same bytes."""
    rows: list[list[Cell]] = []
    for place in places(cells):
        for cell in _of(cells, "cheat", place):
            if cell["name"] == "int4 weights":
                rows += [[*place[::2], *row] for row in _standing(cell["methods"])]
    return ("model", "tokens", "bytes per token", "ours", "sequential", "at a threshold", "best rival", "needs"), rows


def _standing(methods: JsonObject) -> Iterator[list[Cell]]:
    for ours, rivals in (("margins", CLASSES["no bytes"]), ("sketches", CLASSES["no bytes"] + CLASSES["0.75 bytes"])):
        others = {name: methods[name]["threshold_99"] for name in rivals if name not in OURS}
        best = min(others, key=lambda name: others[name] or float("inf"))
        own = methods[ours]
        figures = (own["sequential_99"], own["threshold_99"])
        yield [f"{OURS[ours]:g}", ours, *map(_needs, figures), best, _needs(others[best])]


def _accused(cell: JsonObject) -> list[Cell]:
    return [cell["audits"], *(f"{cell['accused'][name]:.2%}" for name in OURS)]


def _needs(tokens: int | None) -> Cell:
    return tokens if tokens is not None else "never"


def section(run: RunRecords) -> Section:
    """Return what honest provers show, how soon every cheat is caught by each method, and curves."""
    cells = run.cells
    tables: dict[str, Table] = {
        "Bytes per token": (("method", "bytes per token"), [[name, f"{size:.2f}"] for name, size in BYTES.items()]),
        "int4 weights: tokens until 99 % are caught": standing_table(cells),
        "Honest provers": honest_table(cells),
    }
    for place in places(cells):
        tables[f"{', '.join(place)}: tokens until 99 % of the audits are accused"] = caught_table(cells, place)
    about = (
        "All methods score the same responses. 'Sequential' is our test as it is used; every other column is a method "
        "with the threshold that one in a thousand honest audits exceed, for a number of tokens known in advance."
    )
    curves = [_curves(cell) for cell in _of(cells, "cheat") if cell["name"] in CURVES]
    return Section("Red team: served responses", about, tables, curves)


def _curves(cell: JsonObject) -> Curves:
    lines = {}
    for name in DRAWN:
        lines[name] = (GRID, cell["methods"][name]["shares"])
        if "sequential" in cell["methods"][name]:
            lines[f"-{name}"] = (GRID, cell["methods"][name]["sequential"])
    where = ", ".join((cell["name"], cell["model"], cell["dtype"], cell["mode"]))
    caption = f"{where}: share caught at a threshold (solid) and sequentially (dashed)."
    return Curves(caption, "tokens checked", "share caught", lines)
