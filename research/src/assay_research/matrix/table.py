"""The matrix as tables and on the page of a run: valid rates, the spread of the blocks, and the band of its noise."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from assay import stats
from assay.files.jsonl import JsonObject
from assay.pages.html import Cell
from assay.stats.chord import RANDOM_HEAD_ROWS
from assay_research.runs.report import Section, Table
from assay_research.runs.runs import RunRecords
from assay_research.runs.spread import Spread, spread_of

PUBLISHED_LIMIT = 0.05
"""The published tests call a spread below this a success."""

PUBLISHED = {
    ("qwen", "sign-flips"): ((57.7, 58.5, 58.0), (59.7, 58.1, 58.9), (58.9, 59.7, 58.9)),
    ("llama", "sign-flips"): ((57.5, 58.3, 58.4), (58.8, 57.3, 58.1), (58.7, 59.5, 58.8)),
    ("qwen", "layer-hooks"): ((60.2, 60.0, 58.9), (63.3, 64.9, 62.6), (60.0, 60.4, 59.7)),
    ("llama", "layer-hooks"): ((62.5, 62.7, 62.4), (64.4, 64.7, 65.3), (55.5, 54.2, 53.9)),
}
"""Published valid rates in percent, per block (alpha, beta, gamma) and key (A, B, C), at 1.416 and 40 seconds."""


@dataclass(frozen=True)
class BlockRow:
    """One block of a configuration: valid rate per key, and over all keys."""

    block: str
    rates: dict[str, float]
    valid: int
    checked: int

    @property
    def rate(self) -> float:
        """Valid share of all nonces of the block."""
        return self.valid / self.checked


@dataclass(frozen=True)
class Configuration:
    """All tests of a model in a mode.

    Args:
        model: Reference of the model.
        mode: Mode of the rounds, sign-flips or layer-hooks.
        blocks: Rates of every block.
        spread: Spread of the valid rates of the blocks; None for a single block.
        r_target: Distance below which a nonce is valid.
        expected: Valid rate by the chord law.
        nonces_per_second: Mean over the tests.
        nonces_per_second_error: Standard deviation over the tests; 0 for a single test.
        undelivered: Number of valid nonces that the receiver did not get.
        width: Effective dimension of the states, which widens the band of the spread; the hidden size where it was not
            measured, for random directions.
    """

    model: str
    mode: str
    blocks: tuple[BlockRow, ...]
    spread: Spread | None
    r_target: float
    expected: float
    nonces_per_second: float
    nonces_per_second_error: float
    undelivered: int
    width: float

    @property
    def checked(self) -> int:
        """Nonces of all blocks."""
        return sum(row.checked for row in self.blocks)

    @property
    def verdict(self) -> str:
        """Whether the spread is inside its noise, beyond it, or beyond the published limit too."""
        if self.spread is None:
            return "one block"
        if self.spread.inside:
            return "inside noise"
        return "beyond noise" if self.spread.value < PUBLISHED_LIMIT else f"over {PUBLISHED_LIMIT:.0%}"

    def as_dict(self) -> JsonObject:
        """Return JSON-ready values."""
        spread = self.spread
        return {
            "model": self.model,
            "mode": self.mode,
            "blocks": {row.block: {"rate": row.rate, "checked": row.checked, **row.rates} for row in self.blocks},
            "expected": self.expected,
            "spread": spread and spread.value,
            "noise_band": spread and [spread.low, spread.high],
            "noise_band_of_nonces_alone": spread and spread.nonces_high,
            "p_value": spread and spread.p_value,
            "verdict": self.verdict,
            "nonces_per_second": self.nonces_per_second,
            "undelivered": self.undelivered,
            "width": self.width,
        }


def configurations(
    cells: Sequence[JsonObject], widths: Mapping[tuple[str, str], float] | None = None
) -> list[Configuration]:
    """Group the cells of a matrix by model and mode, in the order of measurement.

    Args:
        cells: Cells of a run.
        widths: Effective dimensions by model and mode, for runs that did not measure them.
    """
    names = list(dict.fromkeys((cell["model"], cell["mode"]) for cell in cells))
    known = widths or {}
    return [_configuration([c for c in cells if (c["model"], c["mode"]) == name], known.get(name)) for name in names]


def _configuration(cells: Sequence[JsonObject], known: float | None) -> Configuration:
    blocks = []
    for block in sorted({cell["block_hash"] for cell in cells}):
        chosen = sorted((c for c in cells if c["block_hash"] == block), key=lambda cell: str(cell["public_key"]))
        rates = {cell["public_key"]: cell["valid_rate"] for cell in chosen}
        blocks.append(BlockRow(block, rates, sum(c["valid"] for c in chosen), sum(c["checked"] for c in chosen)))
    spread = None
    width = cells[0].get("effective_dimension") or known or cells[0]["hidden_size"]
    if len(blocks) > 1:
        spread = spread_of([row.valid for row in blocks], [row.checked for row in blocks], width=width)
    speeds = np.array([cell["nonces_per_second"] for cell in cells])
    return Configuration(
        model=cells[0]["model"],
        mode=cells[0]["mode"],
        blocks=tuple(blocks),
        spread=spread,
        r_target=cells[0]["r_target"],
        expected=stats.valid_rate(cells[0]["r_target"], RANDOM_HEAD_ROWS),
        nonces_per_second=float(speeds.mean()),
        nonces_per_second_error=float(speeds.std(ddof=1)) if len(speeds) > 1 else 0.0,
        undelivered=sum(cell["valid"] - cell["callback_nonces"] for cell in cells),
        width=float(width),
    )


def rate_table(found: Configuration) -> Table:
    """Return valid rates per block and key."""
    keys = list(found.blocks[0].rates)
    rows: list[list[Cell]] = []
    for row in found.blocks:
        rates = (f"{row.rates[key]:.2%}" if key in row.rates else None for key in keys)
        rows.append([row.block, *rates, f"{row.rate:.2%}", row.checked])
    return ("block", *keys, "all keys", "nonces"), rows


def spread_table(found: Sequence[Configuration]) -> Table:
    """Return the largest minus the smallest valid rate of the blocks, its noise band, and the verdict."""
    rows: list[list[Cell]] = []
    for row in found:
        spread, numbers = row.spread, ["", "", ""]
        if spread is not None:
            numbers = [f"{spread.value:.2%}", f"{spread.low:.2%} to {spread.high:.2%}", spread.p_text]
        rows.append([row.model, row.mode, *numbers, _published_spread(row), row.verdict])
    return ("model", "mode", "spread", "95 % noise band", "p-value", "published spread", "verdict"), rows


def throughput_table(found: Sequence[Configuration]) -> Table:
    """Return nonces per second, and valid nonces that were not delivered."""
    rows: list[list[Cell]] = []
    for row in found:
        cells: list[Cell] = [
            row.model,
            row.mode,
            row.checked,
            f"{row.nonces_per_second:.1f}",
            f"{row.nonces_per_second_error:.1f}" if row.nonces_per_second_error else None,
            row.undelivered,
        ]
        rows.append(cells)
    return ("model", "mode", "nonces", "nonces/s", "sd over tests", "valid, not delivered"), rows


def _published_spread(row: Configuration) -> str:
    rates = next((r for (name, mode), r in PUBLISHED.items() if name in row.model and mode == row.mode), None)
    if rates is None:
        return ""
    means = [sum(block) / len(block) for block in rates]
    return f"{max(means) - min(means):.1f} %"


def section(run: RunRecords) -> Section:
    """Return the valid rates of every configuration, the spreads with their noise bands, and the throughput."""
    found = configurations(run.cells)
    tables = {f"{row.model}, {row.mode}: valid rate per key": rate_table(row) for row in found}
    tables["Largest minus smallest valid rate of the blocks"] = spread_table(found)
    tables["Throughput of live services"] = throughput_table(found)
    about = (
        f"{len(run.cells)} tests, each a round of a live service over HTTP whose callbacks were counted. The noise "
        "band is where the spread falls when nothing differs but the nonces and the random head of every block, "
        "which widens or narrows all distances of the block, the more the fewer coordinates the states use. The "
        f"published limit of success is {PUBLISHED_LIMIT:.0%}; the published spreads come from other models, so they "
        "compare in kind, not in size."
    )
    return Section("Live services: how far apart are the valid rates of the blocks?", about, tables)
