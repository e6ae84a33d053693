"""Trained against random weights: is it training that gives distances their structure?

The published tests 1 to 3: distances per block with trained weights, with all weights drawn anew for every block, and
with only the input embeddings drawn anew (a head that is tied to them changes with them; one that is not stays).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import Field
from scipy.stats import studentized_range

from assay import stats
from assay.models import load_model
from assay.poc.engines.hf import HFEngine
from assay.poc.protocol import Round, get_pipeline, unit
from assay.poc.verdict import distances_from
from assay.reports import JsonObject
from assay.research.runs import BLOCKS, Blocks, ExperimentPlan, check_lists, open_run, published
from assay.settings import Dtype

__all__ = ["MODES", "WeightPlan", "WeightRow", "run_weights", "weight_rows"]

MODES = ("trained", "random-all", "random-embed")
KEY = "node_A"

Progress = Callable[[int, int], None]


class WeightPlan(ExperimentPlan):
    """What is measured. The models are trained ones.

    Raises:
        UsageError: A list is too short or names something twice, or a number is out of range.
    """

    preset: str = Field("hidden-reflections", description="Preset of the rounds; this one had the published tests.")
    blocks: Blocks = BLOCKS
    nonces: int = Field(1024, ge=2, description="Nonces per block.")
    dtype: Dtype = None

    def model_post_init(self, context: Any, /) -> None:
        """Check the preset and the lists."""
        get_pipeline(self.preset)
        check_lists(self, models=1, blocks=2)

    @property
    def settings(self) -> JsonObject:
        """What must be the same for all cells of a run."""
        names = ("preset", "nonces", "seq_len", "batch_size", "dtype", "device")
        return {name: getattr(self, name) or "default" for name in names}


def run_weights(plan: WeightPlan, folder: Path, *, progress: Progress | None = None) -> None:
    """Measure the cells that the run's folder does not have yet, and append them to ``weights.jsonl``.

    A cell is a model, a weight mode and a block.

    Args:
        plan: what is measured.
        folder: Folder of the run.
        progress: called with cells done and cells in all.

    Raises:
        UsageError: the run was begun with other settings.
        ModelError: a model cannot be loaded.
    """
    cells = [(model, mode, block) for model in plan.models for mode in MODES for block in plan.blocks]
    with open_run(folder, "weights", plan.settings) as run:
        for done, cell in enumerate(cells, 1):
            if " ".join(cell) not in run.done:
                run.append(" ".join(cell), _measure(plan, *cell))
            if progress:
                progress(done, len(cells))


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
        "mean": float(distances.mean()),
        "std": float(distances.std(ddof=1)),
        "p10": float(np.quantile(distances, 0.1)),
        "valid_rate": float((distances < stats.chord_mean(size)).mean()),
        "context_effect": _context_effect(engine, round),
        "dimension": size,
        "law": {"mean": stats.chord_mean(size), "std": stats.chord_std(size), "p10": stats.r_target_for(0.1, size)},
    }


def _context_effect(engine: HFEngine, round: Round) -> float:
    """Return how far the unit last state moves when the positions before the last are reversed, mean L2 distance.

    Two unrelated states are √2 apart; where this is zero, the layers do nothing that depends on the sequence.
    """
    inputs_BTD = engine.inputs(round, range(engine.batch_size))
    reversed_BTD = torch.cat([inputs_BTD[:, :-1].flip(1), inputs_BTD[:, -1:]], dim=1)
    before_BD, after_BD = (unit(engine.last_hidden(given)) for given in (inputs_BTD, reversed_BTD))
    return float(torch.linalg.vector_norm(before_BD - after_BD, dim=-1).mean())


@dataclass(frozen=True)
class WeightRow:
    """The blocks of a model in a weight mode.

    Args:
        model: reference.
        weights: weight mode.
        blocks: block hashes.
        means: mean distance per block.
        std: Standard deviation of the distances within a block.
        spread: largest minus smallest mean.
        low: lower end of the band in which 95 % of spreads lie when only the nonces differ.
        high: its upper end.
        p_value: probability of such a spread or a larger one by chance.
        context_effect: mean distance that the unit state moves when the earlier positions are reversed.
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
