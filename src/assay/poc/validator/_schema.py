"""The tables of a validator, as the list of steps that lead to them. A step, once released, is never edited.

A message is waiting while ``drawn`` is below ``nonces``; ``planned`` is ahead of ``drawn`` while nonces are recomputed.
Its ``turn`` says when it is drawn from: `assay.poc.validator._epochs.first_turn`.
"""

MIGRATIONS: tuple[tuple[str, ...], ...] = (
    (
        """CREATE TABLE senders (
            id INTEGER PRIMARY KEY,
            public_key TEXT NOT NULL UNIQUE,
            first_at REAL NOT NULL, last_at REAL NOT NULL,
            messages INTEGER NOT NULL, nonces INTEGER NOT NULL, repeated INTEGER NOT NULL
        )""",
        """CREATE TABLE inbox (
            seq INTEGER PRIMARY KEY AUTOINCREMENT,
            sender INTEGER NOT NULL REFERENCES senders (id),
            id TEXT NOT NULL,
            kind TEXT NOT NULL CHECK (kind IN ('generated', 'validated', 'proof', 'pulled')),
            at REAL NOT NULL, epoch INTEGER NOT NULL,
            seed INTEGER NOT NULL, digest BLOB NOT NULL,
            nonces INTEGER NOT NULL,
            drawn INTEGER NOT NULL DEFAULT 0, planned INTEGER NOT NULL DEFAULT 0,
            body BLOB NOT NULL,
            UNIQUE (id, sender)
        )""",
        "CREATE INDEX inbox_waiting ON inbox (sender, drawn, seed) WHERE drawn < nonces AND planned = drawn",
        "CREATE INDEX inbox_planned ON inbox (seq) WHERE planned > drawn",
        "CREATE INDEX inbox_at ON inbox (at)",
        """CREATE TABLE epochs (
            number INTEGER PRIMARY KEY,
            secret BLOB NOT NULL, begins REAL, ends REAL
        )""",
        """CREATE TABLE blocks (
            seq INTEGER PRIMARY KEY AUTOINCREMENT,
            block_hash TEXT NOT NULL UNIQUE, block_height INTEGER NOT NULL, at REAL NOT NULL
        )""",
        """CREATE TABLE pulls (
            public_key TEXT NOT NULL, block_hash TEXT NOT NULL, node_id INTEGER NOT NULL, after INTEGER NOT NULL,
            PRIMARY KEY (public_key, block_hash, node_id)
        ) WITHOUT ROWID""",
        """CREATE TABLE verdicts (
            id INTEGER PRIMARY KEY,
            public_key TEXT NOT NULL, account TEXT NOT NULL, at REAL NOT NULL, verdict TEXT NOT NULL,
            nonces INTEGER NOT NULL, seconds REAL NOT NULL, fault TEXT
        )""",
    ),
    (
        "ALTER TABLE inbox ADD COLUMN turn REAL NOT NULL DEFAULT 0",
        "UPDATE inbox SET turn = (drawn + seed * 1.1102230246251565e-16 * min(nonces, 8)) / nonces WHERE nonces > 0",
        "DROP INDEX inbox_waiting",
        "CREATE INDEX inbox_waiting ON inbox (sender, turn) WHERE drawn < nonces AND planned = drawn",
    ),
)
