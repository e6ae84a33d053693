"""Rounds and their records on disk."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import sqlalchemy as sa

from assay.poc.protocol import Fingerprint, Header, Record, Round, get_pipeline
from assay.poc.service._refusals import Refusal
from assay.poc.service._states import State
from assay.poc.service.store._database import Database
from assay.poc.service.store._outbox import Outbox

__all__ = ["Batch", "Histogram", "Rounds", "StoredRound"]

RECENT = 256


@dataclass(frozen=True, kw_only=True)
class StoredRound:
    """A round as the service keeps it: a row of the table ``rounds``.

    ``node_id``, ``node_count``, ``group_id`` and ``n_groups`` are as requested; :attr:`round` folds them into
    one share, whose nonces are ``node_id + group_id · node_count`` and every ``n_groups · node_count`` after it.
    """

    id: int
    block_hash: str
    public_key: str
    block_height: int
    node_id: int
    node_count: int
    group_id: int
    n_groups: int
    preset: str
    seq_len: int
    batch_size: int
    r_target: float
    strength: int
    reference: str
    digest: str
    weights: str
    fraud_threshold: float
    callback_url: str | None
    created_at: float
    touched_at: float
    next_nonce: int
    checked: int
    valid: int
    seconds: float

    @property
    def round(self) -> Round:
        """The same round for the engine."""
        return make_round(self.__dict__)

    def header(self, fingerprint: Fingerprint, public_key: str | None = None) -> Header:
        """Return the header under which nonces of this round are computed, or those of another key in it."""
        return Header(
            round=replace(self.round, public_key=public_key or self.public_key),
            pipeline=get_pipeline(self.preset),
            digest=self.digest,
            weights=self.weights,
            fingerprint=fingerprint,
            nonces=(),
        )

    def public(self) -> dict[str, Any]:
        """Return what a reader may know of it: all but the callback URL, which may carry a token."""
        hidden = {"callback_url", "next_nonce", "checked", "valid", "seconds", "touched_at"}
        return {name: value for name, value in self.__dict__.items() if name not in hidden}


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Results of one batch on their way to disk."""

    epoch: int
    round_id: int
    records: Sequence[Record]
    valid: Sequence[bool]
    next_nonce: int
    seconds: float


@dataclass(frozen=True)
class Histogram:
    """Bins of distances: ``size`` of them between ``low`` and ``high``, and what lies outside."""

    low: float
    high: float
    size: int

    def bin(self, distance: float) -> int:
        """Return the bin of a distance; -1 below the first and ``size`` above the last."""
        if distance < self.low:
            return -1
        return min(int((distance - self.low) / (self.high - self.low) * self.size), self.size)


def make_round(values: dict[str, Any]) -> Round:
    """Return the :class:`Round` of requested fields.

    Raises:
        UsageError: a field is out of range.
    """
    for name, low, high in (("node_id", 0, "node_count"), ("group_id", 0, "n_groups")):
        if not low <= values[name] < values[high]:
            raise Refusal(
                422,
                f"{name} {values[name]} with {high} {values[high]}",
                wanted=f"0 <= {name} < {high}",
                do=f"set both {name} and {high}",
            )
    return Round(
        block_hash=values["block_hash"],
        public_key=values["public_key"],
        block_height=values["block_height"],
        node_id=values["node_id"] + values["group_id"] * values["node_count"],
        node_count=values["node_count"] * values["n_groups"],
        model=values["reference"],
        preset=values["preset"],
        seq_len=values["seq_len"],
        r_target=values["r_target"],
        strength=values["strength"],
    )


class Rounds:
    """Reads and writes rounds, records and the state of the service."""

    def __init__(self, database: Database, outbox: Outbox) -> None:
        self._db = database
        self._outbox = outbox

    def current(self) -> tuple[State, StoredRound | None]:
        """Return the state and round in which the service was left."""
        service, rounds = self._db["service"], self._db["rounds"]
        with self._db.read() as connection:
            state, round_id = connection.execute(sa.select(service.c.state, service.c.round_id)).one()
            row = connection.execute(sa.select(rounds).where(rounds.c.id == round_id)).mappings().first()
        return State(state), StoredRound(**row) if row else None

    def enter(self, state: State, values: dict[str, Any] | None = None) -> StoredRound | None:
        """Write a state, with the round of ``values`` where they are given; return that round.

        The round of the same block and key continues where it was.

        Raises:
            Refusal: 409, that round was begun with other values: one nonce would have two results.
        """
        service, rounds = self._db["service"], self._db["rounds"]
        with self._db.write() as connection:
            if values is None:
                connection.execute(service.update().values(state=str(state)))
                return None
            row = self._find(connection, values) or self._insert(connection, values)
            change = {name: values[name] for name in ("callback_url", "fraud_threshold")} | {"touched_at": time.time()}
            connection.execute(rounds.update().where(rounds.c.id == row["id"]).values(change))
            connection.execute(service.update().values(state=str(state), round_id=row["id"]))
            return StoredRound(**{**row, **change})

    def _find(self, connection: sa.Connection, values: dict[str, Any]) -> dict[str, Any] | None:
        rounds = self._db["rounds"]
        same = (rounds.c.block_hash == values["block_hash"]) & (rounds.c.public_key == values["public_key"])
        row = connection.execute(sa.select(rounds).where(same)).mappings().first()
        if row is None:
            return None
        free = {"callback_url", "fraud_threshold"}
        other = sorted(name for name, value in values.items() if name not in free and row[name] != value)
        if other:
            raise Refusal(
                409,
                "this block and key have a round with another " + ", ".join(other),
                wanted=", ".join(f"{name} {row[name]!r}" for name in other),
                do="repeat the values of the first request, or use a new block or key",
                fields={"fields": other},
            )
        return dict(row)

    def _insert(self, connection: sa.Connection, values: dict[str, Any]) -> dict[str, Any]:
        rounds, now = self._db["rounds"], time.time()
        row = {**values, "created_at": now, "touched_at": now, "next_nonce": make_round(values).node_id}
        row["id"] = connection.execute(rounds.insert().values(row).returning(rounds.c.id)).scalar_one()
        return {**row, "checked": 0, "valid": 0, "seconds": 0.0}

    def commit(self, batches: Sequence[Batch], *, interval: float, most: int) -> None:
        """Write batches of one round, their counts, and the callback that announces them, in one transaction."""
        records, rounds = self._db["records"], self._db["rounds"]
        round_id = batches[0].round_id
        pairs = [pair for batch in batches for pair in zip(batch.records, batch.valid, strict=True)]
        valid = [record.nonce for record, is_valid in pairs if is_valid]
        with self._db.write() as connection:
            connection.execute(records.insert(), [_row(round_id, record, is_valid) for record, is_valid in pairs])
            connection.execute(
                rounds.update()
                .where(rounds.c.id == round_id)
                .values(
                    next_nonce=batches[-1].next_nonce,
                    checked=rounds.c.checked + len(pairs),
                    valid=rounds.c.valid + len(valid),
                    seconds=rounds.c.seconds + sum(batch.seconds for batch in batches),
                )
            )
            url = connection.execute(sa.select(rounds.c.callback_url).where(rounds.c.id == round_id)).scalar_one()
            if url and valid:
                self._outbox.announce(connection, round_id, url, valid, interval=interval, most=most)

    def recent_valid(self, round_id: int, *, after: int | None = None, limit: int = RECENT) -> list[tuple[int, float]]:
        """Return the latest valid nonces with their distances, ascending; with ``after``, the next ones after it."""
        records = self._db["records"]
        wanted = (records.c.round_id == round_id) & (records.c.valid == 1)
        order = records.c.nonce.desc() if after is None else records.c.nonce
        if after is not None:
            wanted &= records.c.nonce > after
        query = sa.select(records.c.nonce, records.c.distance).where(wanted).order_by(order).limit(limit)
        with self._db.read() as connection:
            return sorted((row.nonce, row.distance) for row in connection.execute(query))

    def histogram(self, round_id: int, bins: Histogram) -> dict[int, int]:
        """Count the distances of a round per bin."""
        records = self._db["records"]
        query = sa.select(records.c.distance).where(records.c.round_id == round_id, records.c.distance.is_not(None))
        counts: dict[int, int] = {}
        with self._db.read() as connection:
            for (distance,) in connection.execute(query).yield_per(10_000):
                index = bins.bin(distance)
                counts[index] = counts.get(index, 0) + 1
        return counts

    def prune(self, keep: float) -> int:
        """Delete rounds that were last used more than ``keep`` seconds ago and owe no callback; return how many."""
        rounds, service, outbox = self._db["rounds"], self._db["service"], self._db["outbox"]
        owed = sa.select(outbox.c.round_id).where(
            outbox.c.round_id.is_not(None), outbox.c.status.in_(["open", "pending", "dead"])
        )
        current = sa.select(service.c.round_id).where(service.c.round_id.is_not(None))
        old = rounds.c.touched_at < time.time() - keep
        with self._db.write() as connection:
            query = rounds.delete().where(old, rounds.c.id.not_in(current), rounds.c.id.not_in(owed))
            return int(connection.execute(query).rowcount)


def _row(round_id: int, record: Record, valid: bool) -> dict[str, Any]:
    vector = None if record.vector is None else record.vector.astype("<f2").tobytes()
    distance = record.distance if record.vector is None else None
    return {"round_id": round_id, "nonce": record.nonce, "distance": distance, "vector": vector, "valid": int(valid)}
