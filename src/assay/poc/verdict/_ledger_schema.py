"""The tables of a ledger, as the list of steps that lead to them. A step, once released, is never edited.

The columns beside ``entry`` repeat what it holds, for searching; an audit compares them.
"""

from typing import Any

import sqlalchemy as sa

from assay.poc.verdict._ledger_entries import Account


def _never(table: str, what: str) -> str:
    return f"""CREATE TRIGGER {table}_never_{what.lower()} BEFORE {what} ON {table}
        BEGIN SELECT RAISE(ABORT, 'a ledger only grows'); END"""


MIGRATIONS: tuple[tuple[str, ...], ...] = (
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
        )""",
        """CREATE TABLE updates (
            seq INTEGER PRIMARY KEY,
            account INTEGER NOT NULL REFERENCES accounts (id),
            round TEXT NOT NULL, name TEXT UNIQUE,
            law TEXT NOT NULL REFERENCES laws (hash),
            entry TEXT NOT NULL, hash TEXT NOT NULL
        )""",
        "CREATE INDEX updates_of_account ON updates (account, seq)",
        "CREATE INDEX updates_of_round ON updates (account, round)",
        *(_never(table, what) for table in ("laws", "accounts", "updates") for what in ("UPDATE", "DELETE")),
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
TABLES = tuple(tuple(text for text in step if not text.startswith("CREATE TRIGGER")) for step in MIGRATIONS)
"""The steps without triggers, for a copy that is filled from an export."""


def _table(name: str, *columns: str) -> sa.TableClause:
    return sa.table(name, *map(sa.column, columns))


LEDGER = _table("ledger", "id", "genesis", "count", "hash")
LAWS = _table("laws", "hash", "law")
ACCOUNTS = _table("accounts", "id", "public_key", "digest", "build", "preset")
UPDATES = _table("updates", "seq", "account", "round", "name", "law", "entry", "hash")


def number_of(account: Account) -> sa.Select[Any]:
    """Return the query of the number that an account has in a ledger."""
    same = sa.and_(*(ACCOUNTS.c[name] == value for name, value in vars(account).items()))
    return sa.select(ACCOUNTS.c.id).where(same)
