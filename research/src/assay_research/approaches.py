"""Every approach of the published table, measured: does it break the model's structure, and can
cheaters still be told?

For a model and an approach:

- *distances* of nonces of several blocks: mean, standard deviation and tenth percentile against the
  chord law, and how far apart the valid rates of the blocks are at the r_target that gives all of
  them together the wanted rate;
- *separability*: what an honest node in bfloat16 and a cheater with int4 weights publish, against a
  validator in float32. An approach that amplifies noise makes the two alike;
- *cost*: time against the plain forward pass.

The model runs once for all approaches that agree on what happens between its layers.

Legend of shapes: N nonces, B blocks, K published numbers.
"""

import math
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import cache, partial
from itertools import product
from typing import Annotated, Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from pydantic import AfterValidator, Field
from scipy.stats import chi2, studentized_range

from assay import stats
from assay.files.jsonl import JsonObject
from assay.models.load import load_model
from assay.models.model import Model
from assay.poc import cheats
from assay.poc.engines.hf.engine import HFEngine, make_transform
from assay.poc.measurement import distances_to_target
from assay.poc.protocol.pipelines import FORWARD, Pipeline, get_pipeline
from assay.poc.protocol.round import Round
from assay.poc.protocol.transforms import unit
from assay.settings import Names
from assay.stats.chord import chord_mean, chord_std
from assay.stats.noise_laws import RESOLUTION
from assay_research.matrix import PUBLISHED_LIMIT
from assay_research.runs.report import Column, Section, Table, table_of
from assay_research.runs.runs import BLOCKS, Blocks, Dtype, ExperimentPlan, Measurement, RunRecords
from assay_research.runs.spread import spread_of
from assay_research.runs.states import effective_dimension, published, state_pipeline, states

KEY = "node_A"
STATE_NONCES = 256  # from which the effective dimension is measured
ALPHA = 0.01  # at which a deviation from the law, or between blocks, counts as structure
# the published valid rate; there the width of the distances counts, at one half it does not
TAIL_RATE = 0.1

FloatArray = npt.NDArray[np.float64]
MODES = ("trained", "random-all", "random-embed")


def _own_names(approaches: tuple[str, ...]) -> tuple[str, ...]:
    # sign-flips and poc-2.0 are two names of one approach.
    return tuple(get_pipeline(name).name for name in approaches) or FORWARD


class ApproachPlan(ExperimentPlan):
    """What is measured.

    Raises:
        UsageError: A list is empty or names something twice, a name is not that of an approach, or
            a number is out of range.
    """

    approaches: Annotated[Names, AfterValidator(_own_names)] = Field(
        FORWARD, description="Presets whose nonces are one forward pass, separated by commas."
    )
    blocks: Blocks = BLOCKS
    nonces: int = Field(1024, ge=2, description="Nonces per block.")
    valid_rate: float = Field(
        0.5, gt=0, lt=1, description="Share of valid nonces at the calibrated r_target."
    )
    checked: int = Field(
        64, ge=2, description="Nonces that the validator recomputes to measure separability."
    )
    timed: int = Field(
        5, ge=0, description="Batches for which every approach is timed; 0 skips the timing."
    )
    dtype: Dtype = None

    experiment = "approaches"
    least: ClassVar[Mapping[str, int]] = {"blocks": 2}
    choosing: ClassVar[frozenset[str]] = frozenset({"models", "approaches"})

    def groups(self) -> list[list[Pipeline]]:
        """Return the approaches, those together for which the model does the same."""
        groups: dict[tuple[object, ...], list[Pipeline]] = {}
        for name in self.approaches:
            pipeline = get_pipeline(name)
            groups.setdefault((pipeline.layers, pipeline.read, pipeline.texts), []).append(pipeline)
        return list(groups.values())

    def cells(self) -> Iterator[Measurement]:
        """Return every approach on every model; those of a group are measured with the first of
        them.
        """
        for reference, group in product(self.models, self.groups()):
            cells_of_group = cache(partial(_measure_group, self, reference, group))
            for pipeline in group:
                yield (
                    f"{reference} {pipeline.name}",
                    lambda name=pipeline.name, cells_of_group=cells_of_group: cells_of_group()[
                        name
                    ],
                )


def _measure_group(
    plan: ApproachPlan, reference: str, group: Sequence[Pipeline]
) -> dict[str, JsonObject]:
    """Return the values of every approach of a group by name."""
    model = load_model(reference, dtype=plan.dtype, device=plan.device)
    engine = _engine(plan, model)
    shape: dict[str, Any] = {"public_key": KEY, "seq_len": plan.seq_len, "preset": group[0].name}
    rounds = [Round(block_hash=block, **shape) for block in plan.blocks]
    published_rounds = [published(engine, round, group, range(plan.nonces)) for round in rounds]
    heads = [state_pipeline(pipeline) for pipeline in group if pipeline.head == "random"]
    count = min(STATE_NONCES, plan.nonces)
    reduced = published(engine, rounds[0], heads, range(count)) if heads else {}
    effective = {name: effective_dimension(states_ND) for name, states_ND in reduced.items()}
    slower = overheads(engine, rounds[0], group, plan.timed) if plan.timed else {}
    apart = _separability(plan, reference, rounds[0], group)
    sizes = {
        "hidden_size": model.hidden_size,
        "vocab_size": model.vocab_size,
        "num_layers": model.num_layers,
    }
    values = {}
    for pipeline in group:
        distances = {
            r.block_hash: distances_to_target(f[pipeline.name], r)
            for f, r in zip(published_rounds, rounds, strict=True)
        }
        size = pipeline.output_size(model.hidden_size, model.vocab_size)
        width = model.hidden_size if pipeline.head == "random" else None
        values[pipeline.name] = {
            "model": reference,
            "approach": pipeline.name,
            "summary": pipeline.summary,
            "dtype": engine.dtype,
            "per_nonce": any(step.name != "unit" for step in pipeline.hidden + pipeline.logits),
            **sizes,
            "overhead": slower.get(pipeline.name),
            "effective_dimension": effective.get(pipeline.name),
            **distribution(distances, size, plan.valid_rate, width, effective.get(pipeline.name)),
            **apart[pipeline.name],
        }
    return values


def _engine(plan: ApproachPlan, model: Model) -> HFEngine:
    return HFEngine(model, batch_size=plan.batch_size, seq_len=plan.seq_len)


def _separability(
    plan: ApproachPlan, reference: str, round: Round, group: Sequence[Pipeline]
) -> dict[str, JsonObject]:
    """Compare an honest bfloat16 node and a cheater with int4 weights, seen by a validator in
    float32.
    """
    honest = load_model(reference, dtype="bfloat16", device=plan.device)
    sides = {"honest": honest, "int4": cheats.rounded(honest, 4)}
    validator = load_model(reference, dtype="float32", device=plan.device)
    nonces = range(plan.checked)
    truth = published(_engine(plan, validator), round, group, nonces)
    claims = {
        side: published(_engine(plan, model), round, group, nonces) for side, model in sides.items()
    }
    return {
        pipeline.name: told_apart(
            *(residual_sizes(claims[side][pipeline.name], truth[pipeline.name]) for side in sides)
        )
        for pipeline in group
    }


def distribution(
    distances: Mapping[str, FloatArray],
    size: int,
    valid_rate: float,
    width: int | None,
    effective: float | None,
) -> JsonObject:
    """Hold the distances of every block [N], in a space of ``size`` dimensions, against the chord
    law and each other.

    ``width`` is the hidden size where a random head is drawn per block, and ``effective`` the
    effective dimension of the states in front of that head, where it is known.
    """
    blocks = list(distances.values())
    pooled = np.concatenate(blocks)
    # Block means against the chord law: offsets in standard errors, all of them together by χ².
    error = chord_std(size) / math.sqrt(blocks[0].size)
    z_B = (np.array([block.mean() for block in blocks]) - chord_mean(size)) / error
    p_law = float(chi2.sf(np.sum(z_B**2), len(z_B)))
    spreads = [
        _spread_at(rate, blocks, pooled, width, effective) for rate in (valid_rate, TAIL_RATE)
    ]
    return {
        "dimension": size,
        "nonces": pooled.size,
        **summary(pooled),
        "law": law_of(size),
        "mean_off_in_standard_errors": float(np.abs(z_B).max()),
        "p_law": p_law,
        "blocks": [{"block_hash": name, **summary(block)} for name, block in distances.items()],
        "spreads": spreads,
        "breaks_structure": _verdict(spreads[0]["spread"], spreads[0]["p_value"], p_law),
    }


def summary(distances_N: FloatArray) -> JsonObject:
    """Return mean, standard deviation and tenth percentile of distances [N]."""
    return {
        "mean": float(distances_N.mean()),
        "std": float(distances_N.std(ddof=1)),
        "p10": float(np.quantile(distances_N, 0.1)),
    }


def law_of(size: int) -> JsonObject:
    """Return the same three numbers by the chord law in ``size`` dimensions."""
    return {"mean": chord_mean(size), "std": chord_std(size), "p10": stats.r_target_for(0.1, size)}


def _spread_at(
    rate: float,
    distances: Sequence[FloatArray],
    pooled: FloatArray,
    width: int | None,
    effective: float | None,
) -> JsonObject:
    """Return the spread of the blocks at the r_target that makes a share ``rate`` of all nonces
    valid.

    ``noise_band`` is that of random directions, ``band_of_states`` that of states with their
    effective dimension.
    """
    r_target = float(np.quantile(pooled, rate))
    valid = [int(np.count_nonzero(block < r_target)) for block in distances]
    checked = [block.size for block in distances]
    spread = spread_of(valid, checked, width=width)
    wider = spread_of(valid, checked, width=effective) if effective else None
    return {
        "rate": rate,
        "r_target": r_target,
        "valid_rates": list(spread.rates),
        "spread": spread.value,
        "noise_band": [spread.low, spread.high],
        "p_value": spread.p_value,
        "band_of_states": wider and [wider.low, wider.high],
    }


def _verdict(spread: float, p_spread: float, p_law: float) -> str:
    """Say whether structure is left: yes it is broken, partly, or no.

    *yes*: neither the means nor the spread of the blocks can be told from chance, at 1 % each.
    *partly*: they can, but the spread is below the published limit of 5 %. *no*: it is not.
    """
    if min(p_spread, p_law) >= ALPHA:
        return "yes"
    return "partly" if spread < PUBLISHED_LIMIT else "no"


def residual_sizes(claimed: npt.NDArray[np.float32], truth: npt.NDArray[np.float32]) -> FloatArray:
    """Return |received − recomputed| of distances, or the L2 distance of vectors, [N]."""
    difference = claimed.astype(np.float64) - truth
    return (
        np.abs(difference)
        if difference.ndim == 1
        else np.asarray(np.linalg.norm(difference, axis=1))
    )


def told_apart(honest_N: FloatArray, cheat_N: FloatArray) -> JsonObject:
    """Return medians of both sides' residuals [N], their ratio, and how often a cheater's exceeds
    an honest one.

    The interval of 95 % of the last draws nonces, with both sides of each: they share a validator's
    value.
    """
    nonces = range(len(honest_N))
    auc = stats.group_bootstrap(stats.auroc, (cheat_N, honest_N), (nonces, nonces))
    return {
        "honest_residual": float(np.median(honest_N)),
        "int4_residual": float(np.median(cheat_N)),
        "separation": float(np.median(cheat_N) / max(np.median(honest_N), RESOLUTION)),
        "auc": auc.value,
        "auc_interval": [auc.low, auc.high],
    }


def overheads(
    engine: HFEngine, round: Round, group: Sequence[Pipeline], batches: int
) -> dict[str, float]:
    """Return the time of a batch with an approach over the plain forward pass, less one: the median
    of neighbours.
    """
    transforms = {pipeline.name: make_transform(engine, round, pipeline) for pipeline in group}
    nonces = range(engine.batch_size)

    def plain() -> float:
        started = time.perf_counter()
        engine.read(engine.embeddings(round.inputs(nonces))).cpu()  # waits for the device
        return time.perf_counter() - started

    def randomised(name: str) -> float:
        with engine.between_layers(group[0].layers, round):
            started = time.perf_counter()
            padded, x_BD = next(states(engine, transforms[name], nonces))
            transforms[name](x_BD, padded).cpu()
            return time.perf_counter() - started

    for name in transforms:
        randomised(name)  # compiles what the first call compiles
    ratios = {name: [randomised(name) / plain() for _ in range(batches)] for name in transforms}
    return {name: statistics.median(values) - 1 for name, values in ratios.items()}


def section(run: RunRecords) -> Section:
    """Return, per model, the distances against the law, the spread of the blocks, separability and
    cost.
    """
    tables: dict[str, Table] = {}
    for model in dict.fromkeys(cell["model"] for cell in run.cells):
        cells = [cell for cell in run.cells if cell["model"] == model]
        size = f"{cells[0]['nonces']} nonces of {len(cells[0]['blocks'])} blocks"
        tables[f"{model}: {size}"] = table_of(
            cells, _distances(*(spread["rate"] for spread in cells[0]["spreads"]))
        )
        tables[f"{model}: residuals against a float32 validator, medians, and cost"] = table_of(
            cells, RESIDUALS
        )
    about = (
        "Distances of every approach against those of a random direction. An approach breaks the "
        "structure where "
        "neither the block means nor the spread of the blocks can be told from chance at 1 % each "
        "(yes), or where the "
        "spread is at least below the published limit of 5 % (partly)."
    )
    heading = "Which approach breaks the structure of a trained model?"
    return Section(heading, about, tables, values={"approaches": run.cells})


def _distances(main: float, tail: float) -> dict[str, Column]:
    """Return the columns of distances, with the spreads of the blocks at two valid rates."""
    return {
        "approach": "approach",
        "mean": "{mean:.4f}",
        "sd": "{std:.4f}",
        "p10": "{p10:.4f}",
        "largest offset in SE": "{mean_off_in_standard_errors:.1f}",
        f"spread at {main:.0%}": "{spreads[0][spread]:.1%}",
        "noise band": lambda cell: _band(cell["spreads"][0]["noise_band"]),
        f"spread at {tail:.0%}": "{spreads[1][spread]:.1%}",
        "noise band there": lambda cell: _band(cell["spreads"][1]["noise_band"]),
        "band of its states": lambda cell: _band(cell["spreads"][1]["band_of_states"]),
        "breaks structure": "breaks_structure",
    }


def _band(ends: Sequence[float] | None) -> str | None:
    return None if ends is None else f"{ends[0]:.1%} to {ends[1]:.1%}"


def _known(name: str, form: str) -> Column:
    """Return the column of a value that may not be known."""
    return lambda cell: None if cell[name] is None else format(cell[name], form)


RESIDUALS: dict[str, Column] = {
    "approach": "approach",
    "honest bf16": "{honest_residual:.2g}",
    "int4 weights": "{int4_residual:.2g}",
    "ratio": "{separation:.1f}",
    "AUC": "{auc:.3f}",
    "95 % interval": "{auc_interval[0]:.3f} to {auc_interval[1]:.3f}",
    "effective dimension": _known("effective_dimension", ".0f"),
    "time over the plain pass": _known("overhead", ".1%"),
}


# Trained against random weights: is it training that gives distances their structure?
#
# The published tests 1 to 3: distances per block with trained weights, with all weights drawn anew
# for every block, and with only the input embeddings drawn anew (a head that is tied to them
# changes with them; one that is not stays).


class WeightPlan(ExperimentPlan):
    """What is measured. The models are trained ones.

    Raises:
        UsageError: A list is too short or names something twice, or a number is out of range.
    """

    preset: str = Field(
        "hidden-reflections", description="Preset of the rounds; this one had the published tests."
    )
    blocks: Blocks = BLOCKS
    nonces: int = Field(1024, ge=2, description="Nonces per block.")
    dtype: Dtype = None

    experiment = "weights"
    least: ClassVar[Mapping[str, int]] = {"blocks": 2}
    choosing: ClassVar[frozenset[str]] = frozenset({"models", "blocks"})

    def model_post_init(self, context: Any, /) -> None:
        """Check the preset and the lists."""
        get_pipeline(self.preset)
        super().model_post_init(context)

    def cells(self) -> Iterator[Measurement]:
        """Return every block of every weight mode of every model."""
        for cell in product(self.models, MODES, self.blocks):
            yield " ".join(cell), partial(_measure, self, *cell)


def _measure(plan: WeightPlan, reference: str, mode: str, block: str) -> JsonObject:
    drawn: dict[str, Any] = {} if mode == "trained" else {"block_hash": block}
    model = load_model(reference, dtype=plan.dtype, device=plan.device, weights=mode, **drawn)
    engine = HFEngine(model, batch_size=plan.batch_size, seq_len=plan.seq_len)
    pipeline = get_pipeline(plan.preset)
    round = Round(block_hash=block, public_key=KEY, seq_len=plan.seq_len, preset=pipeline.name)
    values = published(engine, round, [pipeline], range(plan.nonces))[pipeline.name]
    distances = distances_to_target(values, round)
    size = pipeline.output_size(model.hidden_size, model.vocab_size)
    return {
        "model": reference,
        "weights": mode,
        "block_hash": block,
        "dtype": engine.dtype,
        "nonces": distances.size,
        **summary(distances),
        "valid_rate": float((distances < chord_mean(size)).mean()),
        "context_effect": _context_effect(engine, round),
        "dimension": size,
        "law": law_of(size),
    }


def _context_effect(engine: HFEngine, round: Round) -> float:
    """Return how far the unit last state moves when the positions before the last are reversed,
    mean L2 distance.

    Two unrelated states are √2 apart; where this is zero, the layers do nothing that depends on the
    sequence.
    """
    inputs_BTD = engine.embeddings(round.inputs(range(engine.batch_size)))
    reversed_BTD = torch.cat([inputs_BTD[:, :-1].flip(1), inputs_BTD[:, -1:]], dim=1)
    before_BD, after_BD = (
        unit(engine.read(inputs_of_side)) for inputs_of_side in (inputs_BTD, reversed_BTD)
    )
    return float(torch.linalg.vector_norm(before_BD - after_BD, dim=-1).mean())


def weight_rows(cells: Sequence[JsonObject]) -> list[JsonObject]:
    """Compare block means by model and weight mode, in the order of measurement.

    The band in which 95 % of spreads lie when only the nonces differ, and the chance of such a
    spread or a larger one, are by the law of the range of normals (the studentised range without
    its denominator).
    """
    rows = []
    for name in dict.fromkeys((cell["model"], cell["weights"]) for cell in cells):
        group = [cell for cell in cells if (cell["model"], cell["weights"]) == name]
        if len(group) < 2:
            continue
        means = [cell["mean"] for cell in group]
        std = math.sqrt(float(np.mean([cell["std"] ** 2 for cell in group])))
        error = std / math.sqrt(group[0]["nonces"])
        spread = max(means) - min(means)
        law = studentized_range(len(group), np.inf)
        low, high = (error * float(law.ppf(q)) for q in (0.025, 0.975))
        rows.append(
            {
                "model": name[0],
                "weights": name[1],
                "blocks": [cell["block_hash"] for cell in group],
                "means": means,
                "std": std,
                "spread": spread,
                "low": low,
                "high": high,
                "p_value": float(law.sf(spread / error)),
                "context_effect": float(np.mean([cell["context_effect"] for cell in group])),
                "inside": spread <= high,
            }
        )
    return rows


def weight_section(run: RunRecords) -> Section:
    """Return block means per weight mode, and their spread with its noise band."""
    about = (
        f"Block means of the distance ({run.settings['preset']}) with trained weights, with all "
        f"weights drawn anew for "
        "every block, and with the input embeddings alone drawn anew. A head that is tied to the "
        "embeddings changes "
        "with them. Context is how far the unit state moves when the positions before the last "
        "are reversed; unrelated "
        "states are √2 apart. Near zero, distances say nothing about the layers."
    )
    rows = weight_rows(run.cells)
    columns: dict[str, Column] = {
        "model": "model",
        "weights": "weights",
        "block means": lambda row: ", ".join(f"{mean:.4f}" for mean in row["means"]),
        "sd": "{std:.4f}",
        "spread": "{spread:.4f}",
        "95 % noise band": "{low:.4f} to {high:.4f}",
        "p-value": "{p_value:.2g}",
        "context": "{context_effect:.2g}",
        "verdict": lambda row: "inside noise" if row["inside"] else "beyond noise",
    }
    tables = {"Largest minus smallest block mean of the distance": table_of(rows, columns)}
    return Section(
        "Does training give distances their structure?", about, tables, values={"rows": rows}
    )
