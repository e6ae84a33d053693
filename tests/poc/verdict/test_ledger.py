"""The ledger of nodes' lives: what is written, what counts, and that nothing is lost or counted
twice.
"""

import math
import os
import random
import signal
import sqlite3
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace

import numpy as np
import pytest

from assay.errors import DataError, StorageError, UsageError
from assay.models import load_model
from assay.poc import Build, Round, calibrate, prove, verify
from assay.poc.service.database import open_database
from assay.poc.verdict import Ledger, Life, audit_ledger
from assay.poc.verdict.ledger import check_ledger, take_entry
from tests.poc.verdict.ledgers import NOISE, OTHER, account, by_hand, filled, forked, honest, update
from tests.wordings import refuses


@pytest.fixture
def path(tmp_path):
    return tmp_path / "l.sqlite3"


@pytest.fixture
def ledger(path):
    with Ledger(path) as opened:
        yield opened


def test_a_life_is_replayed_before_the_ledger_is_locked(path, monkeypatch):
    """The first audit after a restart kept others from writing for as long as the life is."""
    with Ledger(path) as ledger:
        ledger.append([update(seed) for seed in range(3)])
    was_free = []

    def take(life, entry, noise):
        with closing(sqlite3.connect(path, timeout=0)) as other:
            try:
                other.execute("BEGIN IMMEDIATE")
                was_free.append(True)
            except sqlite3.OperationalError:
                was_free.append(False)
        return take_entry(life, entry, noise)

    monkeypatch.setattr("assay.poc.verdict.ledger.take_entry", take)
    with Ledger(path) as ledger:
        ledger.append(update(seed) for seed in range(3, 5))
    assert was_free == [True] * 3 + [False] * 2
    assert audit_ledger(path).clean


def test_an_audit_is_written_with_its_evidence(ledger, path, proof, small_model, round_):
    verdict = verify(proof, small_model, expect=round_, sample=24, seed=7)
    standing = ledger.record(verdict, proof=proof.footer.sha256)
    (entry,) = ledger.entries(standing.account)
    assert ledger.head == (1, entry.hash)
    assert (standing.verdict, standing.audits, standing.recorded, standing.evidence.n) == (
        "honest",
        1,
        24,
        24,
    )
    assert standing.account.public_key == round_.public_key
    assert standing.account.digest == proof.header.digest
    assert (standing.account.preset, standing.account.build) == ("poc-2.0", "float32")
    assert tuple(entry.residuals) == verdict.residuals  # to the last bit
    assert tuple(entry.nonces) == verdict.nonces
    assert (entry.proof, entry.sample_seed, entry.block_hash) == (
        proof.footer.sha256,
        7,
        round_.block_hash,
    )
    assert audit_ledger(path).clean


def test_numbers_keep_every_bit_and_missing_ones_stay_missing(ledger):
    odd = [0.1, 5e-324, -0.0, 1 / 3, 2.0 - 2**-52, math.nan, math.inf, -math.inf]
    ledger.append([update(0, residuals=odd)])
    (entry,) = ledger.entries(account())
    assert [x.hex() for x in entry.residuals[:5]] == [x.hex() for x in odd[:5]]
    assert entry.residuals[5:] == [None] * 3
    assert math.copysign(1, entry.residuals[2]) == -1


def test_a_nonce_counts_once_in_a_round(ledger):
    first = ledger.append([update(0, nonces=range(8))])[0]
    again = ledger.append([update(0, nonces=range(8))])[0]
    part = ledger.append([update(0, nonces=range(4, 12))])[0]
    twice = ledger.append([update(1, nonces=[5, 5, 6, 6, 5, 7, 8, 9])])[0]
    other = ledger.append([update(0, key="node_B", nonces=range(8))])[0]
    entries = list(ledger.entries(account()))
    assert first.evidence.model_copy(update={"audits": 2, "recorded": 16}) == again.evidence
    assert [one.evidence.n for one in (first, again, part, twice, other)] == [8, 8, 12, 17, 8]
    assert [one.recorded for one in (first, again, part, twice)] == [8, 16, 24, 32]
    assert [len(entry.excluded) for entry in entries] == [0, 8, 4, 3]
    assert dict(entries[3].excluded) == {1: "repeated", 3: "repeated", 4: "repeated"}


def test_small_audits_show_a_faulty_place_together(ledger, path):
    """A machine that is wrong at half of its places, in audits too small to show it: no fraud, and
    no honest life.
    """
    standings = []
    for seed in range(16):
        positions = np.random.default_rng(seed).permutation(1000)[:16]
        values = np.where(positions % 16 < 6, 0.9, honest(16, seed))
        given = update(
            seed,
            residuals=values.tolist(),
            nonces=positions * 3 + 1,
            positions=positions,
            batch_size=32,
        )
        standings.append(ledger.append([given])[0])
    assert [one.verdict for one in standings] == ["undecided"] * 7 + ["faulty"] * 9
    assert [one.fault is None for one in standings] == [True] * 7 + [False] * 9
    assert standings[-1].fault == "position mod 16 in 0 to 5"
    assert (standings[-1].evidence.log_e_max > 100, standings[-1].evidence.share) == (True, 1.0)
    assert audit_ledger(path).clean


def test_lies_at_half_of_the_places_are_fraud_where_the_others_lie_too(ledger):
    for seed in range(24):
        positions = np.random.default_rng(seed).permutation(1000)[:16]
        values = np.array(honest(16, seed)) * np.where(positions % 2 == 0, 20, 3)
        standing = ledger.append([update(seed, residuals=values.tolist(), nonces=positions)])[0]
    assert (standing.verdict, standing.fault) == ("fraud", "position mod 2 in 0")


def test_no_single_block_convicts(ledger, path):
    """However much speaks against a node in one block, and however often it is checked there."""
    for seed in range(10):
        given = update(seed, residuals=[5 * x for x in honest(32, seed)], block_hash="one block")
        standing = ledger.append([given])[0]
    assert (standing.verdict, standing.evidence.log_e_max > 100) == ("undecided", True)
    standing = ledger.append([update(99, residuals=[5 * x for x in honest(32, 99)])])[0]
    assert standing.verdict == "fraud"
    assert audit_ledger(path).clean


@pytest.mark.slow
def test_sixty_blocks_with_scales_of_their_own_are_one_test(ledger, path):
    """A calibration of distances is relative to the block; in units of the law, what blocks show
    adds up.
    """
    cheat = honest(16, 1)[:4]
    for seed in range(60):
        noise = NOISE.scaled(1 + seed % 7 / 50)
        values = [*honest(12, seed, noise), *(6 * x for x in cheat)]
        values = np.random.default_rng(seed).permutation(values).tolist()
        standing = ledger.append([update(seed, noise=noise, residuals=values)])[0]
        node = ledger.append(
            [update(seed, key="node", noise=noise, residuals=honest(16, seed, noise))]
        )[0]
    assert (standing.evidence.tests, standing.verdict) == (1, "fraud")
    assert (node.evidence.tests, node.evidence.n, node.verdict) == (1, 960, "honest")
    assert audit_ledger(path).clean


@pytest.mark.slow
def test_audits_in_sixty_blocks_are_one_test_through_the_public_interface(
    ledger, small_model, small_checkpoint
):
    """A calibration that knows the hidden size has another law in every block."""
    narrow = load_model(small_checkpoint, dtype="bfloat16", device="cpu")

    def proof_in(block, model, count):
        return prove(
            model, Round(block_hash=block, public_key="k", seq_len=4), range(count), batch_size=8
        )

    measured = [proof_in("measured", model, 64) for model in (small_model, narrow)]
    known = calibrate(*measured, hidden_size=small_model.hidden_size)
    sizes = set()
    for block in map(str, range(60)):
        proof = proof_in(block, narrow, 8)
        verdict = verify(proof, small_model, expect=proof.round, calibration=known)
        sizes.add(verdict.noise.size)
        standing = ledger.record(verdict, proof=proof.footer.sha256)
    assert (len(sizes), standing.evidence.tests, standing.evidence.n) == (60, 1, 480)


def test_a_life_is_that_of_the_pinned_build(ledger, proof, small_model, round_):
    """Another version of torch in the header does not begin another life."""
    verdict = verify(proof, small_model, expect=round_)
    made_on = verdict.header.fingerprint
    other = replace(
        verdict, header=replace(verdict.header, fingerprint=replace(made_on, torch="9.9"))
    )
    pinned = replace(verdict, pins=replace(verdict.pins, builds=(Build.of(made_on, name="H100"),)))
    found = [ledger.record(one).account.build for one in (verdict, other, pinned)]
    assert found == ["float32", "float32", "H100"]
    assert ledger.record(verdict, build="ours").account.build == "ours"


def test_an_update_of_one_name_is_written_once(ledger, path):
    one = ledger.append([update(0, name="inbox 1")])[0]
    assert ledger.append([update(0, name="inbox 1")])[0] == one
    assert ledger.head[0] == 1
    with refuses(UsageError, "an update of one name is written once"):
        ledger.append([update(0, key="node_B", name="inbox 1")])
    other = replace(account(), build="H200")
    assert ledger.append([update(0, account=other, name="inbox 1")])[0] == one, (
        "the pins changed before it was noted"
    )
    assert ledger.accounts() == [account()]
    assert audit_ledger(path).clean


def test_all_updates_of_a_call_are_written_or_none(tmp_path):
    with Ledger(tmp_path / "l.sqlite3") as ledger:
        with refuses(UsageError, "all updates of a call are written or none"):
            ledger.append([update(0), update(1, nonces=[-1] * 8)])
        assert ledger.head[0] == 0
        good = ledger.append([update(0), update(1)])
        assert [one.audits for one in good] == [1, 2]
    with Ledger(tmp_path / "m.sqlite3") as other:
        assert other.append([update(0), update(1)])[1].evidence == good[1].evidence


@pytest.mark.parametrize(
    "wrong", [{"round": ""}, {"nonces": [1]}, {"nonces": [2**53] * 8}, {"proof": "abc"}]
)
def test_what_is_no_evidence_is_refused(tmp_path, wrong):
    with (
        Ledger(tmp_path / "l.sqlite3") as ledger,
        refuses(UsageError, "what is no evidence is refused"),
    ):
        ledger.append([update(0, **wrong)])


def test_a_ledger_that_was_closed_goes_on(tmp_path):
    """State that is rebuilt from the entries equals state that was kept, under two laws."""
    with Ledger(tmp_path / "kept.sqlite3") as kept:
        for seed in range(12):
            given = update(seed, noise=OTHER if seed % 5 == 4 else NOISE)
            standing = kept.append([given])[0]
            with Ledger(tmp_path / "again.sqlite3") as again:
                rebuilt = again.append([given])[0]
            assert rebuilt.evidence == standing.evidence
    assert standing.evidence.tests == 2
    assert standing.audits == 12


def test_memory_is_bounded_by_rebuilding(ledger, path, monkeypatch):
    monkeypatch.setattr("assay.poc.verdict.ledger.LIVES", 1)
    for seed in range(8):
        standing = ledger.append([update(seed // 2, key=f"node_{seed % 2}")])[0]
    assert (standing.audits, standing.evidence.n) == (4, 32)
    assert audit_ledger(path).clean


def test_a_life_has_one_error_rate(tmp_path):
    Ledger(tmp_path / "l.sqlite3", alpha=1e-4).close()
    with Ledger(tmp_path / "l.sqlite3") as ledger:
        assert (ledger.genesis.alpha, ledger.genesis.beta) == (1e-4, 1e-2)
    with refuses(UsageError, "a life has one error rate") as refused:
        Ledger(tmp_path / "l.sqlite3", alpha=1e-3)
    assert "--alpha 0.0001" in refused.value.do
    with refuses(UsageError, "a life has one error rate, 2"):
        Ledger(tmp_path / "m.sqlite3", alpha=2.0)
    check_ledger(tmp_path / "l.sqlite3", alpha=1e-4, beta=1e-2)
    check_ledger(tmp_path / "absent.sqlite3", alpha=1e-3)
    with refuses(UsageError, "a life has one error rate, 3"):
        check_ledger(tmp_path / "l.sqlite3", alpha=1e-4, beta=0.02)
    assert [path.name for path in tmp_path.iterdir() if path.name != "m.sqlite3"] == ["l.sqlite3"]


def test_what_is_no_ledger_stays_as_it_is(tmp_path):
    open_database(tmp_path).close()
    service = tmp_path / "service.sqlite3"
    before = service.read_bytes()
    text = tmp_path / "notes.txt"
    text.write_text("nothing of the kind " * 100)
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for path, error in (
        (service, UsageError),
        (text, StorageError),
        (tmp_path, UsageError),
        (pipe, UsageError),
    ):
        for read_only in (False, True):
            with pytest.raises(error):
                Ledger(path, read_only=read_only)
    with refuses(UsageError, "what is no ledger stays as it is"):
        Ledger(tmp_path / "none.sqlite3", read_only=True)
    os.mkfifo(tmp_path / "none.sqlite3-journal")
    with refuses(
        StorageError, "what is no ledger stays as it is, 2"
    ):  # SQLite would wait for a writer
        Ledger(tmp_path / "none.sqlite3")
    assert not (tmp_path / "none.sqlite3").exists()
    assert service.read_bytes() == before


@pytest.mark.parametrize("table", ["updates", "accounts", "laws"])
def test_a_view_without_an_end_in_the_place_of_a_table_is_refused(tmp_path, table):
    """`show` and `export` look at the ledgers of others, and do not audit them."""
    path = filled(tmp_path / "l.sqlite3")
    endless = (
        "WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM n) SELECT kept.* FROM kept, n"
    )
    with closing(sqlite3.connect(path)) as database:
        database.execute("DROP VIEW evidence")
        database.execute(f"CREATE TABLE kept AS SELECT * FROM {table}")
        database.execute(f"DROP TABLE {table}")
        database.execute(f"CREATE VIEW {table} AS {endless}")
        database.commit()
    for read_only in (True, False):
        with pytest.raises(StorageError, match=f"the table {table} is missing"):
            Ledger(path, read_only=read_only)


def test_a_ledger_that_is_being_written_can_be_read_and_says_when_it_is_busy(tmp_path, monkeypatch):
    monkeypatch.setattr("assay.files.sqlite_connections.BUSY_TIMEOUT_MS", 10)
    path = filled(tmp_path / "l.sqlite3", 3)
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        assert audit_ledger(path).clean
        with refuses(
            StorageError, "a ledger that is being written can be read and says when it is busy"
        ) as busy:
            Ledger(path)
        assert (busy.value.wanted, busy.value.do) == (
            "a moment in which no other process writes to it",
            "try again",
        )


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE updates SET entry = '{}'",
        "DELETE FROM updates",
        "REPLACE INTO updates SELECT * FROM updates WHERE seq = 2",
        "INSERT INTO updates SELECT seq + 7, account, round, NULL, law, entry, hash FROM updates "
        "WHERE seq = 2",
        "UPDATE laws SET law = '{}'",
        "DELETE FROM laws",
        "UPDATE accounts SET public_key = 'node_B'",
        "DELETE FROM accounts",
        "UPDATE ledger SET hash = ''",
        "UPDATE ledger SET count = 1",
        "DELETE FROM ledger",
    ],
)
def test_the_file_itself_refuses_to_forget(tmp_path, statement):
    path = filled(tmp_path / "l.sqlite3", 3)
    with closing(sqlite3.connect(path, isolation_level=None)) as database:
        database.execute("PRAGMA foreign_keys=ON")
        with pytest.raises(sqlite3.Error):
            database.execute(statement)
    assert audit_ledger(path).clean


def test_a_ledger_that_was_cut_takes_no_more(tmp_path):
    path = filled(tmp_path / "l.sqlite3", 3)
    with by_hand(path) as database:
        database.execute("DELETE FROM updates WHERE seq = 3")
    with (
        Ledger(path) as ledger,
        refuses(DataError, "a ledger that was cut takes no more"),
    ):
        ledger.append([update(9)])


def test_an_account_whose_entries_were_deleted_is_named_as_such(tmp_path):
    path = filled(tmp_path / "l.sqlite3", 3)
    with by_hand(path) as database:
        database.execute("DELETE FROM updates WHERE account = 1")
    with (
        Ledger(path, read_only=True) as ledger,
        refuses(DataError, "an account whose entries were deleted is named as such"),
    ):
        list(ledger.standings())


def test_a_damaged_schema_whose_error_is_no_text_is_refused_in_words(tmp_path):
    path = filled(tmp_path / "l.sqlite3", 3)
    damaged = path.read_bytes().replace(b"tablemigrations", b"table\xf0igrations")
    path.write_bytes(damaged.replace(b"CREATE TABLE mig", b"CREATE TAB?E mig"))
    with refuses(StorageError, "a damaged schema whose error is no text is refused in words"):
        Ledger(path, read_only=True)


DROPPING = (
    "CREATE TRIGGER sqlitexa BEFORE INSERT ON updates WHEN NEW.entry LIKE '%node_A%' BEGIN SELECT "
    "RAISE(IGNORE); END",
    "CREATE TRIGGER sqlitexb BEFORE UPDATE ON ledger WHEN NEW.count > (SELECT max(seq) FROM "
    "updates)"
    " BEGIN SELECT RAISE(IGNORE); END",
)
CHANGING = (
    "CREATE TRIGGER sqlitexa AFTER INSERT ON updates BEGIN UPDATE updates SET round = 'other'; END",
)


@pytest.mark.parametrize("triggers", [DROPPING, CHANGING], ids=["dropping", "changing"])
@pytest.mark.parametrize("known", [True, False], ids=["by the schema", "by what is read back"])
def test_a_trigger_that_hides_evidence_stops_the_ledger(tmp_path, monkeypatch, triggers, known):
    """With these two, all evidence against one node was lost in silence, and an audit found
    nothing.
    """
    path = filled(tmp_path / "l.sqlite3", 3)
    with Ledger(path) as ledger:
        with closing(sqlite3.connect(path)) as database:
            if triggers is CHANGING:
                database.execute("DROP TRIGGER updates_never_update")
            for trigger in triggers:
                database.execute(trigger)
            database.commit()
        if not known:
            monkeypatch.setattr("assay.poc.verdict.ledger.schema_changes", lambda *_: [])
        with pytest.raises(
            StorageError, match="trigger" if known else "entry 4 is not there as it was written"
        ):
            ledger.append([update(7, residuals=[1.0] * 64)])
        assert ledger.head[0] == 3
    monkeypatch.undo()
    with refuses(StorageError, "a trigger that hides evidence stops the ledger"):
        Ledger(path)
    with Ledger(path, read_only=True) as ledger:
        assert ledger.head[0] == 3
    assert any("sqlitexa" in fault.reason for fault in audit_ledger(path).faults)


@pytest.mark.parametrize("copied", [True, False])
def test_a_ledger_that_was_moved_away_takes_no_more(tmp_path, copied):
    """Evidence that is written to a file without a name is gone with the process: better none is
    acknowledged.
    """
    path = tmp_path / "ledger.sqlite3"
    with Ledger(path) as ledger:
        ledger.append([update(0)])
        path.rename(tmp_path / "old")
        if copied:
            path.touch()
        with pytest.raises(StorageError, match="another file" if copied else "No such file"):
            ledger.append([update(1)])
        (tmp_path / "old").rename(path)
        ledger.append([update(1)])
        assert ledger.head[0] == 2


def test_the_life_convicts_where_single_audits_do_not(ledger):
    """Evidence of many small audits adds up, and an honest node stays honest."""
    for seed in range(17):
        slight = [1.9 * x for x in honest(8, seed)]
        cheat = ledger.append([update(seed, key="cheat", residuals=slight)])[0]
        node = ledger.append([update(seed, key="node")])[0]
    assert (cheat.verdict, node.verdict) == ("fraud", "honest")
    alone = Life(alpha=1e-3, beta=1e-2).update(NOISE, slight).evidence
    assert alone.verdict == "undecided"


def _work(path, name, start, count, acknowledged=None) -> None:
    with Ledger(path) as ledger:
        for number in range(start, start + count):
            given = update(number, key=f"node_{number % 2}", name=f"{name} {number}")
            ledger.append([given])
            if acknowledged is not None:
                os.write(acknowledged, f"{number}\n".encode())


def test_two_processes_write_to_one_ledger(tmp_path):
    path = tmp_path / "l.sqlite3"
    Ledger(path).close()
    children = [forked(lambda name=name: _work(path, name, 0, 15)) for name in ("one", "other")]
    for child in children:
        assert os.waitpid(child, 0)[1] == 0
    found = audit_ledger(path)
    assert (found.clean, found.entries, found.accounts) == (True, 30, 2)
    with Ledger(path, read_only=True) as ledger:
        # Both have the same nonces of the same rounds, which count once.
        assert [(one.recorded, one.evidence.n) for one in ledger.standings()] == [
            (128, 64),
            (112, 56),
        ]


@pytest.mark.slow
def test_killed_again_and_again_it_loses_and_doubles_nothing(tmp_path):
    path = tmp_path / "l.sqlite3"
    draw = random.Random(0)
    acknowledged = []
    for _ in range(12):
        reading, writing = os.pipe()
        start = acknowledged[-1] + 1 if acknowledged else 0
        # After a kill the sender does not know whether its last update was taken, and sends it
        # again.
        child = forked(lambda start=start, out=writing: _work(path, "audit", start, 10_000, out))
        os.close(writing)
        with os.fdopen(reading, "rb", buffering=0) as answers:
            wanted = draw.randint(1, 12)
            lines = b""
            while lines.count(b"\n") < wanted:
                answer = answers.read(1)
                assert answer, "the writing process ended by itself"
                lines += answer
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            lines += answers.read(65536)
        acknowledged += [int(line) for line in lines.split()]
    assert acknowledged == list(range(len(acknowledged)))
    found = audit_ledger(path)
    assert found.clean, found.faults
    assert found.entries - len(acknowledged) in (0, 1)  # written, and killed before it was said
    with Ledger(path, read_only=True) as ledger:
        names = [
            entry.name for key in ("node_0", "node_1") for entry in ledger.entries(account(key))
        ]
        assert sorted(names) == sorted(f"audit {number}" for number in range(found.entries))
        assert all(one.recorded == one.evidence.n for one in ledger.standings())


def test_threads_share_a_ledger(tmp_path):
    """One of them fails again and again, and what it left in memory is not used by the other."""
    path = tmp_path / "l.sqlite3"
    with Ledger(path) as ledger:

        def fail() -> None:
            for _ in range(10):
                with pytest.raises(UsageError):
                    ledger.append([update(99), update(98, nonces=[-1] * 8)])

        with ThreadPoolExecutor(2) as pool:
            failing = pool.submit(fail)
            for seed in range(10):
                ledger.append([update(seed)])
            failing.result()
    found = audit_ledger(path)
    assert (found.clean, found.entries) == (True, 10)
