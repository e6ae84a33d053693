"""The database of the service, as the steps that lead to its tables."""

from functools import partial

from assay.files.sqlite import Database

# The tables, as the list of steps that lead to them. A step, once released, is never edited.
#
# A record belongs to its round, and a round is unique by block and key, so the primary key of
# ``records`` makes every (block, key, nonce) unique.
#
# A receipt is found by ``name``, a hash of its request id. There is no index on ids: where SQLite
# moves the entries of an index it leaves copies behind, which a deletion does not find. ``line`` is
# last, so that what precedes it is read without it.

MIGRATIONS: tuple[tuple[str, ...], ...] = (
    (
        """CREATE TABLE rounds (
            id INTEGER PRIMARY KEY,
            block_hash TEXT NOT NULL, public_key TEXT NOT NULL, block_height INTEGER NOT NULL,
            node_id INTEGER NOT NULL, node_count INTEGER NOT NULL,
            group_id INTEGER NOT NULL, n_groups INTEGER NOT NULL,
            preset TEXT NOT NULL, seq_len INTEGER NOT NULL, batch_size INTEGER NOT NULL,
            r_target REAL NOT NULL, strength INTEGER NOT NULL,
            reference TEXT NOT NULL, digest TEXT NOT NULL, weights TEXT NOT NULL,
            fraud_threshold REAL NOT NULL, callback_url TEXT,
            created_at REAL NOT NULL, touched_at REAL NOT NULL,
            next_nonce INTEGER NOT NULL, checked INTEGER NOT NULL DEFAULT 0,
            valid INTEGER NOT NULL DEFAULT 0,
            seconds REAL NOT NULL DEFAULT 0,
            UNIQUE (block_hash, public_key)
        )""",
        """CREATE TABLE service (
            id INTEGER PRIMARY KEY CHECK (id = 1),
            state TEXT NOT NULL,
            round_id INTEGER REFERENCES rounds (id)
        )""",
        "INSERT INTO service (id, state) VALUES (1, 'IDLE')",
        """CREATE TABLE records (
            round_id INTEGER NOT NULL REFERENCES rounds (id) ON DELETE CASCADE,
            nonce INTEGER NOT NULL,
            distance REAL, vector BLOB, valid INTEGER NOT NULL,
            PRIMARY KEY (round_id, nonce)
        ) WITHOUT ROWID""",
        """CREATE TABLE outbox (
            seq INTEGER PRIMARY KEY,
            id TEXT NOT NULL UNIQUE,
            round_id INTEGER REFERENCES rounds (id) ON DELETE CASCADE,
            kind TEXT NOT NULL, url TEXT NOT NULL,
            first_nonce INTEGER, last_nonce INTEGER, nonces INTEGER NOT NULL DEFAULT 0,
            body TEXT,
            status TEXT NOT NULL CHECK (status IN ('open', 'pending', 'delivered', 'dead')),
            created_at REAL NOT NULL, attempts INTEGER NOT NULL DEFAULT 0,
            next_attempt_at REAL NOT NULL, last_error TEXT, finished_at REAL
        )""",
        "CREATE INDEX outbox_due ON outbox (status, next_attempt_at) WHERE status IN ('open', "
        "'pending')",
        "CREATE INDEX outbox_dead ON outbox (status) WHERE status = 'dead'",
        """CREATE TABLE checks (
            id INTEGER PRIMARY KEY,
            round_id INTEGER NOT NULL REFERENCES rounds (id) ON DELETE CASCADE,
            public_key TEXT NOT NULL, nonce INTEGER NOT NULL,
            received REAL, computed REAL NOT NULL,
            UNIQUE (round_id, public_key, nonce)
        )""",
        """CREATE TABLE verdicts (
            id INTEGER PRIMARY KEY,
            round_id INTEGER NOT NULL REFERENCES rounds (id) ON DELETE CASCADE,
            public_key TEXT NOT NULL, created_at REAL NOT NULL, summary TEXT NOT NULL
        )""",
        """CREATE TABLE jobs (
            id TEXT PRIMARY KEY,
            seq INTEGER NOT NULL UNIQUE,
            status TEXT NOT NULL CHECK (
                status IN ('queued', 'running', 'completed', 'failed', 'cancelled')),
            nonces INTEGER NOT NULL, request TEXT NOT NULL, result TEXT, error TEXT,
            created_at REAL NOT NULL, finished_at REAL
        )""",
        "CREATE INDEX jobs_open ON jobs (status) WHERE status IN ('queued', 'running')",
    ),
    (
        """CREATE TABLE receipt_headers (
            id INTEGER PRIMARY KEY,
            text TEXT NOT NULL UNIQUE
        )""",
        """CREATE TABLE receipts (
            seq INTEGER PRIMARY KEY AUTOINCREMENT,
            header_id INTEGER NOT NULL REFERENCES receipt_headers (id),
            at REAL NOT NULL,
            name BLOB NOT NULL, choice INTEGER NOT NULL,
            tokens INTEGER NOT NULL, size INTEGER NOT NULL, finish TEXT NOT NULL,
            request_id TEXT NOT NULL, block_hash TEXT NOT NULL,
            sha256 BLOB NOT NULL, line TEXT NOT NULL
        )""",
        "CREATE INDEX receipts_name ON receipts (name)",
        "CREATE INDEX receipts_at ON receipts (at)",
        "CREATE TABLE receipt_room (id INTEGER PRIMARY KEY CHECK (id = 1), filler BLOB NOT NULL)",
    ),
    ("ALTER TABLE jobs ADD COLUMN client TEXT", "ALTER TABLE outbox ADD COLUMN client TEXT"),
    (
        "ALTER TABLE receipts ADD COLUMN client TEXT",
        "CREATE INDEX receipts_client ON receipts (client, size) WHERE client IS NOT NULL",
    ),
    ("ALTER TABLE rounds ADD COLUMN under_pins INTEGER NOT NULL DEFAULT 0",),
    ("ALTER TABLE jobs ADD COLUMN digest TEXT",),
    ("ALTER TABLE outbox ADD COLUMN node_id INTEGER",),
)

RECEIVED: tuple[tuple[str, ...], ...] = (
    (
        # A file of the first version has this table and no migrations.
        """CREATE TABLE IF NOT EXISTS received (
            seq INTEGER PRIMARY KEY,
            id TEXT NOT NULL UNIQUE,
            kind TEXT NOT NULL, at REAL NOT NULL,
            nonces INTEGER NOT NULL, copies INTEGER NOT NULL,
            body TEXT NOT NULL
        )""",
    ),
)
"""The steps that lead to the file of a receiver."""

FILE = "service.sqlite3"
open_database = partial(Database, name=FILE, migrations=MIGRATIONS, secure_delete=True)
"""Opens the file of a service; :class:`assay.files.sqlite.Database` says how."""
