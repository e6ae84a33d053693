"""Trained against random weights: is it training that gives distances their structure?

The published tests 1 to 3: distances per block with trained weights, with all weights drawn anew for every block, and
with only the input embeddings drawn anew (a head that is tied to them changes with them; one that is not stays).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from pydantic import Field
from scipy.stats import studentized_range

from assay import stats
from assay.models import load_model
from assay.poc.engines.hf import HFEngine
from assay.poc.protocol import Round, get_pipeline, unit
from assay.poc.verdict import distances_from
from assay.reports import MUTED, SERIES, Badge, Cell, JsonObject, Report, figure, legend
from assay.research.approaches._approaches import KEY, law_of, summary
from assay.research.runs import (
    BLOCKS,
    Blocks,
    ExperimentPlan,
    Progress,
    RunRecords,
    Table,
    measure_missing,
    published,
)
from assay.settings import Dtype

MODES = ("trained", "random-all", "random-embed")


class WeightPlan(ExperimentPlan):
    """What is measured. The models are trained ones.

    Raises:
        UsageError: A list is too short or names something twice, or a number is out of range.
    """

    preset: str = Field("hidden-reflections", description="Preset of the rounds; this one had the published tests.")
    blocks: Blocks = BLOCKS
    nonces: int = Field(1024, ge=2, description="Nonces per block.")
    dtype: Dtype = None

    least: ClassVar[Mapping[str, int]] = {"blocks": 2}
    choosing: ClassVar[frozenset[str]] = frozenset({"models", "blocks"})

    def model_post_init(self, context: Any, /) -> None:
        """Check the preset and the lists."""
        get_pipeline(self.preset)
        super().model_post_init(context)


def run_weights(plan: WeightPlan, folder: Path, *, progress: Progress | None = None) -> None:
    """Measure the cells that the run's folder does not have yet, and append them to ``weights.jsonl``.

    A cell is a model, a weight mode and a block.

    Args:
        plan: Plan that says what is measured.
        folder: Folder of the run.
        progress: Function that is called with (cells done, cells in all).

    Raises:
        UsageError: The run was begun with other settings.
        ModelError: A model cannot be loaded.
    """
    cells = [(" ".join(cell), partial(_measure, plan, *cell)) for cell in product(plan.models, MODES, plan.blocks)]
    measure_missing(folder, "weights", plan.settings, cells, progress)


def _measure(plan: WeightPlan, reference: str, mode: str, block: str) -> JsonObject:
    drawn: dict[str, Any] = {} if mode == "trained" else {"block_hash": block}
    model = load_model(reference, dtype=plan.dtype, device=plan.device, weights=mode, **drawn)
    engine = HFEngine(model, batch_size=plan.batch_size, seq_len=plan.seq_len)
    pipeline = get_pipeline(plan.preset)
    round = Round(block_hash=block, public_key=KEY, seq_len=plan.seq_len, preset=pipeline.name)
    values = published(engine, round, [pipeline], range(plan.nonces))[pipeline.name]
    distances = distances_from(values, round)
    size = pipeline.output_size(model.hidden_size, model.vocab_size)
    return {
        "model": reference,
        "weights": mode,
        "block_hash": block,
        "dtype": engine.dtype,
        "nonces": distances.size,
        **summary(distances),
        "valid_rate": float((distances < stats.chord_mean(size)).mean()),
        "context_effect": _context_effect(engine, round),
        "dimension": size,
        "law": law_of(size),
    }


def _context_effect(engine: HFEngine, round: Round) -> float:
    """Return how far the unit last state moves when the positions before the last are reversed, mean L2 distance.

    Two unrelated states are √2 apart; where this is zero, the layers do nothing that depends on the sequence.
    """
    inputs_BTD = engine.inputs(round, range(engine.batch_size))
    reversed_BTD = torch.cat([inputs_BTD[:, :-1].flip(1), inputs_BTD[:, -1:]], dim=1)
    before_BD, after_BD = (unit(engine.read(given)) for given in (inputs_BTD, reversed_BTD))
    return float(torch.linalg.vector_norm(before_BD - after_BD, dim=-1).mean())


@dataclass(frozen=True)
class WeightRow:
    """The blocks of a model in a weight mode.

    Args:
        model: Reference of the model.
        weights: Weight mode, one of `MODES`.
        blocks: Block hashes.
        means: Mean distance per block.
        std: Standard deviation of the distances within a block.
        spread: Largest minus smallest mean.
        low, high: Ends of the band in which 95 % of spreads lie when only the nonces differ.
        p_value: Probability of such a spread or a larger one by chance.
        context_effect: Mean distance that the unit state moves when the earlier positions are reversed.
    """

    model: str
    weights: str
    blocks: tuple[str, ...]
    means: tuple[float, ...]
    std: float
    spread: float
    low: float
    high: float
    p_value: float
    context_effect: float

    @property
    def inside(self) -> bool:
        """Whether the spread is not larger than chance makes it."""
        return self.spread <= self.high


def weight_rows(cells: Sequence[JsonObject]) -> list[WeightRow]:
    """Group cells by model and weight mode, in the order of measurement."""
    names = list(dict.fromkeys((cell["model"], cell["weights"]) for cell in cells))
    grouped = [[c for c in cells if (c["model"], c["weights"]) == name] for name in names]
    return [_row(group) for group in grouped if len(group) > 1]


def _row(cells: Sequence[JsonObject]) -> WeightRow:
    """Compare block means by the law of the range of normals (the studentised range without its denominator)."""
    means = [cell["mean"] for cell in cells]
    std = math.sqrt(float(np.mean([cell["std"] ** 2 for cell in cells])))
    error, spread = std / math.sqrt(cells[0]["nonces"]), max(means) - min(means)
    law = studentized_range(len(cells), np.inf)
    return WeightRow(
        model=cells[0]["model"],
        weights=cells[0]["weights"],
        blocks=tuple(cell["block_hash"] for cell in cells),
        means=tuple(means),
        std=std,
        spread=spread,
        low=error * float(law.ppf(0.025)),
        high=error * float(law.ppf(0.975)),
        p_value=float(law.sf(spread / error)),
        context_effect=float(np.mean([cell["context_effect"] for cell in cells])),
    )


def weight_table(rows: Sequence[WeightRow]) -> Table:
    """Return block means per weight mode, their spread with its noise band, and the verdict."""
    cells: list[list[Cell]] = [
        [
            row.model,
            row.weights,
            ", ".join(f"{mean:.4f}" for mean in row.means),
            f"{row.std:.4f}",
            f"{row.spread:.4f}",
            f"{row.low:.4f} to {row.high:.4f}",
            f"{row.p_value:.2g}",
            f"{row.context_effect:.2g}",
            "inside noise" if row.inside else "beyond noise",
        ]
        for row in rows
    ]
    columns = ("model", "weights", "block means", "sd", "spread", "95 % noise band", "p-value", "context", "verdict")
    return columns, cells


def draw(report: Report, run: RunRecords) -> None:
    """Add block means per weight mode, their spread with its noise band, and a plot."""
    rows = weight_rows(run.cells)
    report.section("Does training give distances their structure?")
    report.paragraph(
        f"Block means of the distance ({run.settings['preset']}) with trained weights, with all weights drawn anew for "
        "every block, and with the input embeddings alone drawn anew. A head that is tied to the embeddings changes "
        "with them."
    )
    _plot(report, run.cells)
    columns, cells = weight_table(rows)
    for row, shown in zip(rows, cells, strict=True):
        shown[-1] = Badge(str(shown[-1]), "pass" if row.inside else "fail")
    report.table(columns, cells, caption="Largest minus smallest block mean of the distance")
    report.paragraph(
        "Context: how far the unit state moves when the positions before the last are reversed; unrelated states are "
        "√2 apart. Near zero, the model passes its last input through, and distances say nothing about its layers."
    )


def _plot(report: Report, cells: Sequence[JsonObject]) -> None:
    fig, ax = figure(6.8, 3.2)
    modes = list(dict.fromkeys(cell["weights"] for cell in cells))
    models = list(dict.fromkeys(cell["model"] for cell in cells))
    for index, mode in enumerate(modes):
        for place, model in enumerate(models):
            chosen = [cell for cell in cells if (cell["model"], cell["weights"]) == (model, mode)]
            x = [place + 0.25 * (index - 1) + 0.05 * i for i in range(len(chosen))]
            error = [2 * cell["std"] / math.sqrt(cell["nonces"]) for cell in chosen]
            label = mode if place == 0 else None
            means = [cell["mean"] for cell in chosen]
            ax.errorbar(x, means, error, fmt="o", color=SERIES[index], markersize=5, capsize=3, label=label)
    ax.axhline(cells[0]["law"]["mean"], color=MUTED, linewidth=1, linestyle=":")
    ax.set_xticks(range(len(models)), models)
    ax.set_ylabel("mean distance of a block")
    legend(ax)
    report.figure(fig, "Mean distance per block, with two standard errors; dotted: mean of the chord law.")
