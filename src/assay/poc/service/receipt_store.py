"""Receipts of responses on disk: one canonical line each, under the header that it would have in a file."""

import hashlib
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import sqlalchemy as sa

from assay.errors import StorageError
from assay.files.jsonl import JsonObject
from assay.poc.net.refusals import Refusal
from assay.poc.service.database import Database
from assay.poc.service.outbox import Outbox

MOST_BYTES = 2**25
"""Bytes of the receipts of one answer: 32 MiB, so that no file of receipts has more tokens than may be read."""

_CHUNK_BYTES = 2**20  # of the lines that are read at a time
_NAME_BYTES = 16
_PRUNED = 500  # receipts that one transaction deletes: more would hold up those that are written
_ROOM = (2**16, 2**24)  # least and most bytes that are written to see whether there is room again


@dataclass(frozen=True, kw_only=True)
class NewReceipt:
    """A receipt on its way to the disk.

    Args:
        header: Line of its header.
        request_id: Id of the request.
        index: Number of the choice among those of the request.
        block_hash: Hash of the block that is in its seed.
        tokens: Tokens of the output.
        finish: Why the output ended.
        line: Its line in a file, without the line end.
    """

    header: str
    request_id: str
    index: int
    block_hash: str
    tokens: int
    finish: str
    line: str
    size: int = field(init=False)
    sha256: bytes = field(init=False)

    def __post_init__(self) -> None:
        encoded = self.line.encode()
        object.__setattr__(self, "size", len(encoded))
        object.__setattr__(self, "sha256", hashlib.sha256(encoded).digest())


@dataclass(frozen=True)
class Page:
    """Receipts that make one file: in the order in which they were stored, of one header, no choice twice.

    Args:
        header: Line of their header; None without receipts.
        chunks: Sequence numbers at which the lines are cut into parts that are read at a time: the first is that after
            which the page begins, the last that of the last receipt.
        more: Whether further receipts follow.
    """

    header: str | None
    chunks: tuple[int, ...]
    more: bool


class Receipts:
    """Reads and writes the table of receipts.

    Args:
        database: Database of the service.
        outbox: Outbox for callbacks.
        url: Callback URL to which receipts are announced, if any.
        interval: Time for which receipts are collected into one callback.
        most: Receipts of one callback.
    """

    def __init__(self, database: Database, outbox: Outbox, *, url: str | None, interval: float, most: int) -> None:
        self._db, self._outbox = database, outbox
        self._url, self._interval, self._most = url, interval, most
        self._headers: dict[str, int] = {}
        self._started = time.time() - time.monotonic()
        self._journal_owed = not database.empty_journal()
        self._tidying = threading.Lock()

    def add(self, receipts: Sequence[NewReceipt]) -> list[bool]:
        """Store receipts in one transaction; return of each whether it is new. They are on disk when this returns.

        A receipt that is stored already, byte for byte and under the same header, is not stored twice. Only one thread
        may call this.
        """
        now, headers, fresh, announced = time.time(), dict(self._headers), [], []
        insert = (
            "INSERT INTO receipts (header_id, at, name, choice, tokens, size, finish, request_id, block_hash, sha256, "
            "line) SELECT ?,?,?,?,?,?,?,?,?,?,? "
            "WHERE NOT EXISTS (SELECT 1 FROM receipts WHERE name = ? AND sha256 = ? AND header_id = ?) RETURNING seq"
        )
        with self._db.write() as connection:
            for receipt in receipts:
                if receipt.header not in headers:
                    headers[receipt.header] = _header_id(connection, receipt.header)
                header, name = headers[receipt.header], _name(receipt.request_id)
                about = (receipt.index, receipt.tokens, receipt.size, receipt.finish)
                texts = (receipt.request_id, receipt.block_hash, receipt.sha256, receipt.line)
                values = (header, now, name, *about, *texts, name, receipt.sha256, header)
                seq = connection.exec_driver_sql(insert, values).scalar()
                fresh.append(seq is not None)
                if seq is not None:
                    announced.append((int(seq), header))
            if self._url is not None:
                self._outbox.announce_receipts(
                    connection, self._url, announced, interval=self._interval, most=self._most
                )
        self._headers = headers
        return fresh

    def probe(self, size: int) -> None:
        """Write and delete about as many bytes as receipts that found no room.

        Raises:
            StorageError: There is no room yet.
        """
        filler = min(max(size, _ROOM[0]), _ROOM[1])
        with self._db.write() as connection:
            connection.exec_driver_sql("INSERT OR REPLACE INTO receipt_room VALUES (1, zeroblob(?))", (filler,))
        with self._db.write() as connection:
            connection.exec_driver_sql("DELETE FROM receipt_room")

    # Reading

    def of_request(self, request_id: str, index: int | None = None) -> list[str]:
        """Return the receipts of a request, or of one of its choices: each a JSON object as text, with its header.

        Raises:
            Refusal: 404, no such receipt; 413, they are too large for one answer.
        """
        where, values = _request(request_id, index)
        with self._db.read() as connection:
            query = f"SELECT count(*), coalesce(sum(size), 0) FROM receipts WHERE {where}"
            count, size = connection.exec_driver_sql(query, values).one()
            if not count:
                raise _unknown()
            if size > MOST_BYTES:
                raise Refusal(
                    413,
                    f"{count} receipts of {size} bytes",
                    wanted=f"at most {MOST_BYTES} bytes in one answer",
                    do="ask for one choice with ?index=, or fetch /api/v1/receipts.jsonl?request_id=",
                )
            query = (
                "SELECT seq, at, lower(hex(sha256)), text, line FROM receipts "
                f"JOIN receipt_headers ON receipt_headers.id = header_id WHERE {where} ORDER BY choice, seq"
            )
            return [
                f'{{"seq":{seq},"stored_at":{at!r},"sha256":"{digest}","header":{header},"receipt":{line}}}'
                for seq, at, digest, header, line in connection.exec_driver_sql(query, values)
            ]

    def listed(self, after: int, limit: int) -> list[JsonObject]:
        """Return what there is to know of receipts after a sequence number without reading them, oldest first."""
        query = (
            'SELECT seq, request_id, choice AS "index", block_hash, tokens, finish, size, at AS stored_at, '
            "lower(hex(sha256)) AS sha256 FROM receipts WHERE seq > ? ORDER BY seq LIMIT ?"
        )
        with self._db.read() as connection:
            return [dict(row._mapping) for row in connection.exec_driver_sql(query, (after, limit))]

    def page(self, after: int, limit: int, *, request_id: str | None = None) -> Page:
        """Return the longest run of receipts after a sequence number that makes one file of bounded size."""
        where, values = ("1", ()) if request_id is None else _request(request_id)
        query = (
            f"SELECT seq, header_id, name, choice, size FROM receipts WHERE seq > ? AND {where} ORDER BY seq LIMIT ?"
        )
        taken: list[int] = []
        chunks: list[int] = [after]
        seen: set[tuple[bytes, int]] = set()
        total = part = 0
        header, more = None, False
        with self._db.read() as connection:
            for seq, header_id, name, choice, size in connection.exec_driver_sql(query, (after, *values, limit + 1)):
                total += size
                other = header not in (None, header_id) or (name, choice) in seen
                if len(taken) == limit or other or (taken and total > MOST_BYTES):
                    more = True
                    break
                if taken and part + size > _CHUNK_BYTES:
                    chunks.append(taken[-1])
                    part = 0
                part += size
                taken.append(seq)
                seen.add((name, choice))
                header = header_id
            chunks += taken[-1:]
            text = "SELECT text FROM receipt_headers WHERE id = ?"
            line = None if header is None else connection.exec_driver_sql(text, (header,)).scalar_one()
        return Page(line, tuple(chunks), more)

    def lines(self, low: int, high: int, *, request_id: str | None = None) -> list[tuple[int, str]]:
        """Return tokens and line of the receipts after ``low``, up to ``high``: neighbours in a page's ``chunks``."""
        where, values = ("1", ()) if request_id is None else _request(request_id)
        query = f"SELECT tokens, line FROM receipts WHERE seq > ? AND seq <= ? AND {where} ORDER BY seq"
        with self._db.read() as connection:
            return [(tokens, line) for tokens, line in connection.exec_driver_sql(query, (low, high, *values))]

    # Deleting

    def delete(self, request_id: str, index: int | None = None) -> int:
        """Delete the receipts of a request, or of one of its choices; return how many.

        Raises:
            Refusal: 404, no such receipt.
            StorageError: The file cannot be written.
        """
        where, values = _request(request_id, index)
        with self._db.write() as connection:
            count = connection.exec_driver_sql(f"DELETE FROM receipts WHERE {where}", values).rowcount
            if not count:
                raise _unknown()
            self._outbox.forget_receipts(connection)
        self._journal_owed = True
        self.tidy()
        return count

    def prune(self, keep: float) -> int:
        """Delete some receipts that are older than ``keep`` seconds; return how many: 0 if there are no more.

        A clock that is suddenly far ahead deletes nothing: time is counted from the start of the process.
        """
        now = min(time.time(), self._started + time.monotonic())
        with self._db.write() as connection:
            old = "SELECT seq FROM receipts WHERE at < ? ORDER BY at LIMIT ?"
            delete = f"DELETE FROM receipts WHERE seq IN ({old})"
            count = connection.exec_driver_sql(delete, (now - keep, _PRUNED)).rowcount
            if count:
                self._outbox.forget_receipts(connection)
        if count:  # and is else left alone: another thread may just have set it
            self._journal_owed = True
        return count

    def tidy(self) -> None:
        """Empty the journal if it may hold something that was deleted. Readers may delay it until the next call."""
        with self._tidying:
            if self._journal_owed:
                self._journal_owed = False  # now: what is deleted meanwhile owes another time
                try:
                    if not self._db.empty_journal():
                        self._journal_owed = True
                except StorageError:
                    self._journal_owed = True


def _header_id(connection: sa.Connection, header: str) -> int:
    connection.exec_driver_sql("INSERT INTO receipt_headers (text) VALUES (?) ON CONFLICT DO NOTHING", (header,))
    return int(connection.exec_driver_sql("SELECT id FROM receipt_headers WHERE text = ?", (header,)).scalar_one())


def _name(request_id: str) -> bytes:
    """Return the hash under which the receipts of a request are found."""
    return hashlib.sha256(request_id.encode("utf-8", "surrogatepass")).digest()[:_NAME_BYTES]


def _request(request_id: str, index: int | None = None) -> tuple[str, tuple[Any, ...]]:
    """Return the condition on receipts of a request, or of one of its choices, and its values."""
    where, values = "name = ?", (_name(request_id),)
    return (where, values) if index is None else (f"{where} AND choice = ?", (*values, index))


def _unknown() -> Refusal:
    return Refusal(
        404,
        "no such receipt",
        wanted="the id of a request whose receipts are kept",
        do="ask GET /api/v1/receipts for what is kept",
    )
