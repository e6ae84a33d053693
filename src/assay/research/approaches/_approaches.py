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

from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator, Field

from assay.models import Model, load_model
from assay.poc.engines.hf import HFEngine
from assay.poc.protocol import PIPELINES, Pipeline, Round, get_pipeline
from assay.poc.verdict import distances_from
from assay.reports import JsonObject
from assay.research import cheats
from assay.research.approaches._measures import (
    distribution,
    memory,
    overheads,
    residual_sizes,
    tensor_parallel,
    told_apart,
)
from assay.research.runs import (
    BLOCKS,
    Blocks,
    ExperimentPlan,
    Progress,
    effective_dimension,
    open_run,
    published,
    state_pipeline,
)
from assay.settings import Dtype, Names

__all__ = ["APPROACHES", "ApproachPlan", "run_approaches"]

APPROACHES = tuple(PIPELINES)

KEY = "node_A"
STATE_NONCES = 256  # from which the effective dimension is measured


def _own_names(approaches: tuple[str, ...]) -> tuple[str, ...]:
    # sign-flips and poc-2.0 are two names of one approach.
    return tuple(get_pipeline(name).name for name in approaches) or APPROACHES


class ApproachPlan(ExperimentPlan):
    """What is measured.

    Raises:
        UsageError: A list is empty or names something twice, a name is not that of an approach, or a number is out of
            range.
    """

    approaches: Annotated[Names, AfterValidator(_own_names)] = Field(
        APPROACHES, description="Presets, separated by commas; by default all of them."
    )
    blocks: Blocks = BLOCKS
    nonces: int = Field(1024, ge=2, description="Nonces per block.")
    valid_rate: float = Field(0.5, gt=0, lt=1, description="Share of valid nonces at the calibrated r_target.")
    checked: int = Field(64, ge=2, description="Nonces that the validator recomputes to measure separability.")
    timed: int = Field(5, ge=0, description="Batches for which every approach is timed; 0 skips the timing.")
    dtype: Dtype = None

    least: ClassVar[Mapping[str, int]] = {"models": 1, "approaches": 1, "blocks": 2}
    choosing: ClassVar[frozenset[str]] = frozenset({"models", "approaches"})

    def groups(self) -> list[list[Pipeline]]:
        """Return the approaches, those together for which the model does the same."""
        groups: dict[tuple[object, ...], list[Pipeline]] = {}
        for name in self.approaches:
            pipeline = get_pipeline(name)
            groups.setdefault((pipeline.layers, pipeline.read, pipeline.texts), []).append(pipeline)
        return list(groups.values())


def run_approaches(plan: ApproachPlan, folder: Path, *, progress: Progress | None = None) -> None:
    """Measure the cells that the run's folder does not have yet, and append them to ``approaches.jsonl``.

    Args:
        plan: Plan that says what is measured.
        folder: Folder of the run.
        progress: Function that is called with (cells done, cells in all).

    Raises:
        UsageError: The run was begun with other settings.
        ModelError: A model cannot be loaded.
    """
    with open_run(folder, "approaches", plan.settings) as run:
        total = len(plan.models) * len(plan.approaches)
        for reference, group in product(plan.models, plan.groups()):
            todo = [pipeline for pipeline in group if f"{reference} {pipeline.name}" not in run.done]
            for values in _measure_group(plan, reference, todo) if todo else ():
                run.append(f"{reference} {values['approach']}", values)
                if progress:
                    progress(len(run.done), total)


def _measure_group(plan: ApproachPlan, reference: str, group: Sequence[Pipeline]) -> Iterator[JsonObject]:
    """Give the values of every approach of a group."""
    model = load_model(reference, dtype=plan.dtype, device=plan.device)
    engine = _engine(plan, model)
    shape: dict[str, Any] = {"public_key": KEY, "seq_len": plan.seq_len, "preset": group[0].name}
    rounds = [Round(block_hash=block, **shape) for block in plan.blocks]
    found = [published(engine, round, group, range(plan.nonces)) for round in rounds]
    heads = [state_pipeline(pipeline) for pipeline in group if pipeline.head == "random"]
    count = min(STATE_NONCES, plan.nonces)
    reduced = published(engine, rounds[0], heads, range(count)) if heads else {}
    effective = {name: effective_dimension(states_ND) for name, states_ND in reduced.items()}
    slower = overheads(engine, rounds[0], group, plan.timed) if plan.timed else {}
    apart = _separability(plan, reference, rounds[0], group)
    sizes = {"hidden_size": model.hidden_size, "vocab_size": model.vocab_size, "num_layers": model.num_layers}
    for pipeline in group:
        distances = {r.block_hash: distances_from(f[pipeline.name], r) for f, r in zip(found, rounds, strict=True)}
        size = pipeline.output_size(model.hidden_size, model.vocab_size)
        width = model.hidden_size if pipeline.head == "random" else None
        yield {
            "model": reference,
            "approach": pipeline.name,
            "summary": pipeline.summary,
            "dtype": engine.dtype,
            "per_nonce": pipeline.per_nonce,
            "tensor_parallel": tensor_parallel(pipeline),
            "pipeline_parallel": True,  # whatever acts between the layers is drawn from the block, on every stage
            **sizes,
            **memory(pipeline, seq_len=plan.seq_len, **sizes),
            "overhead": slower.get(pipeline.name),
            "effective_dimension": effective.get(pipeline.name),
            **distribution(distances, size, plan.valid_rate, width, effective.get(pipeline.name)),
            **apart[pipeline.name],
        }


def _engine(plan: ApproachPlan, model: Model) -> HFEngine:
    return HFEngine(model, batch_size=plan.batch_size, seq_len=plan.seq_len)


def _separability(plan: ApproachPlan, reference: str, round: Round, group: Sequence[Pipeline]) -> dict[str, JsonObject]:
    """Compare an honest bfloat16 node and a cheater with int4 weights, seen by a validator in float32."""
    honest = load_model(reference, dtype="bfloat16", device=plan.device)
    sides = {"honest": honest, "int4": cheats.rounded(honest, 4)}
    validator = load_model(reference, dtype="float32", device=plan.device)
    nonces = range(plan.checked)
    truth = published(_engine(plan, validator), round, group, nonces)
    claims = {side: published(_engine(plan, model), round, group, nonces) for side, model in sides.items()}
    return {
        pipeline.name: told_apart(
            *(residual_sizes(claims[side][pipeline.name], truth[pipeline.name]) for side in sides)
        )
        for pipeline in group
    }
