"""Ledgers of several validators: one decision, valid however much they saw of the same."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
from assay_research.ledger_merge import log_mean, merge_ledgers

from assay.errors import DataError, UsageError
from assay.poc.verdict import Ledger
from tests.poc.verdict import test_response_noise as responses
from tests.poc.verdict.ledgers import account, filled, honest, update


def ledger_of(path: Path, audits: dict[str, list[list[float]]]) -> Path:
    """A ledger with audits of some nodes, in rounds that are numbered."""
    with Ledger(path) as ledger:
        for key, found in audits.items():
            ledger.append(
                [update(seed, key=key, residuals=residuals) for seed, residuals in enumerate(found)]
            )
    return path


def test_ledgers_and_exports_decide_together(tmp_path):
    good = [honest(8, seed) for seed in range(12)]
    bad = [[1.0] * 64 for _ in range(3)]
    one = ledger_of(tmp_path / "one.sqlite3", {"node_A": good, "node_B": bad})
    other = ledger_of(tmp_path / "other.sqlite3", {"node_A": good[:9], "node_C": good[:1]})
    with Ledger(other, read_only=True) as ledger:
        ledger.export(tmp_path / "other.jsonl")
        third = ledger.standing(account("node_C"))
    merged = merge_ledgers([one, tmp_path / "other.jsonl"])
    assert [(found.account.public_key, found.verdict) for found in merged] == [
        ("node_A", "honest"),
        ("node_B", "fraud"),
        ("node_C", "undecided"),
    ]
    assert [[share.n for share in found.shares] for found in merged] == [[96, 72], [192, 0], [0, 8]]
    b, c = merged[1:]
    assert b.log_e_value == pytest.approx(
        b.shares[0].log_e_value - math.log(2)
    )  # the other one says nothing: 1
    assert c.log_e_value == pytest.approx(math.log((1 + math.exp(third.evidence.log_e_value)) / 2))
    assert merge_ledgers([other, one])[0].log_e_value == pytest.approx(merged[0].log_e_value)


def test_evidence_once_found_is_not_lost_while_others_catch_up(tmp_path):
    """A node is suspected in one ledger, and looks good in audits after that."""
    audits = [[(2 if seed < 3 else 0.5) * x for x in honest(64, seed)] for seed in range(17)]
    one = ledger_of(tmp_path / "one.sqlite3", {"node_A": audits})
    other = ledger_of(tmp_path / "other.sqlite3", {"node_A": [honest(8)]})
    with Ledger(one, read_only=True) as ledger:
        standing = ledger.standing(account())
    (merged,) = merge_ledgers([one, other])
    assert merged.verdict == "fraud"
    assert merged.log_e_value > math.log(1e3) > standing.evidence.log_e_value


def test_no_single_block_and_no_faulty_place_convicts_in_a_merge(tmp_path):
    """As in a life: one odd block in both ledgers, and a machine that is wrong at half of its
    places.
    """
    odd = [[5 * x for x in honest(64, seed)] for seed in range(3)]
    paths = [tmp_path / name for name in ("one.sqlite3", "other.sqlite3")]
    for path in paths:
        with Ledger(path) as ledger:
            for seed, residuals in enumerate(odd):
                ledger.append([update(seed, residuals=residuals, block_hash="odd")])
            for seed in range(16):
                positions = np.random.default_rng(seed).permutation(1000)[:16]
                values = np.where(positions % 16 < 6, 0.9, honest(16, seed))
                given = {"nonces": positions * 3 + 1, "positions": positions, "batch_size": 32}
                ledger.append([update(seed, key="node_B", residuals=values.tolist(), **given)])
            assert min(one.evidence.log_e_max for one in ledger.standings()) > 100
    assert {found.verdict for found in merge_ledgers(paths)} == {"undecided"}
    with Ledger(paths[0]) as ledger:
        ledger.append([update(99, residuals=odd[0])])
    assert [found.verdict for found in merge_ledgers(paths)] == ["fraud", "undecided"]


def half_off(number: int) -> dict:
    """An audit of 128 nonces in which half of the places are off."""
    positions = 128 * number + np.arange(128)
    off = np.where(positions % 16 < 8, 30.0, 1.0)
    values = np.minimum(off * np.array(honest(128, number)), 2.0)
    return {"residuals": values.tolist(), "nonces": positions.tolist(), "batch_size": 16}


@pytest.mark.parametrize(("faulty", "sound"), [(4, 0), (33, 16)])
def test_a_fault_is_never_honest_in_a_merge_nor_after_four_strikes(tmp_path, faulty, sound):
    path = tmp_path / "one.sqlite3"
    with Ledger(path) as ledger:
        good = [update(100 + seed, residuals=honest(128, seed)) for seed in range(4)]
        bad = [update(seed, **half_off(seed)) for seed in range(faulty)]
        after = [update(200 + seed, residuals=honest(128, seed)) for seed in range(sound)]
        last = ledger.append([*good, *bad, *after])[-1]
    assert (last.verdict, last.fault is None) == (("fraud", True) if sound else ("faulty", False))
    (merged,) = merge_ledgers([path])
    assert merged.shares[0].fault is not None
    assert {merged.verdict, merged.shares[0].verdict} == {"undecided"}


def test_a_merge_names_who_decides_and_holds_against_liars(tmp_path):
    """One ledger of three is invented, in either direction."""
    good = [honest(8, seed) for seed in range(12)]
    bad = [[1.0] * 64 for _ in range(3)]
    forged = {"node_A": bad, "node_B": good}
    told = {"node_A": good, "node_B": bad}
    paths = [
        ledger_of(tmp_path / f"{number}.sqlite3", one)
        for number, one in enumerate((forged, told, told))
    ]
    a, b = merge_ledgers(paths)
    assert (a.verdict, a.rests_on) == ("fraud", (a.shares[0].ledger,))
    assert [share.verdict for share in a.shares] == ["fraud", "honest", "honest"]
    assert (b.verdict, b.rests_on) == ("fraud", ())
    assert [(one.verdict, one.rests_on) for one in merge_ledgers(paths, liars=1)] == [
        ("honest", tuple(share.ledger for share in a.shares[1:])),
        ("fraud", tuple(share.ledger for share in b.shares[1:])),
    ]
    with pytest.raises(UsageError, match="3 of them liars"):
        merge_ledgers(paths, liars=3)


def test_responses_are_merged_beside_nonces(tmp_path):
    path = tmp_path / "one.sqlite3"
    other = tmp_path / "other.sqlite3"
    with Ledger(path) as ledger:
        ledger.append([update(seed, residuals=honest(16, seed)) for seed in range(12)])
    with Ledger(other) as ledger:
        ledger.append([responses.update(9, responses.response(9, multiple=30.0), key="node_B")])
    nonces, of_responses = merge_ledgers([path, other])
    assert (nonces.verdict, nonces.shares[0].n) == ("honest", 192)
    assert (of_responses.verdict, of_responses.account.preset) == ("fraud", "responses")


def test_what_cannot_be_merged_is_refused(tmp_path):
    one = filled(tmp_path / "one.sqlite3", 3)
    other = filled(tmp_path / "other.sqlite3", 3)
    copy = Path(shutil.copy(one, tmp_path / "copy.sqlite3"))
    with pytest.raises(UsageError, match="which are one ledger"):
        merge_ledgers([one, other, copy])
    with pytest.raises(UsageError, match="0 ledgers"):
        merge_ledgers([])
    Ledger(tmp_path / "strict.sqlite3", alpha=1e-5).close()
    with pytest.raises(UsageError, match=r"alpha 1e-05 and 0\.001"):
        merge_ledgers([one, tmp_path / "strict.sqlite3"])
    assert len(merge_ledgers([one, tmp_path / "strict.sqlite3"], alpha=1e-4)) == 3
    with pytest.raises(UsageError, match="--alpha 1"):
        merge_ledgers([one], alpha=1.0)
    with Ledger(other, read_only=True) as ledger:
        ledger.export(tmp_path / "other.jsonl")
    lines = (tmp_path / "other.jsonl").read_text().splitlines()
    values = json.loads(lines[-2])
    values["residuals"][0] = 0.5
    (tmp_path / "other.jsonl").write_text(
        "\n".join([*lines[:-2], json.dumps(values, separators=(",", ":")), lines[-1]])
    )
    with pytest.raises(DataError, match="entry 3"):
        merge_ledgers([one, tmp_path / "other.jsonl"])


def test_the_average_is_that_of_the_numbers():
    values = [0.5, 20.0, 3.0]
    assert log_mean([math.log(x) for x in values]) == pytest.approx(math.log(np.mean(values)))
    assert log_mean([-2000.0, 900.0]) == pytest.approx(900 - math.log(2))
    assert log_mean([math.log(x) for x in values], without=1) == pytest.approx(math.log(1.75))
