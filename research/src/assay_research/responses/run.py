"""The experiment: every cheat on every model against our methods and the rivals, resumable cell by
cell.

What is decided before any number is seen:

- All methods score the same responses, and all of them know the same honest ones.
- *At a threshold*: the number of tokens is known in advance, and the threshold of each method is
  the one that one in a thousand audits of the very honest responses that test it exceeds. No method
  can be given more.
- *Sequential*: ours as it is used. Laws come from the other half of the honest responses, the scale
  of the prover is not known better than they show it, and it may be accused after every 32 tokens
  of its life.
- A cheat is caught where 99 % of its audits are accused. The table has the number of tokens by
  then.
- What must hold: honest audits accused at most 1 in 1000; int4 weights within 300 tokens by margins
  and 64 by sketches, each within as many tokens as the best rival that publishes no more bytes; on
  every model.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import ClassVar

import numpy as np
from pydantic import Field as Setting

from assay.files.jsonl import JsonObject
from assay.pages.report import Cell
from assay.poc.responses.sampling import Sampling
from assay.settings import Names
from assay_research.responses.cheats import CHEATS, GREEDY, HONEST, STOPPED, Cheat
from assay_research.responses.field import (
    BYTES,
    CHEAT_AUDITS,
    GRID,
    OURS,
    Checked,
    Field,
    share_accused,
)
from assay_research.responses.provers import TRAINED_LIKE, reads_text
from assay_research.runs.report import Column, Curves, Section, Table, table_of
from assay_research.runs.runs import ExperimentPlan, Measurement, RunRecords

AUDITS = 2000
SAMPLED = "sampled"
GREEDILY = "greedy"
PAIRS = (("float32", "float32"), ("bfloat16", "bfloat16"), ("float32", "bfloat16"))
"""Dtypes of prover and verifier whose honest audits are simulated too."""

CLASSES = {
    "no bytes": tuple(name for name, size in BYTES.items() if size == 0),
    "0.75 bytes": tuple(name for name, size in BYTES.items() if 0 < size <= OURS["sketches"]),
    "more bytes": tuple(name for name, size in BYTES.items() if size > OURS["sketches"]),
}
"""Methods by what they publish per token."""
CURVES = ("int4 weights", "fp8 weights", "int8 weights", "int4 tokens that lead by 2")
DRAWN = ("margins", "sketches", "Token-DiFR", "Activation-DiFR, 1 in 32", "TOPLOC, top 128")


class ResponsesPlan(ExperimentPlan):
    """What is measured.

    Raises:
        UsageError: A number is out of range, or a list is empty.
    """

    models: Names = Setting(
        ("reference:qwen3", "reference:llama", TRAINED_LIKE),
        description=f"Models, separated by commas; {TRAINED_LIKE} has random weights and logits "
        f"like trained ones.",
    )
    dtypes: Names = Setting(
        ("bfloat16",),
        description="Dtypes of provers and cheats, separated by commas; the verifier has float32.",
    )
    # The shortest responses have three sketches, and a law takes 16 of one half.
    honest: int = Setting(
        64, ge=12, description="Honest responses, one half to calibrate and one to test."
    )
    responses: int = Setting(12, ge=2, description="Responses of every cheat.")
    prompt_tokens: int = Setting(32, ge=16, description="Tokens of every prompt.")
    seq_len: int = Setting(256, ge=STOPPED + 1, description="Tokens of every response.")
    batch_size: int = Setting(24, ge=12, description="Responses of an honest pair of dtypes.")
    temperature: float = Setting(1.0, gt=0, description="Temperature that requests ask for.")
    top_p: float = Setting(
        0.95, gt=0, le=1, description="Probability of the kept tokens that requests ask for."
    )

    experiment = "responses"
    choosing: ClassVar[frozenset[str]] = frozenset({"models", "dtypes", "device"})

    def cells(self) -> Iterator[Measurement]:
        """Return every cheat on every model and dtype, sampled and greedy, and honest provers of
        other kinds.
        """
        for reference in self.models:
            for dtype in self.dtypes:
                field = self.field(reference, dtype)
                yield from _field_cells(field, SAMPLED, CHEATS)
                yield f"{reference}/{dtype}/others", partial(_others, field)
                yield from _field_cells(
                    replace(field, sampling=Sampling(temperature=0.0)), GREEDILY, GREEDY
                )
            for prover, verifier in PAIRS:
                yield (
                    f"{reference}/{prover} for {verifier}",
                    partial(_pair, self, reference, prover, verifier),
                )

    def field(self, reference: str, dtype: str) -> Field:
        """Return a model and a dtype of provers, with sampling."""
        return Field(
            reference=reference,
            dtype=dtype,
            device=self.device,
            honest=self.honest,
            responses=self.responses,
            prompt_tokens=self.prompt_tokens,
            steps=self.seq_len,
            sampling=Sampling(temperature=self.temperature, top_p=self.top_p),
        )


def _field_cells(field: Field, mode: str, cheats: Sequence[Cheat]) -> Iterator[Measurement]:
    prefix = f"{field.reference}/{field.dtype}/{mode}"
    who = {"model": field.reference, "dtype": field.dtype, "mode": mode}
    yield f"{prefix}/honest", lambda: {**who, "kind": "honest", **_honest(field)}
    for cheat in cheats:
        if not cheat.reads_text or reads_text(field.reference):
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
    margins_N = np.concatenate([response.replayed.margins for response in responses])
    residuals_S = np.concatenate([response.replayed.residuals for response in responses])
    return {
        "responses": len(responses),
        "matches": float(np.mean(margins_N == 0)),
        "residual_median": float(np.median(residuals_S)),
    }


def _accused(field: Field, responses: Sequence[Checked]) -> JsonObject:
    """Return the share of honest audits that each of our tests accuses within the grid."""
    return share_accused(field.sequential(responses, AUDITS))


def _cheat(field: Field, mode: str, cheat: Cheat) -> JsonObject:
    served = cheat.serve(field.scene, field.asked)
    checks = field.checked(served)
    return {
        "model": field.reference,
        "dtype": field.dtype,
        "mode": mode,
        "kind": "cheat",
        "name": cheat.name,
        "family": cheat.family,
        "asked": served.asked,
        "audits": CHEAT_AUDITS,
        **_described(checks),
        "methods": field.caught(checks),
    }


def _others(field: Field) -> JsonObject:
    """Audit provers that answer honestly in other batches and with other kernels, under the same
    law.
    """
    rows = {
        name: _accused(field, field.checked(serve(field.scene, field.asked)))
        for name, serve in HONEST.items()
    }
    return {
        "model": field.reference,
        "dtype": field.dtype,
        "kind": "others",
        "audits": AUDITS,
        "provers": rows,
    }


def _pair(plan: ResponsesPlan, reference: str, prover: str, verifier: str) -> JsonObject:
    """Audit honest provers of one dtype by verifiers of another, under a law of that pair."""
    honest = 2 * (plan.batch_size // 2)
    field = replace(
        plan.field(reference, prover), honest=honest, responses=1, verifier_dtype=verifier
    )
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


# The tables of the experiment, for the terminal, the documentation and the page of a run.

Cells = Iterable[JsonObject]
Place = tuple[str, str, str]
"""Model, dtype of provers, and whether tokens are sampled or greedy."""


def _of(cells: Cells, kind: str, place: Place | None = None) -> Iterator[JsonObject]:
    for cell in cells:
        if cell.get("kind") == kind and place in (
            None,
            (cell.get("model"), cell.get("dtype"), cell.get("mode")),
        ):
            yield cell


def places(cells: Cells) -> list[Place]:
    """Return the models, dtypes and modes that honest responses were measured on."""
    return [(cell["model"], cell["dtype"], cell["mode"]) for cell in _of(cells, "honest")]


def caught_table(cells: Cells, place: Place) -> Table:
    """Return, for every cheat, the tokens until it is caught by ours, and at a threshold by every
    method.
    """
    columns: dict[str, Column] = {"cheat": "name", "tokens that match": "{matches:.1%}"}
    columns |= {f"{name}, sequential": _after(name, "sequential_99") for name in OURS}
    columns |= {name: _after(name, "threshold_99") for name in BYTES}
    return table_of(_of(cells, "cheat", place), columns)


def _after(method: str, figure: str) -> Column:
    return lambda cell: _needs(cell["methods"][method][figure])


def honest_table(cells: Cells) -> Table:
    """Return how often honest provers match the verifier's tokens, and how many of their audits
    ours accuse.
    """
    provers = [
        (f"{cell['dtype']} for float32, {cell['mode']}", cell) for cell in _of(cells, "honest")
    ]
    provers += [(f"{cell['prover']} for {cell['verifier']}", cell) for cell in _of(cells, "pair")]
    rows: list[list[Cell]] = [
        [
            cell["model"],
            name,
            f"{cell['matches']:.2%}",
            f"{cell['residual_median']:.4f}",
            *_shares_accused(cell),
        ]
        for name, cell in provers
    ]
    for cell in _of(cells, "others"):
        for name, accused in cell["provers"].items():
            named = {"audits": cell["audits"], "accused": accused}
            rows.append(
                [
                    cell["model"],
                    f"{cell['dtype']} for float32, {name}",
                    "",
                    "",
                    *_shares_accused(named),
                ]
            )
    columns = (
        "model",
        "prover",
        "tokens that match",
        "median residual",
        "audits",
        *(f"accused, {n}" for n in OURS),
    )
    return columns, rows


def standing_table(cells: Cells) -> Table:
    """Return, for int4 weights, our figures beside the best rival of the same bytes."""
    rows: list[list[Cell]] = []
    for place in places(cells):
        for cell in _of(cells, "cheat", place):
            if cell["name"] == "int4 weights":
                rows += [[*place[::2], *row] for row in _standing(cell["methods"])]
    return (
        "model",
        "tokens",
        "bytes per token",
        "ours",
        "sequential",
        "at a threshold",
        "best rival",
        "needs",
    ), rows


def _standing(methods: JsonObject) -> Iterator[list[Cell]]:
    for ours, rivals in (
        ("margins", CLASSES["no bytes"]),
        ("sketches", CLASSES["no bytes"] + CLASSES["0.75 bytes"]),
    ):
        others = {name: methods[name]["threshold_99"] for name in rivals if name not in OURS}
        best = min(others, key=lambda name: others[name] or float("inf"))
        ours_row = methods[ours]
        figures = (ours_row["sequential_99"], ours_row["threshold_99"])
        yield [f"{OURS[ours]:g}", ours, *map(_needs, figures), best, _needs(others[best])]


def _shares_accused(cell: JsonObject) -> list[Cell]:
    return [cell["audits"], *(f"{cell['accused'][name]:.2%}" for name in OURS)]


def _needs(tokens: int | None) -> Cell:
    return tokens if tokens is not None else "never"


def section(run: RunRecords) -> Section:
    """Return what honest provers show, how soon every cheat is caught by each method, and
    curves.
    """
    cells = run.cells
    tables: dict[str, Table] = {
        "Bytes per token": (
            ("method", "bytes per token"),
            [[name, f"{size:.2f}"] for name, size in BYTES.items()],
        ),
        "int4 weights: tokens until 99 % are caught": standing_table(cells),
        "Honest provers": honest_table(cells),
    }
    for place in places(cells):
        tables[f"{', '.join(place)}: tokens until 99 % of the audits are accused"] = caught_table(
            cells, place
        )
    about = (
        "All methods score the same responses. 'Sequential' is our test as it is used; every "
        "other column is a method "
        "with the threshold that one in a thousand honest audits exceed, for a number of tokens "
        "known in advance."
    )
    curves = [_curves(cell) for cell in _of(cells, "cheat") if cell["name"] in CURVES]
    return Section("Red team: served responses", about, tables, curves, {"cells": cells})


def _curves(cell: JsonObject) -> Curves:
    lines = {}
    for name in DRAWN:
        lines[name] = (GRID, cell["methods"][name]["shares"])
        if "sequential" in cell["methods"][name]:
            lines[f"-{name}"] = (GRID, cell["methods"][name]["sequential"])
    where = ", ".join((cell["name"], cell["model"], cell["dtype"], cell["mode"]))
    caption = f"{where}: share caught at a threshold (solid) and sequentially (dashed)."
    return Curves(caption, "tokens checked", "share caught", lines)
