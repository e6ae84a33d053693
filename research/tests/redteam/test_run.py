"""A whole run on the small checkpoint, stopped and continued."""

from pathlib import Path

import pytest
from assay_research.redteam import field as field_module
from assay_research.redteam import run as run_module
from assay_research.redteam.attacks import ATTACKS
from assay_research.redteam.run import RedteamPlan, attack_table, paying
from assay_research.runs.report import build_report
from assay_research.runs.runs import read_run

SOME = ("int8 weights", "last quarter of the layers dropped", "last 25.0% dropped", "first 50.0% dropped",
        "state of another nonce")  # fmt: skip


@pytest.fixture(scope="module")
def finished(small_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("redteam")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(field_module, "TRIALS", 60)
        patch.setattr(
            run_module, "ATTACKS", tuple(attack for attack in ATTACKS if attack.name in SOME)
        )
        plan = RedteamPlan(
            models=(str(small_checkpoint),),
            nonces=16,
            honest=64,
            seq_len=32,
            batch_size=8,
            device="cpu",
        )
        seen: list[tuple[int, int]] = []

        def stop(done: int, total: int) -> None:
            seen.append((done, total))
            if done == 4:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            plan.measure(folder, progress=stop)
        assert "cells are missing" in build_report(folder).read_text(), (
            "an unfinished run has a page too"
        )
        plan.measure(folder, progress=lambda done, total: seen.append((done, total)))
    total = seen[0][1]
    assert seen[4:] == [(done, total - 4) for done in range(1, total - 3)], (
        "no cell is measured again"
    )
    return folder, read_run(folder, "redteam").cells


def test_every_cell_is_there_once(finished):
    kinds = [cell["kind"] for cell in finished[1]]
    assert sorted(set(kinds)) == ["attack", "audits", "claims", "honest"]
    assert kinds.count("attack") == len(SOME)


def test_rows_say_what_the_cells_measured(finished, small_checkpoint):
    _, cells = finished
    where = (str(small_checkpoint), "bfloat16")
    assert run_module.fields(cells) == [where]
    for preset in ("poc-2.0", "artifact", "hardened"):
        _, rows = attack_table(cells, *where, preset)
        assert len(rows) == len(SOME) - (preset != "hardened")
    by_name = {row[0]: row for row in attack_table(cells, *where, "hardened")[1]}
    assert float(by_name["int8 weights"][2]) < float(
        by_name["last quarter of the layers dropped"][2]
    )
    assert float(by_name["state of another nonce"][5]) > 0.99
    best = paying(cells, *where, "hardened")
    assert best["cost"] <= 0.75
    assert best["over_honest"] > 1
    assert {row[1] for row in run_module.claim_table(cells, *where)[1]} == {
        "poc-2.0",
        "artifact",
        "hardened",
    }
    assert len(run_module.audit_table(cells, *where)[1]) == 9
