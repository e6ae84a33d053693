"""The experiment: every attacker against every preset, on each model, resumable cell by cell.

Legend of shapes: N nonces, C checked nonces, R trials, D hidden size.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
from pydantic import Field as Setting

from assay import stats
from assay.files.jsonl import JsonObject
from assay.poc.engines.hf.engine import HFEngine
from assay.poc.protocol.pipelines import get_pipeline
from assay.settings import Names
from assay.stats.chord import RANDOM_HEAD_ROWS, chord_mean, chord_std
from assay.streams import DTYPES
from assay_research.redteam.attacks import ATTACKS, Attack, Invented, OnEngine
from assay_research.redteam.field import (
    CHECKED,
    PRESETS,
    Field,
    Judge,
    Pool,
    Reading,
    best_test,
    detection,
    mixed,
    spread,
)
from assay_research.runs.report import Curves, Section, Table, or_never, table_of
from assay_research.runs.runs import ExperimentPlan, Measurement, RunRecords

AUDITS = 2000
AUDITED = 64  # nonces of a simulated audit, as `verify` checks by default
OTHER_SHAPE = 5
JUNK_SHARES = (0.01, 0.02, 0.05, 0.1, 0.2)
SCREENS = ("first 50.0% dropped", "first 75.0% dropped", "first 87.5% dropped")
R_TARGETS = (1.416, 1.404)
DRAWN = 200_000  # distances of a simulated screening

FloatArray = npt.NDArray[np.float64]
SAVED = 0.25
CURVES = (
    "int8 weights",
    "int4 weights",
    "first 25.0% dropped",
    "first 50.0% dropped",
    "last 25.0% dropped",
)


class RedteamPlan(ExperimentPlan):
    """What is measured.

    Raises:
        UsageError: A number is out of range, or a list is empty.
    """

    dtypes: Names = Setting(
        ("bfloat16",),
        description="Dtypes of provers and attackers, separated by commas; the validator has "
        "float32, or float8 too.",
    )
    nonces: int = Setting(64, ge=8, description="Nonces that every attacker answers.")
    honest: int = Setting(
        384, ge=64, description="Honest nonces, one half to calibrate and one to test."
    )
    block_hash: str = Setting("block_alpha", description="Block of the attacked rounds.")
    seq_len: int = Setting(256, ge=16, description="Input positions per nonce.")
    batch_size: int = Setting(16, ge=4, description="Nonces per forward pass.")

    experiment = "redteam"
    choosing: ClassVar[frozenset[str]] = frozenset({"models", "dtypes", "device"})
    known: ClassVar[Mapping[str, Sequence[str]]] = {"dtypes": (*DTYPES, "float8")}

    def cells(self) -> Iterator[Measurement]:
        """Return every attacker on every model and dtype."""
        shape = self.model_dump(include={"device", "block_hash", "seq_len", "batch_size", "honest"})
        for reference, dtype in product(self.models, self.dtypes):
            field = Field(reference=reference, dtype=dtype, **shape)
            yield from _field_cells(self, field, f"{reference}/{dtype}")


def _field_cells(plan: RedteamPlan, field: Field, prefix: str) -> Iterator[Measurement]:
    who = {"model": field.reference, "dtype": field.dtype}
    yield f"{prefix}/honest", lambda: {**who, "kind": "honest", **_honest(field)}
    yield f"{prefix}/audits", lambda: {**who, "kind": "audits", "engines": _audits(field)}
    for attack in (attack for attack in ATTACKS if attack.serves(field.dtype)):
        yield f"{prefix}/{attack.name}", partial(attacked, field, attack, plan.nonces)

    def claims() -> JsonObject:
        """Measure what a node can do with results instead of with the model, against every
        preset.
        """
        rows = [row for claim in (_junk, _replays, _selective) for row in claim(field, plan.nonces)]
        return {**who, "kind": "claims", "rows": rows}

    yield f"{prefix}/claims", claims


def _honest(field: Field) -> JsonObject:
    """Describe the honest noise and the calibrated rules."""
    rows = {}
    for preset, reading, x_ND in field.each():
        judge, (_, testing_N) = field.judges[preset], field.honest_residuals[preset]
        rows[preset] = {
            **spread(reading.errors(x_ND), testing_N),
            "law": judge.noise.as_dict(),
            "threshold": judge.threshold,
            "honest_mismatch_rate": judge.honest_rate,
        }
    return {"nonces": field.honest, "presets": rows}


def attacked(field: Field, attack: Attack, nonces: int) -> JsonObject:
    """Return what an attack costs, how far off it is, and after how many nonces each rule catches
    it, by preset.
    """
    program = attack.make(field.scene)
    rows = {}
    for reading in (
        open_reading
        for open_reading in field.readings
        if not (attack.last_unknown and open_reading.last)
    ):
        x_ND = reading.states(program, field.engine, nonces)
        errors_N = reading.errors(x_ND)
        for preset in reading.presets:
            residuals_N = reading.residuals(preset, x_ND)
            honest_N = field.honest_residuals[preset][1]
            rows[preset] = {
                **spread(errors_N, residuals_N),
                "auc": stats.auroc(np.abs(residuals_N), np.abs(honest_N)),
                **detection(field.judges[preset], mixed(attack.share, residuals_N, honest_N)),
                "best_99": best_test(honest_N, residuals_N),
            }
    return {
        "model": field.reference,
        "dtype": field.dtype,
        "kind": "attack",
        "name": attack.name,
        "family": attack.family,
        "cost": program.cost,
        "skips": attack.skips,
        "nonces": nonces,
        "presets": rows,
    }


def _audits(field: Field) -> JsonObject:
    """Simulate audits of honest nodes: another dtype, other kernels, another batch shape."""
    plain = field.load()
    eager = field.load()
    eager.module.set_attn_implementation("eager")
    engines = {
        "sdpa": field.engine_of(plain),
        "plain attention": field.engine_of(eager),
        f"sdpa, batches of {OTHER_SHAPE}": HFEngine(
            plain, batch_size=OTHER_SHAPE, seq_len=field.seq_len
        ),
    }
    return {f"{field.dtype}, {name}": _audited(field, engine) for name, engine in engines.items()}


def _audited(field: Field, engine: HFEngine) -> JsonObject:
    rng = np.random.default_rng(0)
    rows: JsonObject = {}
    for reading in field.readings:
        x_ND = reading.states(OnEngine(engine), engine, field.honest)
        for preset in reading.presets:
            residuals_N = reading.residuals(preset, x_ND)
            half = len(residuals_N) // 2
            judge = Judge(get_pipeline(preset), residuals_N[:half])
            drawn_RC = rng.permuted(np.tile(residuals_N[half:], (AUDITS, 1)), axis=1)[:, :AUDITED]
            rows[preset] = {
                "audits": AUDITS,
                "nonces": AUDITED,
                "accused": judge.accused(drawn_RC),
                "published_rule": judge.published(drawn_RC),
            }
    return rows


def _junk(field: Field, nonces: int) -> Iterator[JsonObject]:
    """Invent a share of the nonces: the best constant for distances, random vectors otherwise."""
    for reading in field.readings:
        x_ND = reading.states(Invented(field.scene), field.engine, nonces)
        for preset in reading.presets:
            invented_N = reading.residuals(preset, x_ND)
            if preset == "poc-2.0":
                invented_N = chord_mean(RANDOM_HEAD_ROWS) - reading.published(
                    preset, reading.recomputed(nonces)
                )
            for share in JUNK_SHARES:
                pool = mixed(share, invented_N, field.honest_residuals[preset][1])
                yield {
                    "claim": f"{share:.0%} invented",
                    "preset": preset,
                    **_row(field, preset, pool, 1 - share),
                }


def _replays(field: Field, nonces: int) -> Iterator[JsonObject]:
    """Replay the honest results of another node, or of the same node in another block."""
    for name, change in (
        ("another key", {"public_key": "node_B"}),
        ("another block", {"block_hash": "block_beta"}),
    ):
        for reading in field.readings:
            theirs = Reading(field.validator, replace(reading.round, **change), reading.presets)  # type: ignore[arg-type]
            x_ND = theirs.states(OnEngine(field.engine), field.engine, nonces)
            for preset in reading.presets:
                received = theirs.published(preset, x_ND)
                pool = Pool(((1.0, reading.residuals_of(preset, received)),))
                yield {
                    "claim": f"replay of {name}",
                    "preset": preset,
                    **_row(field, preset, pool, 0.0),
                }


def _selective(field: Field, nonces: int) -> Iterator[JsonObject]:
    """Run the honest pass only for nonces that a cheap look says are valid; whatever is handed in
    is exact.
    """
    reading = field.readings[0]
    for attack in ATTACKS:
        if attack.name not in SCREENS:
            continue
        program = attack.make(field.scene)
        residuals_N = reading.residuals("poc-2.0", reading.states(program, field.engine, nonces))
        for r_target in R_TARGETS:
            share, cost = screened(residuals_N, program.cost, r_target)
            yield {
                "claim": f"screening, {attack.name}, "
                f"{stats.valid_rate(r_target, RANDOM_HEAD_ROWS):.0%} valid",
                "preset": "poc-2.0",
                "cost": cost,
                "kept": share,
                "sequential_99": None,
                "counting_99": None,
            }


def screened(residuals_N: FloatArray, cost: float, r_target: float) -> tuple[float, float]:
    """Simulate screening: a cheap distance, off by ``residuals_N``, decides whether the exact one
    is computed at all.

    Returns the share of the valid nonces that are found, and the work per found nonce over that of
    an honest node.
    """
    rng = np.random.default_rng(0)
    exact_R = rng.normal(chord_mean(RANDOM_HEAD_ROWS), chord_std(RANDOM_HEAD_ROWS), DRAWN)
    looked_R = exact_R + rng.choice(residuals_N, DRAWN) < r_target
    valid_R = exact_R < r_target
    share = float((looked_R & valid_R).sum() / valid_R.sum())
    return share, float((cost + looked_R.mean()) / share) if share else float("inf")


def _row(field: Field, preset: str, pool: Pool, cost: float) -> JsonObject:
    return {"cost": cost, **detection(field.judges[preset], pool)}


# The tables of the experiment, for the terminal, the documentation and the page of a run.


Cells = Iterable[JsonObject]


def _of(cells: Cells, kind: str, **wanted: str) -> Iterator[JsonObject]:
    for cell in cells:
        if cell.get("kind") == kind and all(cell[name] == value for name, value in wanted.items()):
            yield cell


def fields(cells: Cells) -> list[tuple[str, str]]:
    """Return the models and dtypes that every attacker was measured on."""
    return [(cell["model"], cell["dtype"]) for cell in _of(cells, "claims")]


def honest_errors(cells: Cells, model: str, dtype: str) -> dict[str, float]:
    """Return the mean ε of honest provers by preset."""
    cell = next(_of(cells, "honest", model=model, dtype=dtype))
    return {preset: values["error_mean"] for preset, values in cell["presets"].items()}


def paying(cells: Cells, model: str, dtype: str, preset: str) -> dict[str, Any]:
    """Return the attack with the least error among those that save a quarter of the work by
    skipping.
    """
    paying_rows = [
        {"name": cell["name"], "cost": cell["cost"], **cell["presets"][preset]}
        for cell in _of(cells, "attack", model=model, dtype=dtype)
        if cell["skips"]
        and round(cell["cost"], 2) <= 1 - SAVED
        and preset in cell["presets"]  # as tables show it
    ]
    best = min(paying_rows, key=lambda row: float(row["error_mean"]))
    honest = honest_errors(cells, model, dtype)[preset]
    slowest = [row["sequential_99"] for row in paying_rows]
    return {
        "model": model,
        "dtype": dtype,
        "preset": preset,
        "attack": best["name"],
        "cost": best["cost"],
        "error": best["error_mean"],
        "over_honest": best["error_mean"] / honest,
        "checked_99": None if None in slowest else max(slowest),
    }


def paying_table(cells: Cells) -> Table:
    """Return, per model, dtype and preset, the attack that saves a quarter of the work at the
    smallest error.
    """
    rows = [paying(cells, *place, preset) for place in fields(cells) for preset in PRESETS]
    columns = {
        **{name: name for name in ("model", "dtype", "preset")},
        "attack of the least error": "attack",
        "cost": "{cost:.2f}",
        "ε": "{error:.3f}",
        "over honest": "{over_honest:.1f}",
        "checked": or_never("checked_99"),
    }
    return table_of(rows, columns)


def attack_table(cells: Cells, model: str, dtype: str, preset: str) -> Table:
    """Return every attack against a preset, with the nonces to check until each rule catches 99
    %.
    """
    honest = honest_errors(cells, model, dtype)[preset]
    rows = [
        cell for cell in _of(cells, "attack", model=model, dtype=dtype) if preset in cell["presets"]
    ]
    columns = {
        "attack": "name",
        "cost": "{cost:.2f}",
        "ε": "{error_mean:.3f}",
        "over honest": lambda row: f"{row['error_mean'] / honest:.1f}",
        "residual": "{residual_rms:.2g}",
        "AUC": "{auc:.3f}",
        "sequential": or_never("sequential_99"),
        "count": or_never("counting_99"),
    }
    return table_of([cell | cell["presets"][preset] for cell in rows], columns)


def claim_table(cells: Cells, model: str, dtype: str) -> Table:
    """Return what a node can claim without running the model, and the nonces to check until each
    rule catches it.
    """
    rows = [row for cell in _of(cells, "claims", model=model, dtype=dtype) for row in cell["rows"]]
    caught = {"sequential": or_never("sequential_99"), "count": or_never("counting_99")}
    return table_of(
        rows, {"claim": "claim", "preset": "preset", "work per nonce": "{cost:.2f}", **caught}
    )


def audit_table(cells: Cells, model: str, dtype: str) -> Table:
    """Return how many simulated audits of honest provers accuse them."""
    rows = [
        {"prover": engine, "preset": preset, **row}
        for cell in _of(cells, "audits", model=model, dtype=dtype)
        for engine, presets in cell["engines"].items()
        for preset, row in presets.items()
    ]
    accused = {
        "accused by the sequential test": "{accused:.2%}",
        "by the published constants": "{published_rule:.1%}",
    }
    return table_of(rows, {"prover": "prover", "preset": "preset", "audits": "audits", **accused})


def section(run: RunRecords) -> Section:
    """Return which attack pays, the tables of every model and dtype, and the curves of
    detection.
    """
    tables = {"Attacks that save a quarter of the work by skipping": paying_table(run.cells)}
    curves = []
    for place in fields(run.cells):
        where = ", ".join(place)
        for preset in PRESETS:
            tables[f"{where}, {preset}: nonces to check until 99 % are caught"] = attack_table(
                run.cells, *place, preset
            )
        tables[f"{where}: claims without a model"] = claim_table(run.cells, *place)
        tables[f"{where}: simulated audits of honest nodes"] = audit_table(run.cells, *place)
        curves.append(_curves(run.cells, *place))
    about = (
        "Among attacks that save a quarter of the work by skipping, the one with the smallest "
        "error ε of the unit "
        "state that is read. 'Checked' is the number of recomputed nonces after which the "
        "sequential test accuses the "
        "hardest of them with 99 %, at one false accusation in a thousand."
    )
    paying_cells = [
        paying(run.cells, *place, preset) for place in fields(run.cells) for preset in PRESETS
    ]
    return Section("Red team: which attack pays?", about, tables, curves, {"paying": paying_cells})


def _curves(cells: Cells, model: str, dtype: str) -> Curves:
    lines: dict[str, tuple[tuple[int, ...], list[float]]] = {}
    for cell in _of(cells, "attack", model=model, dtype=dtype):
        if cell["name"] in CURVES:
            preset = "poc-2.0" if "poc-2.0" in cell["presets"] else "hardened"
            name = f"{cell['name']}, {preset}"
            values = cell["presets"][preset]
            lines |= {
                name: (CHECKED, values["sequential"]),
                f"-{name}": (CHECKED, values["counting"]),
            }
    caption = (
        f"{model}, {dtype}: caught by the sequential test (solid) and by the calibrated count "
        f"(dashed)."
    )
    return Curves(caption, "nonces checked", "share of attackers caught", lines)
