"""Tampering with a ledger: every column of every row, and what a published head is for."""

import json
import shutil
import sqlite3
import time
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from assay.errors import DataError, StorageError, UsageError
from assay.files.jsonl import dumps
from assay.poc.verdict import Ledger, audit_ledger
from assay.poc.verdict.entries import Entry, sha256
from assay.poc.verdict.ledger_tables import MIGRATIONS
from tests.poc.verdict.ledgers import by_hand, filled, honest, update
from tests.usual import examples
from tests.wordings import refuses

COLUMNS = {
    "updates": ("seq", "account", "round", "name", "law", "entry", "hash"),
    "accounts": ("id", "public_key", "digest", "build", "preset"),
    "laws": ("hash", "law"),
    "ledger": ("id", "genesis", "count", "hash"),
}
PLACES = [(table, column) for table, columns in COLUMNS.items() for column in columns]
VALUES = st.one_of(
    st.none(),
    st.integers(-(2**63), 2**63 - 1),
    st.integers(0, 12),
    st.floats(allow_nan=False),
    st.text(max_size=20),
    st.binary(max_size=20),
)


@pytest.fixture(scope="module")
def clean(tmp_path_factory) -> Path:
    return filled(tmp_path_factory.mktemp("ledger") / "clean.sqlite3")


@pytest.fixture
def copy(clean: Path, tmp_path: Path) -> Path:
    return Path(shutil.copy(clean, tmp_path / "l.sqlite3"))


def first_bad(path: Path) -> int | None:
    found = audit_ledger(path)
    assert not found.clean
    assert found.exit_code == 1
    return found.faults[0].entry


def rows(path: Path, table: str) -> int:
    with closing(sqlite3.connect(path)) as database:
        return database.execute(f"SELECT count(*) FROM {table}").fetchone()[0]


def test_an_untouched_ledger_is_clean(clean: Path):
    before = clean.read_bytes()
    found = audit_ledger(clean)
    assert (found.clean, found.entries, found.accounts, found.exit_code) == (True, 9, 3, 0)
    assert clean.read_bytes() == before


@settings(
    max_examples=examples(40),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(place=st.sampled_from(PLACES), row=st.integers(0, 8), value=VALUES)
def test_an_edited_value_is_found(clean: Path, tmp_path: Path, place, row: int, value):
    table, column = place
    path = Path(shutil.copy(clean, tmp_path / "l.sqlite3"))
    row %= rows(path, table)
    with by_hand(path) as database:
        (key,) = database.execute(
            f"SELECT {COLUMNS[table][0]} FROM {table} ORDER BY 1 LIMIT 1 OFFSET {row}"
        ).fetchone()
        before = database.execute(f"SELECT * FROM {table}").fetchall()
        try:
            database.execute(
                f"UPDATE {table} SET {column} = ? WHERE {COLUMNS[table][0]} = ?", (value, key)
            )
        except sqlite3.Error:
            assume(False)  # the file refuses it
        assume(database.execute(f"SELECT * FROM {table}").fetchall() != before)
    found = first_bad(path)
    if table == "updates" and column != "seq":
        assert found == row + 1


@settings(
    max_examples=examples(30),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_an_edited_character_of_the_evidence_is_found(clean: Path, tmp_path: Path, data):
    path = Path(shutil.copy(clean, tmp_path / "l.sqlite3"))
    table, column = data.draw(
        st.sampled_from([("updates", "entry"), ("laws", "law"), ("ledger", "genesis")])
    )
    row = data.draw(st.integers(0, rows(path, table) - 1))
    with by_hand(path) as database:
        key, text = database.execute(
            f"SELECT {COLUMNS[table][0]}, {column} FROM {table} ORDER BY 1 LIMIT 1 OFFSET {row}"
        ).fetchone()
        at = data.draw(st.integers(0, len(text) - 1))
        new = data.draw(st.sampled_from(["", "0", "9", " ", "e", "-", '"', "é", "\0"]))
        changed = text[:at] + new + text[at + 1 :]
        assume(changed != text)
        statement = f"UPDATE {table} SET {column} = ? WHERE {COLUMNS[table][0]} = ?"
        database.execute(statement, (changed, key))
        if data.draw(st.booleans()):  # with the hash that the new text has
            hash = sha256(changed)
            database.execute("PRAGMA foreign_keys=OFF")
            database.execute(
                f"UPDATE {table} SET hash = ? WHERE {COLUMNS[table][0]} = ?", (hash, key)
            )
    if table == "updates":
        assert first_bad(path) in (
            row + 1,
            row + 2,
        )  # where the hash fits, the next entry names another one
    else:
        first_bad(path)


@pytest.mark.parametrize("seq", range(1, 10))
def test_a_deleted_row_is_found(copy: Path, seq: int):
    with by_hand(copy) as database:
        database.execute("DELETE FROM updates WHERE seq = ?", (seq,))
    assert first_bad(copy) == seq


@pytest.mark.parametrize("table", ["accounts", "laws", "ledger"])
def test_a_deleted_row_beside_the_entries_is_found(clean: Path, tmp_path: Path, table: str):
    for row in range(rows(clean, table)):
        path = Path(shutil.copy(clean, tmp_path / f"{row}.sqlite3"))
        with by_hand(path) as database:
            key = COLUMNS[table][0]
            database.execute(
                f"DELETE FROM {table} WHERE {key} = (SELECT {key} FROM {table} LIMIT 1 OFFSET "
                f"{row})"
            )
        first_bad(path)


def test_an_entry_that_was_put_in_is_found(copy: Path):
    with by_hand(copy) as database:
        database.execute(
            "INSERT INTO updates SELECT 10, account, round, NULL, law, entry, hash FROM updates "
            "WHERE seq = 9"
        )
    assert first_bad(copy) == 10


@pytest.mark.parametrize(("one", "other"), [(1, 2), (2, 9), (4, 7), (8, 9)])
@pytest.mark.parametrize("moved", ["seq", "content"])
def test_reordered_rows_are_found(copy: Path, one: int, other: int, moved: str):
    with by_hand(copy) as database:
        if moved == "seq":
            for before, after in ((one, 99), (other, one), (99, other)):
                database.execute("UPDATE updates SET seq = ? WHERE seq = ?", (after, before))
        else:
            columns = "account, round, law, entry, hash"
            first, second = (
                database.execute(f"SELECT {columns} FROM updates WHERE seq = ?", (seq,)).fetchone()
                for seq in (one, other)
            )
            for values, seq in ((second, one), (first, other)):
                database.execute(
                    f"UPDATE updates SET ({columns}) = (?, ?, ?, ?, ?) WHERE seq = ?",
                    (*values, seq),
                )
    assert first_bad(copy) == one


@pytest.mark.parametrize(
    ("statement", "reason"),
    [
        ("DROP TRIGGER updates_never_delete", "the trigger updates_never_delete is missing"),
        ("DROP INDEX updates_of_round", "the index updates_of_round is missing"),
        ("CREATE TABLE more (x)", "the table more is not one that assay made"),
        ("DROP VIEW evidence", "the view evidence is missing"),
        ("ALTER TABLE updates ADD COLUMN x", "the table updates is changed"),
        (
            "CREATE TRIGGER sqlitexa BEFORE INSERT ON updates BEGIN SELECT RAISE(IGNORE); END",
            "the trigger sqlitexa is not",
        ),
        ("CREATE INDEX SQLITE1x ON updates (hash)", "the index SQLITE1x is not"),
        ("CREATE VIEW migrations_ AS SELECT 1", "the view migrations_ is not"),
        ("ALTER TABLE migrations ADD COLUMN x", "the table migrations is changed"),
        (
            "CREATE TRIGGER t AFTER INSERT ON migrations BEGIN DELETE FROM migrations; END",
            "the trigger t is not",
        ),
        ("ANALYZE", "the table sqlite_stat1 is not"),
        (
            "INSERT INTO accounts (public_key, digest, build, preset) VALUES ('k', 'd', 'b', 'p')",
            "accounts: 4 belongs",
        ),
        ("INSERT INTO laws VALUES ('h', '{}')", "laws: 'h' belongs to no entry"),
    ],
)
def test_what_is_beside_the_rows_is_looked_at_too(copy: Path, statement: str, reason: str):
    with closing(sqlite3.connect(copy)) as database:
        database.execute(statement)
        database.commit()
    found = audit_ledger(copy)
    assert any(reason in fault.reason for fault in found.faults), found.faults


def test_the_tables_are_to_the_letter_those_that_every_release_wrote():
    """SQLite keeps the text of a table, and 0.3 compares a ledger with its own to the letter."""
    digest = "39d822c91941dd5187b1fffb2c7d5f0efee5d3b5de666d50d6a5500c199b3d02"  # of 0.3
    assert sha256(json.dumps(MIGRATIONS)) == digest


def test_tables_whose_lines_break_elsewhere_are_the_same(copy: Path):
    """As one state of this release made them."""
    with closing(sqlite3.connect(copy)) as database:
        database.execute("PRAGMA writable_schema=ON")
        broken = "replace(sql, 'build TEXT NOT NULL, ', 'build TEXT NOT NULL,' || char(10) || ' ')"
        database.execute(f"UPDATE sqlite_master SET sql = {broken} WHERE name = 'accounts'")
        database.commit()
    assert audit_ledger(copy).clean


def test_a_name_that_only_sqlite_may_give_hides_nothing(copy: Path):
    with closing(sqlite3.connect(copy)) as database:
        database.execute(
            "CREATE TRIGGER more AFTER INSERT ON updates BEGIN DELETE FROM accounts; END"
        )
        database.execute("PRAGMA writable_schema=ON")
        change = "name = 'sqlite_more', sql = replace(sql, 'more', 'sqlite_more')"
        database.execute(f"UPDATE sqlite_master SET {change} WHERE name = 'more'")
        database.commit()
    assert "the trigger sqlite_more is not one that assay made" in map(
        str, audit_ledger(copy).faults
    )


def test_clocks_that_were_wrong_are_noted_and_are_no_fault(tmp_path: Path, monkeypatch):
    now = time.time()
    times = iter([now, now + 9, now - 40, now - 200, now - 190, 4e9, now + 20])
    monkeypatch.setattr("assay.poc.verdict.ledger.time", SimpleNamespace(time=lambda: next(times)))
    with Ledger(tmp_path / "l.sqlite3") as ledger:
        for seed in range(6):
            ledger.append([update(seed)])
    monkeypatch.undo()
    found = audit_ledger(tmp_path / "l.sqlite3")
    assert (found.clean, found.exit_code) == (True, 0)
    assert found.notes == (
        "entries more than 60 s older than what stands before them: 2, from entry 3 on",
        "entries in the future: 1, from entry 5 on",
    )
    assert audit_ledger(filled(tmp_path / "right.sqlite3")).notes == ()


def test_nothing_but_a_repeated_nonce_may_be_left_out(tmp_path: Path, monkeypatch):
    """Also where the outcome follows from the residuals that are left."""
    monkeypatch.setattr(
        "assay.poc.verdict.ledger.find_repeated", lambda nonces, seen: [(3, "of no use")]
    )
    with Ledger(tmp_path / "l.sqlite3") as ledger:
        ledger.append([update(0)])
    monkeypatch.undo()
    assert first_bad(tmp_path / "l.sqlite3") == 1


def rewrite(path: Path, start: int, change) -> None:
    """Change an entry, and give it and all that follow the hashes of an intact chain."""
    with by_hand(path) as database:
        database.execute("PRAGMA foreign_keys=OFF")
        query = "SELECT seq, entry FROM updates WHERE seq >= ? ORDER BY seq"
        previous = None
        for seq, text in database.execute(query, (start,)).fetchall():
            values = json.loads(text)
            if previous is None:
                change(values)
            else:
                values["previous"] = previous
            entry = Entry.model_validate_json(json.dumps(values))
            statement = "UPDATE updates SET entry = ?, hash = ? WHERE seq = ?"
            database.execute(statement, (entry.line, entry.hash, seq))
            previous = entry.hash
        database.execute("UPDATE ledger SET hash = ?", (previous,))


def _other_verdict(values):
    values["outcome"]["verdict"] = "fraud" if values["outcome"]["verdict"] != "fraud" else "honest"


CHANGES = {
    "a smaller residual": lambda values: values["residuals"].__setitem__(0, 0.001),
    "more evidence": lambda values: values["outcome"].update(
        log_e_value=values["outcome"]["log_e_value"] + 0.01
    ),
    "another verdict": _other_verdict,
    "a nonce left out": lambda values: values.update(excluded=[[0, "of no use"]]),
    "a nonce called repeated": lambda values: values.update(excluded=[[0, "repeated"]]),
}


@pytest.mark.parametrize("start", [1, 4, 9])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_verdict_that_does_not_follow_is_found_in_an_intact_chain(copy: Path, start: int, change):
    rewrite(copy, start, change)
    assert first_bad(copy) == start


@pytest.mark.parametrize("start", [2, 9])
def test_no_outcome_is_by_the_rule_of_earlier_releases_once_one_is_not(copy: Path, start: int):
    """An audit does not compute such outcomes again, so they would say what they like."""
    rewrite(
        copy,
        start,
        lambda values: [values["outcome"].pop(name) for name in ("share", "log_e_held")],
    )
    assert first_bad(copy) == start


def test_a_ledger_rewritten_as_a_whole_is_found_by_a_published_head(tmp_path: Path):
    """Evidence, verdicts and hashes are those of another history: nothing in the file itself can
    tell.
    """
    heads = []
    for name, level in (("told.sqlite3", 1.0), ("retold.sqlite3", 0.01)):
        with Ledger(tmp_path / name) as ledger:
            for seed in range(4):
                ledger.append(
                    [update(seed, residuals=[level] * 8 if seed == 1 else honest(8, seed))]
                )
                heads.append(ledger.head[1])
    assert all(audit_ledger(tmp_path / "told.sqlite3", head=head).clean for head in heads[:4])
    assert audit_ledger(tmp_path / "retold.sqlite3").clean
    found = audit_ledger(tmp_path / "retold.sqlite3", head=heads[2])
    assert "entries were rewritten or cut off since" in found.faults[0].reason


def test_a_ledger_cut_with_its_head_is_found_by_a_published_head(copy: Path):
    with Ledger(copy, read_only=True) as ledger:
        count, head = ledger.head
    with by_hand(copy) as database:
        database.execute("DELETE FROM updates WHERE seq = 9")
        database.execute(
            "UPDATE ledger SET count = 8, hash = (SELECT hash FROM updates WHERE seq = 8)"
        )
    assert count == 9
    assert audit_ledger(copy).clean
    assert not audit_ledger(copy, head=head).clean
    with refuses(UsageError, "a ledger cut with its head is found by a published head"):
        audit_ledger(copy, head="12ab")


def test_a_view_without_an_end_is_not_read(copy: Path):
    with closing(sqlite3.connect(copy)) as database:
        for (name,) in database.execute(
            "SELECT name FROM sqlite_master WHERE type = 'trigger'"
        ).fetchall():
            database.execute(f"DROP TRIGGER {name}")
        database.execute("DROP VIEW evidence")
        database.execute("ALTER TABLE updates RENAME TO kept")
        database.execute(
            "CREATE VIEW updates AS WITH RECURSIVE n(seq) AS (SELECT 1 UNION ALL SELECT seq + 1 "
            "FROM n)"
            " SELECT seq, 1 AS account, '' AS round, NULL AS name, '' AS law, '' AS entry, '' AS "
            "hash FROM n"
        )
        database.commit()
    reasons = [fault.reason for fault in audit_ledger(copy).faults]
    assert "the table updates is missing" in reasons
    with closing(sqlite3.connect(copy)) as database:
        database.execute("DROP TABLE migrations")
        endless = (
            "WITH RECURSIVE n(version) AS (SELECT 1 UNION ALL SELECT version + 1 FROM n) SELECT "
            "version FROM n"
        )
        database.execute(f"CREATE VIEW migrations AS {endless}")
        database.commit()
    assert refused(copy)


def refused(path: Path) -> bool:
    """Whether an audit finds a fault, or says what cannot be read and what to do."""
    try:
        return not audit_ledger(path).clean
    except (DataError, StorageError) as error:
        return bool(error.seen and error.do)


@pytest.mark.parametrize(
    "damage", [b"\0" * 4096, b"\xff" * 64], ids=["a page of zeros", "a torn page"]
)
def test_a_damaged_file_is_refused(copy: Path, damage: bytes):
    data = copy.read_bytes()
    for at in range(4096, len(data), 4096):
        copy.write_bytes(data[:at] + damage + data[at + len(damage) :])
        assert refused(copy)
        for beside in copy.parent.glob("l.sqlite3-*"):
            beside.unlink()


# Exports


@pytest.fixture(scope="module")
def lines(clean: Path, tmp_path_factory) -> list[str]:
    path = tmp_path_factory.mktemp("export") / "l.jsonl"
    with Ledger(clean, read_only=True) as ledger:
        assert ledger.export(path) == ledger.head
        with pytest.raises(UsageError, match="exists"):
            ledger.export(path)
    return path.read_text().splitlines()


def written(path: Path, lines: list[str]) -> Path:
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def test_an_export_does_not_replace_its_ledger(tmp_path: Path):
    path = filled(tmp_path / "l.sqlite3", 1)
    (tmp_path / "link").symlink_to(path)
    with Ledger(path, read_only=True) as ledger:
        for output in (path, tmp_path / "link"):
            with pytest.raises(UsageError):
                ledger.export(output, overwrite=True)
    assert audit_ledger(path).clean


def test_an_export_is_audited_like_the_ledger(clean: Path, lines: list[str], tmp_path: Path):
    assert [json.loads(line).keys() & {"kind", "law", "seq", "head"} for line in lines] == [
        {"kind"}, {"law"}, {"law", "seq"}, {"law", "seq"}, {"law", "seq"}, {"law"}, *[{"law", "seq"}] * 6, {"head"}
    ]  # fmt: skip
    assert audit_ledger(written(tmp_path / "l.jsonl", lines)) == audit_ledger(clean)


@pytest.mark.parametrize("number", range(1, 13))
def test_a_line_that_is_missing_or_doubled_is_found(lines: list[str], tmp_path: Path, number: int):
    assert refused(written(tmp_path / "l.jsonl", lines[:number] + lines[number + 1 :]))
    if "law" not in json.loads(lines[number]) or "seq" in json.loads(lines[number]):
        assert refused(written(tmp_path / "l.jsonl", lines[: number + 1] + lines[number:]))


@settings(
    max_examples=examples(30),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    number=st.integers(0, 12),
    at=st.integers(0, 2000),
    new=st.sampled_from(["", "7", " ", "NaN", "{", "\\ud800"]),
)
def test_an_edited_export_is_found(
    lines: list[str], tmp_path: Path, number: int, at: int, new: str
):
    at %= len(lines[number])
    changed = lines[number][:at] + new + lines[number][at + 1 :]
    assume(changed != lines[number])
    path = written(tmp_path / "l.jsonl", [*lines[:number], changed, *lines[number + 1 :]])
    assert refused(path)


@pytest.mark.parametrize(
    "change",
    [
        {"mu": 1e308},
        {"mu": -1e9},
        {"sd": 1e300},
        {"dimension": 1e308},
        {"spread": {"sd": 0.1, "dof": 10**40}},
        {str(number): 0 for number in range(2**14)},
    ],
)
def test_a_law_that_no_measurement_gives_is_found_in_an_intact_chain(
    lines: list[str], tmp_path: Path, change
):
    law = dumps(json.loads(lines[1])["law"] | change)
    entry = Entry.parse(lines[2], "an entry").model_copy(update={"law": sha256(law)})
    head = dumps({"head": {"count": 1, "hash": entry.hash}})
    found = audit_ledger(
        written(tmp_path / "l.jsonl", [lines[0], f'{{"law":{law}}}', entry.line, head])
    )
    assert [fault.entry for fault in found.faults] == [1]
    seen = "noise {" if len(change) < 2**14 else "the law "  # not parsed
    assert found.faults[0].reason.startswith(seen)


def test_hostile_exports_are_errors(lines: list[str], tmp_path: Path):
    deep = "[" * 100_000
    keys = lines[2].replace("{", "{" + '"":0,' * 2**15, 1)
    hostile = {
        "": "line 1",
        "\n": "line 1",
        deep: "line 1",
        '{"kind":"other"}': "line 1",
        lines[0]: "the end: not the line",
        f"{lines[0]}\n{deep}": "line 2",
        f'{lines[0]}\n{{"law":{deep}}}': "line 2",
        f'{lines[0]}\n{lines[1][:-1]},"more":1}}': "line 2: not the line",
        f"{lines[0]}\n{lines[2]}": "a law that no line before it gives",
        f"{lines[0]}\n{lines[1]}\n{lines[2]}\n{lines[2]}": "a name given twice",
        f"{lines[0]}\n{lines[-1]}\n{lines[-1]}": "line 3: not the line",
        "\n".join([lines[0], lines[1], *lines[1:]]): "line 3: not the line",
        "\n".join([lines[0], lines[5], *lines[1:]]): "line 2: not the line",
        f"{lines[0]}\n{keys}": "line 2: .* colons",
        f"{lines[0]}\n{lines[2].replace('0.', 'NaN,0.', 1)}": "line 2",
        f"{lines[0]}\n{lines[2].replace('[0,', '[' + '9' * 5000 + ',', 1)}": "line 2",
    }
    for text, said in hostile.items():
        path = tmp_path / "l.jsonl"
        path.write_text(text + "\n" if text else "")
        with pytest.raises(DataError, match=said):
            audit_ledger(path)
    for head in (
        "[]",
        '{"count":1e999,"hash":""}',
        f'{{"count":0,"hash":["{"x" * 10**5}"]}}',
        '{"count":true,"hash":0}',
    ):
        path.write_text(f'{lines[0]}\n{{"head":{head}}}\n')
        assert not audit_ledger(path).clean
    path.write_bytes(lines[0].encode() + b"\n\xff\xfe\n")
    with refuses(DataError, "hostile exports are errors"):
        audit_ledger(path)
