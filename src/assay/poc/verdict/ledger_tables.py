"""The tables of a ledger, and the statements that add to them."""

from functools import lru_cache
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from assay.errors import DataError
from assay.files.jsonl import check_colons, loads
from assay.files.sqlite import Database
from assay.poc.verdict.entries import Account, Entry, Genesis, sha256
from assay.poc.verdict.response_noise import AnyNoise, noise_from_dict

AT_ONCE = 256  # rows that are read at a time
# What errors call the file: commands that only read it have no flag.
FLAG = {False: "--ledger", True: "ledger"}
LEDGER, LAWS, ACCOUNTS, UPDATES = (
    sa.table(name, *map(sa.column, columns.split()))
    for name, columns in (
        ("ledger", "id genesis count hash"),
        ("laws", "hash law"),
        ("accounts", "id public_key digest build preset"),
        ("updates", "seq account round name law entry hash"),
    )
)
OF_ACCOUNT = [column for column in ACCOUNTS.c if column.name != "id"]  # the columns of an `Account`


def _never(table: str, statement: str) -> str:
    return f"""CREATE TRIGGER {table}_never_{statement.lower()} BEFORE {statement} ON {table}
        BEGIN SELECT RAISE(ABORT, 'a ledger only grows'); END"""


# Steps that lead to the tables of a ledger. A step, once released, is never edited. Columns other
# than ``entry`` repeat parts of it, for searching; an audit compares them.
MIGRATIONS = (
    (
        """CREATE TABLE ledger (
            id INTEGER PRIMARY KEY CHECK (id = 1),
            genesis TEXT NOT NULL, count INTEGER NOT NULL, hash TEXT NOT NULL
        )""",
        "CREATE TABLE laws (hash TEXT PRIMARY KEY, law TEXT NOT NULL) WITHOUT ROWID",
        """CREATE TABLE accounts (
            id INTEGER PRIMARY KEY,
            public_key TEXT NOT NULL, digest TEXT NOT NULL, build TEXT NOT NULL, preset TEXT NOT NULL,
            UNIQUE (public_key, digest, build, preset)
        )""",  # noqa: E501  (0.3 compares its line breaks, too)
        """CREATE TABLE updates (
            seq INTEGER PRIMARY KEY,
            account INTEGER NOT NULL REFERENCES accounts (id),
            round TEXT NOT NULL, name TEXT UNIQUE,
            law TEXT NOT NULL REFERENCES laws (hash),
            entry TEXT NOT NULL, hash TEXT NOT NULL
        )""",
        "CREATE INDEX updates_of_account ON updates (account, seq)",
        "CREATE INDEX updates_of_round ON updates (account, round)",
        *(
            _never(table, what)
            for table in ("laws", "accounts", "updates")
            for what in ("UPDATE", "DELETE")
        ),
        _never("ledger", "DELETE"),
        """CREATE TRIGGER updates_in_order BEFORE INSERT ON updates
            WHEN NEW.seq IS NOT (SELECT count + 1 FROM ledger)
            BEGIN SELECT RAISE(ABORT, 'a ledger only grows'); END""",
        """CREATE TRIGGER ledger_counts_up BEFORE UPDATE ON ledger
            WHEN NEW.count IS NOT OLD.count + 1 OR NEW.genesis IS NOT OLD.genesis
            BEGIN SELECT RAISE(ABORT, 'a ledger only grows'); END""",
        """CREATE VIEW evidence AS SELECT
            seq, json_extract(entry, '$.time') AS time,
            json_extract(entry, '$.account.public_key') AS public_key,
            json_extract(entry, '$.account.digest') AS digest,
            json_extract(entry, '$.account.build') AS build,
            json_extract(entry, '$.account.preset') AS preset,
            json_extract(entry, '$.block_hash') AS block_hash,
            json_extract(entry, '$.proof') AS proof,
            json_array_length(entry, '$.nonces') AS nonces,
            json_array_length(entry, '$.excluded') AS excluded,
            json_extract(entry, '$.outcome.verdict') AS verdict,
            json_extract(entry, '$.outcome.log_e_value') AS log_e_value,
            json_extract(entry, '$.outcome.log_e_max') AS log_e_max,
            json_extract(entry, '$.outcome.log_evidence_honest') AS log_evidence_honest
        FROM updates""",
    ),
)


def select_account(account: Account) -> sa.Select[Any]:
    """Return the query of the number that an account has in a ledger."""
    matches = sa.and_(*(ACCOUNTS.c[name] == value for name, value in vars(account).items()))
    return sa.select(ACCOUNTS.c.id).where(matches)


def find_account(connection: sa.Connection, account: Account) -> int | None:
    """Return the number of an account as it is spelt, or in its normal form; None without one."""
    rows = (connection.execute(select_account(name)).scalar() for name in (account, account.normal))
    return next((number for number in rows if number is not None), None)


def read_noise(connection: sa.Connection, law: str) -> AnyNoise:
    """Return the noise of a law by its hash; the law must be there, have its hash, and be one."""
    text = text_of(connection.execute(sa.select(LAWS.c.law).where(LAWS.c.hash == law)).scalar())
    if sha256(text) != law:
        raise DataError(
            f"the law {law[:12]} does not have its hash",
            wanted="the law as it was",
            do="restore it",
        )
    return _parse_noise(text)


@lru_cache(maxsize=1024)
def _parse_noise(text: str) -> AnyNoise:
    name = f"the law {sha256(text)[:12]}"
    check_colons(text, name)
    return noise_from_dict(loads(text, name))


def text_of(value: object) -> str:
    """Return a text that is to be parsed; an empty one for anything else, which no parser takes."""
    return value if isinstance(value, str) else ""


def open_database(path: Path, *, read_only: bool = False, flag: str = "ledger") -> Database:
    """Open the database of a ledger; ``flag`` is what errors call the file."""
    return Database(
        path.parent,
        name=path.name,
        migrations=MIGRATIONS,
        exclusive=False,
        read_only=read_only,
        flag=flag,
    )


def insert_genesis(connection: sa.Connection, genesis: Genesis) -> None:
    """Write the beginning of a ledger."""
    connection.execute(
        LEDGER.insert().values(id=1, genesis=genesis.line, count=0, hash=genesis.hash)
    )


def insert_law(connection: sa.Connection, law: str) -> str:
    """Write a law where it is new, and return its hash."""
    connection.execute(LAWS.insert().prefix_with("OR IGNORE").values(hash=sha256(law), law=law))
    return sha256(law)


def insert_account(connection: sa.Connection, account: Account) -> int:
    """Write an account where it is new, and return its number."""
    connection.execute(ACCOUNTS.insert().prefix_with("OR IGNORE").values(**vars(account)))
    return int(connection.execute(select_account(account)).scalar_one())


def insert_entry(
    connection: sa.Connection, account: int, entry: Entry, text: str
) -> dict[str, Any]:
    """Append the next entry, advance the head, and return the row."""
    seq = sa.select(LEDGER.c.count + 1).scalar_subquery()
    hash = sha256(text)
    row = {
        "account": account,
        "round": entry.round,
        "name": entry.name,
        "law": entry.law,
        "entry": text,
        "hash": hash,
    }
    connection.execute(UPDATES.insert().values(row | {"seq": seq}))
    connection.execute(LEDGER.update().values(count=LEDGER.c.count + 1, hash=hash))
    return row | {"seq": entry.seq}
