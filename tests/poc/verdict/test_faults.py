"""Faults at fixed places: what they are worth, and when they end."""

from pathlib import Path

import numpy as np
import pytest

from assay.poc.verdict import Ledger, Life, audit_ledger
from assay.poc.verdict.entries import (
    AccountEvidence,
    Genesis,
    LedgerUpdate,
    Standing,
    verdict_on_life,
)
from assay.poc.verdict.ledger import AccountState
from assay.poc.verdict.ledger_audit import read_export
from assay.poc.verdict.ledger_tables import open_database
from assay.poc.verdict.pool_faults import POOLS, STRIKES, FaultyPool, count_strikes
from assay.stats.places import Places
from tests.poc.verdict.ledgers import NOISE, account, update

ACCOUNT = account()
PER_AUDIT = 128
"""Nonces of an audit here: a pool is complete after eight of them."""
POOL = 8
VECTORS = Path(__file__).parents[2] / "vectors" / "first"
OLD_LEDGER = VECTORS / "faulty_ledger.jsonl"


def audit(number: int, places: range, modulus: int = 16, times: float = 20.0):
    """Return residuals and positions of an audit whose bad places are so many times too large."""
    rng = np.random.default_rng(number)
    positions = PER_AUDIT * number + np.arange(PER_AUDIT)
    sizes = NOISE.size * np.exp(0.3 * rng.standard_normal(PER_AUDIT))
    bad = np.isin(positions % modulus, [*places])
    return np.where(bad, np.minimum(times * sizes, 2.0), sizes), positions, int(bad.sum())


def live(patterns, *, blocks: bool = True) -> tuple[list[AccountEvidence], int]:
    """Return the evidence after each audit, and how many nonces stood at bad places."""
    life = Life(alpha=1e-3, beta=1e-2)
    found = []
    lies = 0
    for number, pattern in enumerate(patterns):
        sizes, positions, bad = audit(number, *pattern)
        block = str(number) if blocks else "one"
        life.update(NOISE, sizes, block=block, positions=positions.tolist(), batch_size=16)
        found.append(life.evidence)
        lies += bad
    return found, lies


SOUND = (range(0),)
HALF = (range(8),)


def test_an_open_fault_is_never_honest_and_its_places_are_not_credited():
    found, lies = live([SOUND] * 3 + [HALF] * 5)
    sound, last = found[2], found[-1]
    assert (sound.verdict, sound.credited, sound.strikes) == ("honest", None, None)
    assert sound.faulty_places is None
    assert (last.verdict, last.faulty_places) == ("faulty", "position mod 16 in 0 to 7")
    assert last.credited <= last.n - lies
    assert last.share == sound.share or last.share <= 0.2  # by this number it would be honest


def test_a_fault_that_is_mended_ends_and_stays_unpaid():
    found, lies = live([HALF] * POOL + [SOUND] * 12)
    last = found[-1]
    assert last.faulty_places is None
    assert last.credited == last.n - lies
    assert (found[POOL - 1].verdict, last.verdict, last.strikes) == ("faulty", "honest", 1)


def test_a_fault_that_stays_is_fraud_after_four_pools_and_not_before():
    found, _ = live([HALF] * (4 * POOL + 1))
    verdicts = [one.verdict for one in found]
    assert verdicts == ["faulty"] * (4 * POOL) + ["fraud"]
    assert [one.strikes for one in found][::POOL][1:] == [1, 2, 3, 4]


def test_a_fault_that_moves_is_fraud_after_three_pools_and_not_before():
    moving = [(range(8),)] * POOL + [(range(8, 16),)] * POOL + [(range(8),)] * (POOL + 1)
    found, _ = live(moving)
    assert [one.verdict for one in found] == ["faulty"] * (3 * POOL) + ["fraud"]


def hide(number: int, chance: float):
    """Return residuals and positions of an audit that lies at some even places, and how many."""
    sizes, positions, _ = audit(number, *SOUND)
    rng = np.random.default_rng(1000 + number)
    lies = (positions % 2 == 0) & (rng.random(PER_AUDIT) < chance)
    return np.where(lies, np.minimum(20.0 * sizes, 2.0), sizes), positions, int(lies.sum())


@pytest.mark.parametrize("sound", [0, 2, 2 * POOL])
def test_an_accusation_that_rests_on_suspected_places_is_a_fault_and_not_paid(sound):
    """The first block of a pool makes half of the places suspect; fewer lies follow there."""
    life = Life(alpha=1e-3, beta=1e-2)
    lies = 0
    for number in range(sound - sound % POOL + POOL):
        chance = 0.0 if number < sound else 1.0 if number == sound else 0.2
        sizes, positions, lied = hide(number, chance)
        block = str(number)
        life.update(NOISE, sizes, block=block, positions=positions.tolist(), batch_size=16)
        lies += lied
        if number > sound:
            assert (life.evidence.verdict, life.evidence.faulty_places is None) == ("faulty", False)
    assert life.evidence.credited <= life.evidence.n - lies


def test_lies_that_hide_at_suspected_places_in_every_pool_are_fraud_after_four():
    life = Life(alpha=1e-3, beta=1e-2)
    verdicts = []
    for number in range(4 * POOL + 1):
        sizes, positions, _ = hide(number, 0.2 if number % POOL else 1.0)
        block = str(number)
        life.update(NOISE, sizes, block=block, positions=positions.tolist(), batch_size=16)
        verdicts.append(life.evidence.verdict)
    assert set(verdicts[:-1]) == {"faulty"}
    assert verdicts[-1] == "fraud"


@pytest.mark.slow
def test_a_conviction_stays_when_the_fault_ends():
    found, _ = live([HALF] * (4 * POOL + 1) + [SOUND] * (9 * POOL))
    assert {one.verdict for one in found[4 * POOL :]} == {"fraud"}


def test_a_fault_in_one_block_convicts_nobody():
    found, _ = live([HALF] * (6 * POOL), blocks=False)
    assert {one.verdict for one in found} == {"faulty"}


def _pool(first: int, modulus: int = 16, blocks: str = "ab") -> FaultyPool:
    return FaultyPool(Places(modulus, frozenset(range(first, first + 4))), frozenset(blocks))


@pytest.mark.parametrize(
    ("pools", "strikes"),
    [
        ([], 0),
        ([None] * 9, 0),
        ([_pool(0)], 1),
        ([_pool(0), None, _pool(0)], 2),
        ([_pool(0), _pool(2)], 2),
        ([_pool(0), _pool(8)], 3),
        ([_pool(0), _pool(0, 32)], 2),
        ([_pool(0), _pool(16, 32)], 2),
        ([_pool(0), _pool(8, 32)], 3),
        ([_pool(0), *[None] * POOLS], 0),
        ([_pool(0, blocks="a"), _pool(8, blocks="a")], 0),
        ([_pool(0, blocks="a"), _pool(8, blocks="b")], 3),
    ],
)
def test_strikes_are_counted_by_pools_and_twice_where_places_move(pools, strikes):
    assert count_strikes(pools) == strikes


@pytest.mark.parametrize("fault", [None, "position mod 2 in 0"])
@pytest.mark.parametrize("held", [0.0, 100.0])
@pytest.mark.parametrize("share", [0.0, 1.0])
@pytest.mark.parametrize("strikes", [None, 0, STRIKES])
def test_honest_and_an_open_fault_exclude_each_other(fault, held, share, strikes):
    """Also for the numbers of an entry of before 0.4, which calls it honest beside a fault."""
    credited = None if strikes is None else 5
    evidence = AccountEvidence(
        n=10, log_e_held=held, share=share, credited=credited, strikes=strikes, faulty_places=fault
    )
    verdict = verdict_on_life(evidence, alpha=1e-3, beta=1e-2)
    evidence = evidence.model_copy(update={"verdict": verdict})
    standing = Standing(
        account=ACCOUNT, evidence=evidence, audits=1, recorded=1, begun=0, last=0, fault=fault
    )
    assert (standing.verdict == "fraud") == (held > 0 or strikes == STRIKES)
    assert fault is None or standing.verdict in ("fraud", "faulty")
    assert (standing.payable or 0) == ((credited or 10) / 10 if standing.verdict == "honest" else 0)
    assert standing.as_dict()["verdict"] == standing.verdict


def record(ledger: Ledger, patterns, first: int = 0) -> list[Standing]:
    """Add audits to a ledger, and return the standings."""
    updates = []
    for number, pattern in enumerate(patterns, start=first):
        sizes, positions, _ = audit(number, *pattern)
        updates.append(
            LedgerUpdate(
                account=ACCOUNT,
                round=f"{number}",
                block_hash=f"{number}",
                noise=NOISE,
                nonces=positions.tolist(),
                residuals=sizes.tolist(),
                batch_size=16,
            )
        )
    return ledger.append(updates)


def test_a_ledger_states_credit_and_strikes_and_its_audit_holds_them(tmp_path):
    path = tmp_path / "ledger.sqlite3"
    with Ledger(path) as ledger:
        standings = record(ledger, [HALF] * (4 * POOL + 1))
    assert [one.verdict for one in standings[::POOL]] == ["faulty"] * 4 + ["fraud"]
    assert {one.payable for one in standings} == {0.0}
    assert audit_ledger(path).clean


@pytest.mark.parametrize("field", ["credited", "strikes", "verdict"])
def test_an_entry_that_leaves_a_fault_out_is_found(tmp_path, field):
    """As soon as one entry of the account has the number, all that follow must."""
    path = tmp_path / "ledger.sqlite3"
    with Ledger(path) as ledger:
        record(ledger, [HALF] * 3)
        (entry,) = [*ledger.entries(ACCOUNT)][2:]
    with Ledger(path, read_only=True) as ledger:
        ledger.export(tmp_path / "export.jsonl")
    lines = (tmp_path / "export.jsonl").read_text().splitlines()
    values = {"credited": entry.evidence.n, "strikes": 3, "verdict": "honest"}
    outcome = entry.outcome.model_copy(update={field: values[field]})
    changed = entry.model_copy(update={"outcome": outcome})
    lines[-2] = lines[-2].replace(entry.line, changed.line)
    lines[-1] = lines[-1].replace(entry.hash, changed.hash)
    (tmp_path / "changed.jsonl").write_text("\n".join(lines) + "\n")
    assert [fault.entry for fault in audit_ledger(tmp_path / "changed.jsonl").faults] == [3]


def imported(export: Path, folder: Path) -> Path:
    """A ledger with the entries of an export."""
    path = folder / "old.sqlite3"
    database = open_database(path)
    read_export(export, database)
    database.close()
    return path


@pytest.fixture
def old_ledger(tmp_path) -> Path:
    """A ledger that commit 0944c8c1 wrote: honest, then beside a fault, then honest again."""
    return imported(OLD_LEDGER, tmp_path)


def test_a_ledger_of_before_faults_had_an_end_comes_out_as_it_was(old_ledger, tmp_path):
    assert audit_ledger(OLD_LEDGER).clean
    with Ledger(old_ledger) as ledger:
        ledger.export(tmp_path / "export.jsonl")
        (standing,) = ledger.standings()
        entries = [*ledger.entries(ACCOUNT)]
    assert (tmp_path / "export.jsonl").read_bytes() == OLD_LEDGER.read_bytes()
    assert standing.fault is not None
    assert (standing.verdict, standing.payable) == ("faulty", 0.0)
    assert "honest" in {one.outcome.verdict for one in entries if one.fault}
    assert {one.verdict for one in entries if one.fault} == {"faulty"}


def test_such_a_ledger_goes_on_under_the_present_rule(old_ledger, tmp_path):
    with Ledger(old_ledger) as ledger:
        first = ledger.head[0]
        standings = record(ledger, [HALF] * (4 * POOL), first=first)
        ledger.export(tmp_path / "export.jsonl")
    assert standings[0].verdict == "faulty"
    assert standings[-1].verdict == "fraud"
    assert audit_ledger(old_ledger).clean
    old = OLD_LEDGER.read_bytes().splitlines()[:-1]
    assert (tmp_path / "export.jsonl").read_bytes().splitlines()[: len(old)] == old


def test_entries_of_before_tests_had_units_of_their_own_are_clean_until_one_has_not(tmp_path):
    """Commit 0944c8c1 wrote them, the last two at twice the size, which begin another test."""
    old = VECTORS / "sizes_ledger.jsonl"
    assert audit_ledger(old).clean
    path = imported(old, tmp_path)
    with Ledger(path) as ledger:
        for number in (6, 7):
            sizes = 2 * audit(number, range(0))[0]
            values = {"noise": NOISE.scaled(2.0), "residuals": sizes.tolist()}
            ledger.append([update(number, **values)])
        ledger.export(tmp_path / "export.jsonl")
        entries = [*ledger.entries(ACCOUNT)]
    assert audit_ledger(path).clean
    state = AccountState(
        Genesis.parse(old.read_text().split("\n")[0], "the old one"), one_unit=True
    )
    for entry in entries:
        changed = state.take(entry, NOISE.scaled(1.0 if entry.seq <= 4 else 2.0))
    lines = (tmp_path / "export.jsonl").read_text().splitlines()
    lines[-2] = changed.line
    lines[-1] = lines[-1].replace(entries[-1].hash, changed.hash)
    (tmp_path / "changed.jsonl").write_text("\n".join(lines) + "\n")
    assert [fault.entry for fault in audit_ledger(tmp_path / "changed.jsonl").faults] == [8]


def test_an_honest_entry_of_before_is_clean_and_the_next_one_opens_the_fault(tmp_path):
    """Commit 0944c8c1 wrote it: honest at e^309, for the accusation rests on suspected places."""
    old = VECTORS / "suspected_ledger.jsonl"
    assert audit_ledger(old).clean
    path = imported(old, tmp_path)
    sizes, positions, _ = hide(5, 0.2)
    with Ledger(path) as ledger:
        (before,) = ledger.standings()
        update = LedgerUpdate(
            account=before.account,
            round="5",
            block_hash="5",
            noise=NOISE,
            nonces=positions.tolist(),
            residuals=sizes.tolist(),
            batch_size=16,
        )
        (after,) = ledger.append([update])
        ledger.export(tmp_path / "export.jsonl")
    assert (before.verdict, before.evidence.log_e_max > 300) == ("honest", True)
    assert (after.verdict, after.payable) == ("faulty", 0.0)
    assert audit_ledger(path).clean
    lines = old.read_bytes().splitlines()[:-1]
    assert (tmp_path / "export.jsonl").read_bytes().splitlines()[: len(lines)] == lines
