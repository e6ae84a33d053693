"""The experiment: every attacker against every preset, on each model, resumable cell by cell.

Legend of shapes: N nonces, C checked nonces.
"""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import Field as Setting

from assay import stats
from assay.models import load_model
from assay.poc.engines.hf import HFEngine
from assay.poc.protocol import get_pipeline
from assay.poc.verdict import law_as_dict
from assay.research.redteam._attacks import ATTACKS, Attack, OnEngine
from assay.research.redteam._claims import claims
from assay.research.redteam._detect import Judge, detection, mixed, spread
from assay.research.redteam._experts import experts
from assay.research.redteam._field import Field
from assay.research.redteam._search import search
from assay.research.runs import ExperimentPlan, check_lists, open_run
from assay.settings import Names

__all__ = ["RedteamPlan", "run_redteam"]

AUDITS = 2000
AUDITED = 64  # nonces of a simulated audit, as `verify` checks by default
OTHER_SHAPE = 5

FloatArray = npt.NDArray[np.float64]
Progress = Callable[[int, int], None]


class RedteamPlan(ExperimentPlan):
    """What is measured.

    Raises:
        UsageError: A number is out of range, or a list is empty.
    """

    dtypes: Names = Setting(
        ("bfloat16",), description="Dtypes of provers and attackers, separated by commas; the validator has float32."
    )
    nonces: int = Setting(64, ge=8, description="Nonces that every attacker answers.")
    honest: int = Setting(384, ge=64, description="Honest nonces, one half to calibrate and one to test.")
    searched: int = Setting(12, ge=0, description="Nonces of the search over positions read; 0 skips the search.")
    block_hash: str = Setting("block_alpha", description="Block of the attacked rounds.")
    seq_len: int = Setting(256, ge=16, description="Input positions per nonce.")
    batch_size: int = Setting(16, ge=4, description="Nonces per forward pass.")

    def model_post_init(self, context: Any, /) -> None:
        """Check the lists."""
        check_lists(self, models=1, dtypes=1)

    @property
    def settings(self) -> dict[str, Any]:
        """What makes two cells comparable."""
        return {name: value for name, value in self.model_dump().items() if name not in ("models", "dtypes", "device")}


def run_redteam(
    plan: RedteamPlan, folder: Path, *, progress: Progress | None = None, note: Callable[[str], None] | None = None
) -> None:
    """Measure what is missing in a run's folder.

    Raises:
        UsageError: the folder holds a run with other settings, or a model cannot be attacked.
        StorageError: the file cannot be written.
    """
    with open_run(folder, "redteam", plan.settings) as run:
        todo = [cell for cell in _cells(plan) if cell[0] not in run.done]
        for done, (key, measure) in enumerate(todo):
            if note:
                note(key)
            run.append(key, measure())
            if progress:
                progress(done + 1, len(todo))


Cell = tuple[str, Callable[[], dict[str, Any]]]


def _cells(plan: RedteamPlan) -> Iterator[Cell]:
    for reference in plan.models:
        for dtype in plan.dtypes:
            field = Field(
                reference=reference,
                dtype=dtype,
                device=plan.device,
                block_hash=plan.block_hash,
                seq_len=plan.seq_len,
                batch_size=plan.batch_size,
                honest=plan.honest,
            )
            yield from _field_cells(plan, field, f"{reference}/{dtype}")
        if plan.searched:
            rows = partial(search, field, plan.searched)
            yield f"{reference}/search", lambda m=reference, r=rows: {"model": m, "kind": "search", "rows": r()}  # type: ignore[misc]
    yield "experts", lambda: experts(plan.batch_size, plan.nonces, plan.dtypes)


def _field_cells(plan: RedteamPlan, field: Field, prefix: str) -> Iterator[Cell]:
    who = {"model": field.reference, "dtype": field.dtype}
    yield f"{prefix}/honest", lambda: {**who, "kind": "honest", **_honest(field)}
    yield f"{prefix}/audits", lambda: {**who, "kind": "audits", "engines": _audits(field)}
    for attack in ATTACKS:
        values = {**who, "kind": "attack", "name": attack.name, "family": attack.family}
        yield f"{prefix}/{attack.name}", lambda a=attack, v=values: {**v, **_attack(plan, field, a)}  # type: ignore[misc]
    yield f"{prefix}/claims", lambda: {**who, "kind": "claims", "rows": claims(field, plan.nonces)}


def _honest(field: Field) -> dict[str, Any]:
    """Describe the honest noise and the calibrated rules."""
    rows = {}
    for preset, _, reading, x_ND in field.each():
        judge, (_, testing_N) = field.judges[preset], field.honest_residuals[preset]
        rows[preset] = {
            **spread(reading.errors(x_ND), testing_N),
            "law": law_as_dict(judge.law),
            "threshold": judge.threshold,
            "honest_mismatch_rate": judge.honest_rate,
        }
    return {"nonces": field.honest, "presets": rows}


def _attack(plan: RedteamPlan, field: Field, attack: Attack) -> dict[str, Any]:
    program = attack.make(field.scene)
    rows = {}
    for reading in field.readings[attack.last_unknown :]:
        x_ND = reading.states(program, field.engine, plan.nonces)
        errors_N = reading.errors(x_ND)
        for preset in reading.presets:
            residuals_N, honest_N = reading.residuals(preset, x_ND), field.honest_residuals[preset][1]
            rows[preset] = {
                **spread(errors_N, residuals_N),
                "auc": stats.auroc(np.abs(residuals_N), np.abs(honest_N)),
                **detection(field.judges[preset], mixed(attack.share, residuals_N, honest_N)),
            }
    return {"cost": program.cost, "skips": attack.skips, "nonces": plan.nonces, "presets": rows}


def _audits(field: Field) -> dict[str, Any]:
    """Accusations among simulated audits of honest nodes: another dtype, other kernels, another batch shape."""
    plain = load_model(field.reference, dtype=field.dtype, device=field.device)
    eager = load_model(field.reference, dtype=field.dtype, device=field.device)
    eager.module.set_attn_implementation("eager")
    engines = {
        f"{field.dtype}, sdpa": HFEngine(plain, batch_size=field.batch_size, seq_len=field.seq_len),
        f"{field.dtype}, plain attention": HFEngine(eager, batch_size=field.batch_size, seq_len=field.seq_len),
        f"{field.dtype}, sdpa, batches of {OTHER_SHAPE}": HFEngine(
            plain, batch_size=OTHER_SHAPE, seq_len=field.seq_len
        ),
    }
    return {name: _audited(field, engine) for name, engine in engines.items()}


def _audited(field: Field, engine: HFEngine) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    rows: dict[str, Any] = {}
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
