"""Every approach of the published table, measured: does it break the model's structure, and can cheaters still be told?

For a model and an approach:

- *distances* of nonces of several blocks: mean, standard deviation and tenth percentile against the chord law, and how
  far apart the valid rates of the blocks are at the r_target that gives all of them together the wanted rate;
- *separability*: what an honest node in bfloat16 and a cheater with int4 weights publish, against a validator in
  float32. An approach that amplifies noise makes the two alike;
- *cost*: random numbers per nonce and per block, and time against the plain forward pass.

The model runs once for all approaches that agree on what happens between its layers.

Legend of shapes: N nonces, B blocks, K published numbers.
"""

import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from assay import stats
from assay.errors import UsageError
from assay.models import Model, load_model
from assay.poc import cheats
from assay.poc._pipelines import PIPELINES, LayerStep, Pipeline, get_pipeline
from assay.poc._round import Round
from assay.poc._rtarget import distances_from
from assay.poc.engines import Engine, HFEngine
from assay.poc.experiments._cost import memory, pipeline_parallel, tensor_parallel
from assay.poc.experiments._matrix_table import PUBLISHED_LIMIT
from assay.poc.experiments._runs import Run, open_run
from assay.poc.experiments._spread import effective_dimension, spread_of
from assay.poc.experiments._states import make_transform, published, state_pipeline, states
from assay.reports import JsonObject

__all__ = ["APPROACHES", "ApproachPlan", "run_approaches"]

APPROACHES = tuple(PIPELINES)

ALPHA = 0.01  # at which a deviation from the law, or between blocks, counts as structure
KEY = "node_A"
STATE_NONCES = 256  # from which the effective dimension is measured
TAIL_RATE = 0.1  # the published valid rate; there the width of the distances counts, at one half it does not
HISTOGRAM_BINS = 40

FloatArray = npt.NDArray[np.float64]
Progress = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True)
class ApproachPlan:
    """What is measured.

    Args:
        models: references.
        approaches: names of pipelines.
        blocks: block hashes, at least two.
        nonces: nonces per block.
        valid_rate: share of all nonces that the calibrated r_target makes valid.
        checked: nonces from which separability is measured.
        seq_len: input positions per nonce.
        batch_size: nonces per forward pass.
        timed: batches for which every approach is timed; 0 skips it.
        dtype: of the models whose distances are measured; None is each one's own.
        device: cpu or cuda; None is the best there is.

    Raises:
        UsageError: a list is empty or names something twice, an approach is none, or a number is out of range.
    """

    models: tuple[str, ...]
    approaches: tuple[str, ...] = APPROACHES
    blocks: tuple[str, ...] = ("block_alpha", "block_beta", "block_gamma")
    nonces: int = 1024
    valid_rate: float = 0.5
    checked: int = 64
    seq_len: int = 256
    batch_size: int = 32
    timed: int = 5
    dtype: str | None = None
    device: str | None = None

    def __post_init__(self) -> None:
        for name, least in (("models", 1), ("approaches", 1), ("blocks", 2)):
            values = getattr(self, name)
            if len(values) < least or len(set(values)) < len(values):
                raise UsageError(f"{name} {values!r:.80}", wanted=f"{least} or more, each once", do=f"correct --{name}")
        for name in self.approaches:
            get_pipeline(name)
        if self.nonces < 2 or self.checked < 2 or self.timed < 0 or not 0 < self.valid_rate < 1:
            raise UsageError(
                f"{self.nonces} nonces, {self.checked} checked, {self.timed} timed, valid rate {self.valid_rate}",
                wanted="at least 2 nonces and 2 checked, and a rate between 0 and 1",
                do="leave them out for the defaults",
            )

    @property
    def settings(self) -> JsonObject:
        """What must be the same for all cells of a run."""
        names = ("blocks", "nonces", "valid_rate", "checked", "seq_len", "batch_size", "timed")
        chosen = {name: getattr(self, name) for name in names}
        return chosen | {name: getattr(self, name) or "default" for name in ("dtype", "device")}

    def groups(self) -> list[list[Pipeline]]:
        """Return the approaches, those together for which the model does the same."""
        groups: dict[tuple[object, ...], list[Pipeline]] = {}
        for name in self.approaches:
            pipeline = get_pipeline(name)
            groups.setdefault((pipeline.layers, pipeline.read, pipeline.texts), []).append(pipeline)
        return list(groups.values())

    def rounds(self, preset: str) -> list[Round]:
        """Return one round per block."""
        return [Round(block_hash=b, public_key=KEY, seq_len=self.seq_len, preset=preset) for b in self.blocks]


def run_approaches(plan: ApproachPlan, folder: Path, *, progress: Progress | None = None) -> None:
    """Measure the cells that the run's folder does not have yet, and append them to ``approaches.jsonl``.

    Args:
        plan: what is measured.
        folder: of the run.
        progress: called with cells done and cells in all.

    Raises:
        UsageError: the run was begun with other settings.
        ModelError: a model cannot be loaded.
    """
    with open_run(folder, "approaches", plan.settings) as run:
        total = len(plan.models) * len(plan.approaches)
        for reference in plan.models:
            for group in _missing(run, plan, reference):
                for values in _measure_group(plan, reference, group):
                    run.append(_key(reference, values["approach"]), values)
                    if progress:
                        progress(len(run.done), total)


def _key(reference: str, approach: str) -> str:
    return f"{reference} {approach}"


def _missing(run: Run, plan: ApproachPlan, reference: str) -> Iterator[list[Pipeline]]:
    for group in plan.groups():
        todo = [pipeline for pipeline in group if _key(reference, pipeline.name) not in run.done]
        if todo:
            yield todo


def _measure_group(plan: ApproachPlan, reference: str, group: Sequence[Pipeline]) -> Iterator[JsonObject]:
    """Give the values of every approach of a group."""
    model = load_model(reference, dtype=plan.dtype, device=plan.device)
    engine = _engine(plan, model)
    rounds = plan.rounds(group[0].name)
    found = [published(engine, round, group, range(plan.nonces)) for round in rounds]
    heads = [state_pipeline(pipeline) for pipeline in group if pipeline.head == "random"]
    count = min(STATE_NONCES, plan.nonces)
    reduced = published(engine, rounds[0], heads, range(count)) if heads else {}
    effective = {name: effective_dimension(states_ND) for name, states_ND in reduced.items()}
    slower = _overheads(plan, engine, rounds[0], group) if plan.timed else {}
    apart = _separability(plan, reference, rounds[0], group)
    for pipeline in group:
        distances = [distances_from(f[pipeline.name], round) for f, round in zip(found, rounds, strict=True)]
        yield {
            "model": reference,
            "approach": pipeline.name,
            "summary": pipeline.summary,
            "dtype": engine.dtype,
            "per_nonce": pipeline.per_nonce,
            "tensor_parallel": tensor_parallel(pipeline),
            "pipeline_parallel": pipeline_parallel(pipeline),
            **_costs(plan, pipeline, model),
            "overhead": slower.get(pipeline.name),
            "effective_dimension": effective.get(pipeline.name),
            **_distribution(plan, pipeline, model, distances, effective.get(pipeline.name)),
            **apart[pipeline.name],
        }


def _engine(plan: ApproachPlan, model: Model) -> HFEngine:
    return HFEngine(model, batch_size=plan.batch_size, seq_len=plan.seq_len)


def _costs(plan: ApproachPlan, pipeline: Pipeline, model: Model) -> JsonObject:
    sizes = {"hidden_size": model.hidden_size, "vocab_size": model.vocab_size, "num_layers": model.num_layers}
    held = memory(pipeline, seq_len=plan.seq_len, **sizes)
    return {**sizes, "bytes_per_nonce": held.per_nonce, "bytes_per_block": held.per_block}


def _distribution(
    plan: ApproachPlan, pipeline: Pipeline, model: Model, distances: Sequence[FloatArray], effective: float | None
) -> JsonObject:
    """Hold the distances of every block, [B] arrays [N], against the chord law and against each other."""
    size = pipeline.output_size(model.hidden_size, model.vocab_size)
    pooled = np.concatenate(distances)
    off, p_law = _off_the_law([block.mean() for block in distances], distances[0].size, size)
    width = model.hidden_size if pipeline.head == "random" else None
    spreads = [_spread_at(rate, distances, pooled, width, effective) for rate in (plan.valid_rate, TAIL_RATE)]
    counts, edges = np.histogram(pooled, HISTOGRAM_BINS)
    return {
        "dimension": size,
        "nonces": pooled.size,
        **_summary(pooled),
        "law": {"mean": stats.chord_mean(size), "std": stats.chord_std(size), "p10": stats.r_target_for(0.1, size)},
        "mean_off_in_standard_errors": off,
        "p_law": p_law,
        "blocks": [{"block_hash": n, **_summary(d)} for n, d in zip(plan.blocks, distances, strict=True)],
        "spreads": spreads,
        "breaks_structure": _verdict(spreads[0]["spread"], spreads[0]["p_value"], p_law),
        "histogram": {"counts": counts.tolist(), "low": float(edges[0]), "high": float(edges[-1])},
    }


def _summary(distances_N: FloatArray) -> JsonObject:
    return {
        "mean": float(distances_N.mean()),
        "std": float(distances_N.std(ddof=1)),
        "p10": float(np.quantile(distances_N, 0.1)),
    }


def _spread_at(
    rate: float, distances: Sequence[FloatArray], pooled: FloatArray, width: int | None, effective: float | None
) -> JsonObject:
    """Return the spread of the blocks at the r_target that makes a share ``rate`` of all nonces valid.

    ``noise_band`` is that of random directions, ``band_of_states`` that of states with their effective dimension.
    """
    r_target = float(np.quantile(pooled, rate))
    valid = [int(np.count_nonzero(block < r_target)) for block in distances]
    checked = [block.size for block in distances]
    found = spread_of(valid, checked, width=width)
    wider = spread_of(valid, checked, width=effective) if effective else None
    return {
        "rate": rate,
        "r_target": r_target,
        "valid_rates": list(found.rates),
        "spread": found.value,
        "noise_band": [found.low, found.high],
        "p_value": found.p_value,
        "band_of_states": wider and [wider.low, wider.high],
    }


def _off_the_law(means: Sequence[float], n: int, size: int) -> tuple[float, float]:
    """Test block means [B] of n distances against the chord law: the largest offset in standard errors, and χ²'s p."""
    from scipy.stats import chi2

    error = stats.chord_std(size) / math.sqrt(n)
    z_B = (np.asarray(means) - stats.chord_mean(size)) / error
    return float(np.abs(z_B).max()), float(chi2.sf(np.sum(z_B**2), len(z_B)))


def _verdict(spread: float, p_spread: float, p_law: float) -> str:
    """Say whether structure is left: yes it is broken, partly, or no.

    *yes*: neither the means nor the spread of the blocks can be told from chance, at 1 % each. *partly*: they can, but
    the spread is below the published limit of 5 %. *no*: it is not.
    """
    if min(p_spread, p_law) >= ALPHA:
        return "yes"
    return "partly" if spread < PUBLISHED_LIMIT else "no"


def _separability(plan: ApproachPlan, reference: str, round: Round, group: Sequence[Pipeline]) -> dict[str, JsonObject]:
    """Compare an honest bfloat16 node and a cheater with int4 weights, seen by a validator in float32."""
    honest = load_model(reference, dtype="bfloat16", device=plan.device)
    sides = {"honest": honest, "int4": cheats.rounded(honest, 4)}
    validator = load_model(reference, dtype="float32", device=plan.device)
    nonces = range(plan.checked)
    truth = published(_engine(plan, validator), round, group, nonces)
    claims = {side: published(_engine(plan, model), round, group, nonces) for side, model in sides.items()}
    return {
        pipeline.name: _told_apart(
            *(_residual_sizes(claims[side][pipeline.name], truth[pipeline.name]) for side in sides)
        )
        for pipeline in group
    }


def _residual_sizes(claimed: npt.NDArray[np.float32], truth: npt.NDArray[np.float32]) -> FloatArray:
    """|received − recomputed| of distances, or the L2 distance of vectors, [N]."""
    difference = claimed.astype(np.float64) - truth
    return np.abs(difference) if difference.ndim == 1 else np.asarray(np.linalg.norm(difference, axis=1))


def _told_apart(honest_N: FloatArray, cheat_N: FloatArray) -> JsonObject:
    return {
        "honest_residual": float(np.median(honest_N)),
        "int4_residual": float(np.median(cheat_N)),
        "separation": float(np.median(cheat_N) / max(np.median(honest_N), stats.RESOLUTION)),
        "auc": stats.auroc(cheat_N, honest_N),
    }


def _overheads(plan: ApproachPlan, engine: Engine, round: Round, group: Sequence[Pipeline]) -> dict[str, float]:
    """Return the time of a batch with an approach over the plain forward pass, less one: the median of neighbours."""
    transforms = {pipeline.name: make_transform(engine, round, pipeline) for pipeline in group}

    def seconds(layers: LayerStep, name: str, *, publish: bool) -> float:
        with engine.between_layers(layers, round):
            started = time.perf_counter()
            padded, x_BD = next(states(engine, transforms[name], range(engine.batch_size)))
            values = transforms[name](x_BD, padded) if publish else x_BD
            values.cpu()  # waits for the device
            return time.perf_counter() - started

    for name in transforms:  # compiles what the first call compiles
        seconds(group[0].layers, name, publish=True)
    ratios: dict[str, list[float]] = {name: [] for name in transforms}
    for _ in range(plan.timed):
        for name in transforms:
            plain = seconds("none", name, publish=False)
            ratios[name].append(seconds(group[0].layers, name, publish=True) / plain)
    return {name: statistics.median(values) - 1 for name, values in ratios.items()}
