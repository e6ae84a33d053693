"""The experiment: every cheat on every model against our methods and the rivals, resumable cell by cell.

What is decided before any number is seen:

- All methods score the same responses, and all of them know the same honest ones.
- *At a threshold*: the number of tokens is known in advance, and the threshold of each method is the one that one in a
  thousand audits of the very honest responses that test it exceeds. No method can be given more.
- *Sequential*: ours as it is used. Laws come from the other half of the honest responses, the scale of the prover is
  not known better than they show it, and it may be accused after every 32 tokens of its life.
- A cheat is caught where 99 % of its audits are accused. The table has the number of tokens by then.
- What must hold: honest audits accused at most 1 in 1000; int4 weights within 300 tokens by margins and 64 by sketches,
  each within as many tokens as the best rival that publishes no more bytes; on every model.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import ClassVar

import numpy as np
from pydantic import Field as Setting

from assay.files.jsonl import JsonObject
from assay.poc.responses.sampling import Sampling
from assay.settings import Names
from assay_research.responses.cheats import CHEATS, GREEDY, HONEST, STOPPED, Cheat
from assay_research.responses.check import Checked
from assay_research.responses.field import CHEAT_AUDITS, Field
from assay_research.responses.models import TRAINED_LIKE
from assay_research.runs.runs import ExperimentPlan, Progress, measure_missing

EXPERIMENT = "responses"
"""Name of the experiment and of its file in a run."""
AUDITS = 2000
SAMPLED, GREEDILY = "sampled", "greedy"
PAIRS = (("float32", "float32"), ("bfloat16", "bfloat16"), ("float32", "bfloat16"))
"""Dtypes of prover and verifier whose honest audits are simulated too."""

Cell = tuple[str, Callable[[], JsonObject]]


class ResponsesPlan(ExperimentPlan):
    """What is measured.

    Raises:
        UsageError: A number is out of range, or a list is empty.
    """

    models: Names = Setting(
        ("reference:qwen3", "reference:llama", TRAINED_LIKE),
        description=f"Models, separated by commas; {TRAINED_LIKE} has random weights and logits like trained ones.",
    )
    dtypes: Names = Setting(
        ("bfloat16",), description="Dtypes of provers and cheats, separated by commas; the verifier has float32."
    )
    # The shortest responses have three sketches, and a law takes 16 of one half.
    honest: int = Setting(64, ge=12, description="Honest responses, one half to calibrate and one to test.")
    responses: int = Setting(12, ge=2, description="Responses of every cheat.")
    prompt_tokens: int = Setting(32, ge=16, description="Tokens of every prompt.")
    seq_len: int = Setting(256, ge=STOPPED + 1, description="Tokens of every response.")
    batch_size: int = Setting(24, ge=12, description="Responses of an honest pair of dtypes.")
    temperature: float = Setting(1.0, gt=0, description="Temperature that requests ask for.")
    top_p: float = Setting(0.95, gt=0, le=1, description="Probability of the kept tokens that requests ask for.")

    choosing: ClassVar[frozenset[str]] = frozenset({"models", "dtypes", "device"})


def run_responses(plan: ResponsesPlan, folder: Path, *, progress: Progress | None = None) -> None:
    """Measure what is missing in a run's folder.

    Raises:
        UsageError: The folder holds a run with other settings.
        StorageError: The file cannot be written.
    """
    measure_missing(folder, EXPERIMENT, plan.settings, _cells(plan), progress)


def _cells(plan: ResponsesPlan) -> Iterator[Cell]:
    for reference in plan.models:
        for dtype in plan.dtypes:
            field = _field(plan, reference, dtype, Sampling(temperature=plan.temperature, top_p=plan.top_p))
            yield from _field_cells(field, SAMPLED, CHEATS)
            yield f"{reference}/{dtype}/others", partial(_others, field)
            yield from _field_cells(_field(plan, reference, dtype, Sampling(temperature=0.0)), GREEDILY, GREEDY)
        for prover, verifier in PAIRS:
            yield f"{reference}/{prover} for {verifier}", partial(_pair, plan, reference, prover, verifier)


def _field(plan: ResponsesPlan, reference: str, dtype: str, sampling: Sampling) -> Field:
    return Field(
        reference=reference,
        dtype=dtype,
        device=plan.device,
        honest=plan.honest,
        responses=plan.responses,
        prompt_tokens=plan.prompt_tokens,
        steps=plan.seq_len,
        sampling=sampling,
    )


def _field_cells(field: Field, mode: str, cheats: Sequence[Cheat]) -> Iterator[Cell]:
    prefix = f"{field.reference}/{field.dtype}/{mode}"
    who = {"model": field.reference, "dtype": field.dtype, "mode": mode}
    yield f"{prefix}/honest", lambda: {**who, "kind": "honest", **_honest(field)}
    for cheat in cheats:
        if field.scene.reads_text or not cheat.reads_text:
            yield f"{prefix}/{cheat.name}", partial(_cheat, field, mode, cheat)


def _honest(field: Field) -> JsonObject:
    """Describe the honest noise, and how often ours accuse in the half that did not calibrate."""
    return {
        **_described(field.halves[1]),
        "sigma": field.sigma,
        "noise": field.ours.noise.as_dict(),
        "audits": AUDITS,
        "accused": _accused(field, field.halves[1]),
    }


def _described(responses: Sequence[Checked]) -> JsonObject:
    margins_N = np.concatenate([one.replayed.margins for one in responses])
    residuals_S = np.concatenate([one.replayed.residuals for one in responses])
    return {
        "responses": len(responses),
        "matches": float(np.mean(margins_N == 0)),
        "residual_median": float(np.median(residuals_S)),
    }


def _accused(field: Field, responses: Sequence[Checked]) -> JsonObject:
    """Return the share of honest audits that each of our tests accuses within the grid."""
    found = field.sequential(responses, AUDITS)
    return {name: float(np.isfinite(tokens_A).mean()) for name, tokens_A in found.items()}


def _cheat(field: Field, mode: str, cheat: Cheat) -> JsonObject:
    served = cheat.serve(field.scene, field.asked)
    found = field.checked(served)
    return {
        "model": field.reference,
        "dtype": field.dtype,
        "mode": mode,
        "kind": "cheat",
        "name": cheat.name,
        "family": cheat.family,
        "asked": served.asked,
        "audits": CHEAT_AUDITS,
        **_described(found),
        "methods": field.caught(found),
    }


def _others(field: Field) -> JsonObject:
    """Audit provers that answer honestly in other batches and with other kernels, under the same law."""
    rows = {name: _accused(field, field.checked(serve(field.scene, field.asked))) for name, serve in HONEST.items()}
    return {"model": field.reference, "dtype": field.dtype, "kind": "others", "audits": AUDITS, "provers": rows}


def _pair(plan: ResponsesPlan, reference: str, prover: str, verifier: str) -> JsonObject:
    """Audit honest provers of one dtype by verifiers of another, under a law of that pair."""
    field = _field(plan, reference, prover, Sampling(temperature=plan.temperature, top_p=plan.top_p))
    field = replace(field, honest=2 * (plan.batch_size // 2), responses=1, verifier_dtype=verifier)
    testing = field.halves[1]
    return {
        "model": reference,
        "kind": "pair",
        "prover": prover,
        "verifier": verifier,
        **_described(testing),
        "audits": AUDITS,
        "accused": _accused(field, testing),
    }
