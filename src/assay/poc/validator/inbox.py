"""The inbox on disk: each message once, epochs with secrets, and open blocks.

What is drawn is a nonce of a round. The first message of a key that names it owns it, and a later
one keeps only its new nonces: ``nonces`` counts those, and ``claim`` holds them. So copies, under
whatever ids, are stored and neither drawn from nor given a turn.

A message is waiting while ``drawn`` is below ``nonces``; ``planned`` is ahead of ``drawn`` while
nonces are recomputed. Its ``turn`` says when it is drawn from:
`assay.poc.validator.epochs.first_turn`.
"""

import hashlib
import time
from collections import Counter, defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from secrets import token_bytes
from typing import Any

import sqlalchemy as sa

from assay.errors import StorageError
from assay.files.jsonl import JsonObject, dumps
from assay.files.sqlite import Database
from assay.poc.net.refusals import Refusal
from assay.poc.net.shares import disk_room, fair_share
from assay.poc.validator.claims import Block, named_nonces, restrict_claim
from assay.poc.validator.epochs import SECRET_BYTES, Epoch, draw, first_turn, message_seed
from assay.poc.verdict.ledger import Ledger

# The steps that lead to the tables. A step, once released, is never edited.
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
            turn REAL NOT NULL, claim BLOB, pins TEXT, body BLOB NOT NULL,
            UNIQUE (id, sender)
        )""",
        "CREATE INDEX inbox_waiting ON inbox (sender, turn) WHERE drawn < nonces AND planned = "
        "drawn",
        "CREATE INDEX inbox_planned ON inbox (seq) WHERE planned > drawn",
        "CREATE INDEX inbox_at ON inbox (at)",
        """CREATE TABLE epochs (
            number INTEGER PRIMARY KEY,
            secret BLOB NOT NULL, begins REAL, ends REAL, served REAL NOT NULL
        )""",
        "CREATE TABLE ledger_heads (count INTEGER PRIMARY KEY, hash TEXT NOT NULL)",
        """CREATE TABLE blocks (
            seq INTEGER PRIMARY KEY AUTOINCREMENT,
            block_hash TEXT NOT NULL UNIQUE, block_height INTEGER NOT NULL, at REAL NOT NULL
        )""",
        """CREATE TABLE pulls (
            public_key TEXT NOT NULL, block_hash TEXT NOT NULL, node_id INTEGER NOT NULL,
            after INTEGER NOT NULL,
            PRIMARY KEY (public_key, block_hash, node_id)
        ) WITHOUT ROWID""",
        """CREATE TABLE verdicts (
            id INTEGER PRIMARY KEY,
            public_key TEXT NOT NULL, account TEXT NOT NULL, at REAL NOT NULL,
            verdict TEXT NOT NULL,
            nonces INTEGER NOT NULL, seconds REAL NOT NULL, fault TEXT
        )""",
    ),
    (
        """CREATE TABLE node_rounds (
            id INTEGER PRIMARY KEY,
            sender INTEGER NOT NULL REFERENCES senders (id),
            round TEXT NOT NULL, block_hash TEXT NOT NULL,
            at REAL NOT NULL, nonces INTEGER NOT NULL DEFAULT 0,
            UNIQUE (sender, round)
        )""",
        """CREATE TABLE round_nonces (
            node_round INTEGER NOT NULL REFERENCES node_rounds (id),
            nonce INTEGER NOT NULL,
            PRIMARY KEY (node_round, nonce)
        ) WITHOUT ROWID""",
    ),
    ("ALTER TABLE blocks ADD COLUMN computed TEXT",),
)


NAME = "validator.sqlite3"
SERVED_EVERY = 60.0  # seconds after which the time of an epoch is written down
NONCE_BYTES = 16  # of the disk, by which the nonces of a round are known again
# What is deleted in one transaction, so that messages wait little: messages, nonces and rounds.
DELETED = 5000
FORGOTTEN = 50_000
ROUNDS = 1000
_SIZE = "length(body) + coalesce(length(claim), 0)"


@dataclass(frozen=True)
class Message:
    """A message on its way into the inbox."""

    public_key: str  # key of the node
    id: str  # identity under which it is kept once
    kind: str  # what it is: generated, validated, proof or pulled
    nonces: int  # number of nonces that it claims; 0 for a message that is no evidence
    body: bytes  # bytes as they were received
    claim: bytes | None = None  # of ``Claim.encode``; None where it is no evidence
    pins: str | None = None  # hash of what the node computed by the pins of its time
    pulled: tuple[str, int, int] | None = (
        None  # block, machine and highest nonce, where it was pulled
    )

    @property
    def size(self) -> int:
        """Bytes that are kept of it."""
        return len(self.body) + len(self.claim or b"") + NONCE_BYTES * self.nonces


@dataclass(frozen=True)
class Draw:
    """Nonces that are drawn from a message: the places ``[drawn, planned)`` of its order."""

    seq: int  # number of the message in the inbox
    public_key: str  # key of the node
    id: str  # identity under which the message is kept once
    seed: int  # number that orders its nonces, from the secret of the epoch in which it arrived
    digest: bytes  # SHA-256 of its body
    drawn: int  # number of nonces that were drawn before
    planned: int  # number of nonces that are drawn after this draw
    nonces: int  # number of nonces that the message was the first to name
    claim: bytes | None  # what the message claims of these; None in a file of an older version
    pins: str | None  # hash of what the node computed by the pins of its time

    @property
    def name(self) -> str:
        """Name of its evidence in the ledger: a draw that is repeated after a crash has the same.

        The seed tells apart two messages of one id, of which the first was deleted before the
        second one came.
        """
        owner = hashlib.sha256(self.public_key.encode()).hexdigest()[:16]
        return f"{owner}/{self.id}/{self.seed}/{self.drawn}"


@dataclass(frozen=True)
class NamedNonces:
    """The nonces that a message names."""

    sender: int  # number of the node that sent it
    round: str  # identity of the round
    block: str  # hash of the block of that round
    nonces: Sequence[int]


class Inbox:
    """Reads and writes the database of a validator.

    One secret draws for ``epoch_seconds``, ``sample`` nonces of a message at a time; up to ``most``
    bytes of a node are kept at the same time, and no more than half of what is still free on the
    disk.
    """

    def __init__(
        self, data_dir: Path, *, epoch_seconds: float, sample: int, most: int = 2**32
    ) -> None:
        self.epoch_seconds = epoch_seconds
        self._sample = sample
        self._most = most
        self.database = Database(data_dir, name=NAME, migrations=MIGRATIONS)
        self.is_behind = False
        """Whether the last :meth:`prune` may have left something that is as old."""
        self._senders: dict[str, int] = {}
        # Since when an epoch has been served, by its number: with the time before this start.
        self._since: dict[int, float] = {}
        with self.database.write() as connection:
            self._roll(connection, time.time())
            for number, key in connection.exec_driver_sql("SELECT id, public_key FROM senders"):
                self._senders[key] = number
            sizes = connection.exec_driver_sql(
                f"SELECT sender, sum({_SIZE}) FROM inbox GROUP BY sender"
            )
            self._kept: Counter[int] = Counter(dict(map(tuple, sizes)))  # bytes by sender
            self._name_stored(connection)
            for sender, nonces in connection.exec_driver_sql(
                "SELECT sender, sum(nonces) FROM node_rounds GROUP BY sender"
            ):
                self._kept[sender] += NONCE_BYTES * nonces
        self._free = disk_room(data_dir)

    def close(self) -> None:
        """Close the file."""
        self.database.close()

    def is_full(self, public_key: str, size: int) -> bool:
        """Return whether a message of this size exceeds a node's room or that of the disk."""
        stored_bytes = self._kept[self._senders.get(public_key, 0)]
        return stored_bytes + size > min(self._most, fair_share(self._free + stored_bytes, 0))

    def add(self, messages: Sequence[Message]) -> list[bool]:
        """Store messages in one transaction; return for each whether it is new.

        Only one thread may call this.
        """
        now = time.time()
        senders = dict(self._senders)
        with self.database.write() as connection:
            epoch = self._roll(connection, now)
            for key in {message.public_key for message in messages} - senders.keys():
                senders[key] = connection.exec_driver_sql(
                    "INSERT INTO senders VALUES (NULL, ?, ?, ?, 0, 0, 0) RETURNING id",
                    (key, now, now),
                ).scalar_one()
            ids = tuple(message.id for message in messages)
            query = f"SELECT sender, id FROM inbox WHERE id IN ({','.join('?' * len(ids))})"
            stored = {tuple(row) for row in connection.exec_driver_sql(query, ids)}
            fresh: list[bool] = []
            named: list[NamedNonces] = []
            for message in messages:
                owner = (senders[message.public_key], message.id)
                fresh.append(owner not in stored)
                stored.add(owner)
                claimed = named_nonces(message.claim, message.nonces if fresh[-1] else 0)
                named.append(NamedNonces(owner[0], *claimed))
            added: list[tuple[Any, ...]] = []
            changes: list[tuple[float, int, int, int, int]] = []
            grown = Counter[int]()
            new_places = _add_nonces(connection, named, now)
            for message, new, places in zip(messages, fresh, new_places, strict=True):
                sender = senders[message.public_key]
                nonces = (len(places) if message.claim else message.nonces) if new else 0
                changes.append((now, int(new), nonces, int(not new), sender))
                if new:
                    claim = restrict_claim(message.claim, message.nonces, places)
                    digest = hashlib.sha256(message.body).digest()
                    seed = message_seed(epoch.secret, message.public_key, message.id, digest)
                    arrival = (sender, message.id, message.kind, now, epoch.number, seed, digest)
                    turn = first_turn(seed, nonces, self._sample)
                    added.append((*arrival, nonces, turn, message.body, claim, message.pins))
                    grown[sender] += len(message.body) + len(claim or b"") + NONCE_BYTES * nonces
            if added:
                connection.exec_driver_sql(
                    "INSERT INTO inbox (sender, id, kind, at, epoch, seed, digest, nonces, turn, "
                    "body, claim, pins) VALUES (?,?,?,?,?,?,?,?,?,?,?,?)",
                    added,
                )
            connection.exec_driver_sql(
                "UPDATE senders SET last_at=?, messages=messages+?, nonces=nonces+?, "
                "repeated=repeated+? WHERE id=?",
                changes,
            )
            if pulls := [(m.public_key, *m.pulled) for m in messages if m.pulled is not None]:
                connection.exec_driver_sql(
                    "INSERT INTO pulls VALUES (?, ?, ?, ?) "
                    "ON CONFLICT DO UPDATE SET after = max(after, excluded.after)",
                    pulls,
                )
        self._senders = senders
        self._free = disk_room(self.database.path.parent)
        self._kept.update(grown)
        return fresh

    def _name_stored(self, connection: sa.Connection) -> None:
        """Give every nonce of an older inbox to the message that drew it, or that named it first.

        A version that drew from copies wrote such files. What a message has drawn stays drawn.
        """
        if connection.exec_driver_sql("SELECT 1 FROM node_rounds").first():
            return
        query = (
            "SELECT seq, sender, at, seed, nonces, planned, drawn, claim FROM inbox WHERE seq = ?"
        )
        waiting = "SELECT seq FROM inbox WHERE claim IS NOT NULL AND nonces > 0 ORDER BY seq"
        numbers = connection.exec_driver_sql(waiting).scalars().all()
        for first in (True, False):
            for number in numbers:
                row = connection.exec_driver_sql(query, (number,)).one()
                named = NamedNonces(row.sender, *named_nonces(row.claim, row.nonces))
                planned = draw(row.seed, named.nonces, 0, row.planned)
                if first:  # a copy may have drawn a nonce before the message that named it
                    drawn = [named.nonces[place] for place in planned]
                    _add_nonces(connection, [replace(named, nonces=drawn)], row.at)
                    continue
                (new,) = _add_nonces(connection, [named], row.at)
                places = sorted({*new, *planned})
                claim = restrict_claim(row.claim, row.nonces, places)
                turn = first_turn(row.seed, len(places), self._sample)
                turn += row.drawn / max(1, len(places))
                connection.exec_driver_sql(
                    "UPDATE inbox SET nonces = ?, turn = ?, claim = ? WHERE seq = ?",
                    (len(places), turn, claim, number),
                )
                self._kept[row.sender] -= len(row.claim) - len(claim or b"")

    def pulled(self, public_key: str, block_hash: str, node_id: int) -> int:
        """Return the highest nonce that was pulled of a machine in a block; −1 before the first."""
        rows = self._rows(
            "SELECT after FROM pulls WHERE public_key = ? AND block_hash = ? AND node_id = ?",
            public_key,
            block_hash,
            node_id,
        )
        return int(rows[0].after) if rows else -1

    def roll(self) -> None:
        """End the epoch if its time has passed. Call it where :meth:`add` is called."""
        with self.database.write() as connection:
            self._roll(connection, time.time())
        self._free = disk_room(self.database.path.parent)

    def _roll(self, connection: sa.Connection, now: float) -> Epoch:
        """Return the epoch of now. The secret after it is on disk already, so that its commitment
        can be read.

        An epoch has passed once it was served for so long: neither a clock that is set ends it, nor
        a time in which no process ran and no client read the commitment that follows.
        """
        current = (
            "SELECT number, secret, begins, ends, served FROM epochs "
            "WHERE begins IS NOT NULL AND ends IS NULL"
        )
        clock = time.monotonic()
        row = connection.exec_driver_sql(current).first()
        if row is not None:
            served = clock - self._since.setdefault(row.number, clock - row.served)
            if served < self.epoch_seconds:
                if served - row.served > min(SERVED_EVERY, self.epoch_seconds / 16):
                    connection.exec_driver_sql(
                        "UPDATE epochs SET served = ? WHERE number = ?", (served, row.number)
                    )
                return Epoch(*row[:4])
        number = 1 if row is None else row.number + 1
        self._since[number] = clock
        # All epochs but the first are there already: each was made with the one before it.
        secrets = [(epoch, token_bytes(SECRET_BYTES)) for epoch in (number, number + 1)]
        connection.exec_driver_sql(
            "INSERT OR IGNORE INTO epochs VALUES (?, ?, NULL, NULL, 0)", secrets
        )
        connection.exec_driver_sql("UPDATE epochs SET ends = ? WHERE number = ?", (now, number - 1))
        connection.exec_driver_sql("UPDATE epochs SET begins = ? WHERE number = ?", (now, number))
        return Epoch(*connection.exec_driver_sql(current).one()[:4])

    def epochs(self, limit: int) -> list[JsonObject]:
        """Return what anyone may know of the latest epochs, the newest first."""
        return [
            Epoch(**row._mapping).public()
            for row in self._rows(
                "SELECT number, secret, begins, ends FROM epochs ORDER BY number DESC LIMIT ?",
                limit,
            )
        ]

    def announce(self, block_hash: str, block_height: int, computed: Collection[str]) -> bool:
        """Open a block under pins by which nodes compute so; return whether it is new."""
        with self.database.write() as connection:
            rows = connection.exec_driver_sql(
                "INSERT INTO blocks VALUES (NULL, ?, ?, ?, ?) ON CONFLICT DO NOTHING",
                (block_hash, block_height, time.time(), " ".join(computed)),
            )
            announced = connection.exec_driver_sql(
                "SELECT block_height FROM blocks WHERE block_hash = ?", (block_hash,)
            ).scalar()
            if announced != block_height:
                raise Refusal(
                    409,
                    f"block {block_hash:.80} at height {block_height}",
                    wanted=f"height {announced}, at which it was announced before",
                    do="announce every block at its height on the chain; where the first was "
                    "wrong, go on with the next block",
                )
            return rows.rowcount == 1

    def blocks(self, limit: int) -> dict[str, Block]:
        """Return the latest blocks, by hash."""
        query = "SELECT block_hash, block_height, computed FROM blocks ORDER BY seq DESC LIMIT ?"
        return {
            row.block_hash: Block(
                row.block_height, row.computed and frozenset(row.computed.split())
            )
            for row in self._rows(query, limit)
        }

    def unfinished(self, limit: int) -> list[Draw]:
        """Return draws whose evidence may not be in the ledger yet, the oldest first."""
        with self.database.read() as connection:
            return self._draws(connection, "planned > drawn ORDER BY inbox.seq", limit)

    def waiting(self) -> list[str]:
        """Return the keys of the nodes of which nonces may be drawn."""
        query = (
            "SELECT public_key FROM senders WHERE EXISTS (SELECT 1 FROM inbox "
            "WHERE sender = senders.id AND drawn < nonces AND planned = drawn)"
        )
        return [row.public_key for row in self._rows(query)]

    def plan(self, public_keys: Sequence[str], most: int) -> list[Draw]:
        """Draw up to ``most`` nonces, a sample of each node, in one transaction; return the draws.

        They come from the message whose turn it is, which neither the node nor the validator
        chooses, and from the next ones where it has fewer: many small messages get no fewer nonces
        drawn than a large one. A node that stands there twice has two samples drawn.
        """
        chosen: list[int] = []
        query = (
            "SELECT seq, nonces - drawn FROM inbox "
            "WHERE sender = ? AND drawn < nonces AND planned = drawn ORDER BY turn LIMIT ?"
        )
        change = "UPDATE inbox SET planned = drawn + ? WHERE seq = ?"
        with self.database.write() as connection:
            for key in public_keys:
                room = min(self._sample, most)
                sender = self._senders.get(key, 0)
                for seq, waiting in connection.exec_driver_sql(query, (sender, room)).all():
                    drawn = min(waiting, room)
                    if drawn <= 0:
                        break
                    connection.exec_driver_sql(change, (drawn, seq))
                    chosen.append(seq)
                    room -= drawn
                    most -= drawn
            marks = ",".join(map(str, chosen))
            return (
                self._draws(connection, f"seq IN ({marks}) ORDER BY inbox.seq", len(chosen))
                if chosen
                else []
            )

    def _draws(self, connection: sa.Connection, where: str, limit: int) -> list[Draw]:
        query = (
            "SELECT seq, public_key, inbox.id, seed, digest, drawn, planned, inbox.nonces, claim, "
            "pins FROM inbox JOIN senders ON senders.id = sender "
            f"WHERE {where} LIMIT {limit:d}"
        )
        return [Draw(*row) for row in connection.exec_driver_sql(query)]

    def finish(
        self,
        draws: Sequence[Draw],
        verdicts: Sequence[JsonObject] = (),
        *,
        head: tuple[int, str] | None = None,
    ) -> None:
        """Record that evidence is in the ledger, with changed verdicts and the ledger's head."""
        with self.database.write() as connection:
            if head is not None:
                connection.exec_driver_sql("DELETE FROM ledger_heads")
                connection.exec_driver_sql("INSERT INTO ledger_heads VALUES (?, ?)", head)
            if rows := [(d.planned, d.planned, d.planned, d.seq) for d in draws]:
                connection.exec_driver_sql(
                    "UPDATE inbox SET turn = turn + (? - drawn) * 1.0 / nonces, drawn = ?, "
                    "planned = ? WHERE seq = ?",
                    rows,
                )
            if verdicts:
                connection.execute(self.database["verdicts"].insert(), list(verdicts))

    def check_ledger(self, ledger: Ledger) -> None:
        """Refuse a ledger that was emptied, replaced, or is an older copy."""
        for row in self._rows("SELECT count AS entries, hash FROM ledger_heads"):
            if not ledger.contains(row.entries, row.hash):
                raise StorageError(
                    f"{ledger.path} without the {row.entries} entries that {self.database.path} "
                    f"knows of",
                    wanted="the ledger that was written beside it, with nothing missing",
                    do="restore both files from one backup, or move both away to begin again, "
                    "which forgets all accounts",
                )
        self.finish((), head=ledger.head)

    def senders(self) -> dict[str, JsonObject]:
        """Return counts of every node that has sent something."""
        return {row.public_key: dict(row._mapping) for row in self._rows("SELECT * FROM senders")}

    def verdicts(self, limit: int, *, after: int | None = None) -> list[JsonObject]:
        """Return changes of verdicts after an id, oldest first, or the latest, newest first."""
        order = "DESC" if after is None else "ASC"
        query = f"SELECT * FROM verdicts WHERE id > ? ORDER BY id {order} LIMIT ?"
        return [dict(row._mapping) for row in self._rows(query, after or 0, limit)]

    def latest_verdicts(self) -> dict[str, str]:
        """Return the latest verdict of every account that ever had one."""
        rows = self._rows(
            "SELECT account, verdict FROM verdicts "
            "WHERE id IN (SELECT max(id) FROM verdicts GROUP BY account)"
        )
        return {row.account: row.verdict for row in rows}

    def counts(self) -> dict[str, int]:
        """Return sums over all nodes: messages, nonces and repeated messages."""
        sums = ", ".join(
            f"coalesce(sum({name}), 0) AS {name}" for name in ("messages", "nonces", "repeated")
        )
        return self._rows(f"SELECT {sums} FROM senders")[0]._asdict()

    def _rows(self, query: str, *values: object) -> Sequence[sa.Row[Any]]:
        with self.database.read() as connection:
            return connection.exec_driver_sql(query, values).all()

    def prune(self, keep: float, open_blocks: Collection[str] = ()) -> int:
        """Delete messages older than ``keep`` seconds that are not being recomputed.

        The nonces of a round are forgotten as late, and not while messages of its block are taken:
        a copy would be drawn again.
        """
        now = self.database.settled_time()
        with self.database.write() as connection:
            # A part at a time: one long transaction would hold up every message that arrives.
            old = f"SELECT seq FROM inbox WHERE at < ? AND planned = drawn LIMIT {DELETED}"
            gone = connection.exec_driver_sql(
                f"DELETE FROM inbox WHERE seq IN ({old}) RETURNING sender, {_SIZE}", (now - keep,)
            ).all()
            freed = [(sender, size) for sender, size in gone]
            closed = "at < ? AND block_hash NOT IN (SELECT value FROM json_each(?))"
            late = (now - keep, dumps([*open_blocks]))
            connection.exec_driver_sql(
                "DELETE FROM pulls WHERE block_hash IN "
                f"(SELECT block_hash FROM blocks WHERE {closed})",
                late,
            )
            rounds = connection.exec_driver_sql(
                f"SELECT id, sender, nonces FROM node_rounds WHERE {closed} LIMIT {ROUNDS}", late
            ).all()
            room = FORGOTTEN
            parts: list[tuple[int, int]] = []
            for number, sender, nonces in rounds:
                parts.append((min(nonces, room), number))
                room -= parts[-1][0]
                freed.append((sender, NONCE_BYTES * parts[-1][0]))
            if parts:
                connection.exec_driver_sql(
                    "DELETE FROM round_nonces WHERE node_round = ?2 AND nonce IN "
                    "(SELECT nonce FROM round_nonces WHERE node_round = ?2 LIMIT ?1)",
                    parts,
                )
                connection.exec_driver_sql(
                    "UPDATE node_rounds SET nonces = nonces - ? WHERE id = ?", parts
                )
                connection.exec_driver_sql("DELETE FROM node_rounds WHERE nonces = 0")
        self.is_behind = len(gone) == DELETED or len(rounds) == ROUNDS or room == 0
        for sender, size in freed:
            self._kept[sender] -= size
        return len(gone)


def _add_nonces(
    connection: sa.Connection, named: Sequence[NamedNonces], at: float
) -> list[list[int]]:
    """Keep the nonces that messages name; return for each the places of those that are new.

    Of several messages that name a nonce, the first has it.
    """
    # One statement for all rounds and one for all nonces: the writer takes thousands of messages a
    # second.
    rounds = {(entry.sender, entry.round): entry.block for entry in named if entry.nonces}
    rows = connection.exec_driver_sql(
        "INSERT INTO node_rounds (sender, round, block_hash, at) "
        "SELECT json_extract(value, '$[0]'), json_extract(value, '$[1]'), "
        "json_extract(value, '$[2]'), ? FROM json_each(?) "
        "WHERE true "  # without it, ON would begin the condition of a join
        "ON CONFLICT (sender, round) DO UPDATE SET at = max(at, excluded.at) "
        "RETURNING sender, round, id",
        (at, dumps([(*key, block) for key, block in rounds.items()])),
    )
    numbers = {(sender, round): number for sender, round, number in rows}
    each = [(numbers.get((entry.sender, entry.round), 0), entry.nonces) for entry in named]
    rows = connection.exec_driver_sql(
        "INSERT OR IGNORE INTO round_nonces SELECT json_extract(message.value, '$[0]'), "
        "nonces.value FROM json_each(?) AS message, json_each(message.value, '$[1]') AS nonces "
        "RETURNING node_round, nonce",
        (dumps(each),),
    )
    new = defaultdict[int, set[int]](set)
    for number, nonce in rows.all():
        new[number].add(nonce)
    if new:
        connection.exec_driver_sql(
            "UPDATE node_rounds SET nonces = nonces + ? WHERE id = ?",
            [(len(nonces), number) for number, nonces in new.items()],
        )
    places: list[list[int]] = []
    for number, nonces in each:
        places.append([place for place, nonce in enumerate(nonces) if nonce in new[number]])
        new[number].difference_update(nonces)  # of a later message they are copies
    return places
