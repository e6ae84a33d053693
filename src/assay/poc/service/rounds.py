"""Rounds: the states of the service and their transitions, with records on disk.

docs/service.md shows the table of transitions.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import sqlalchemy as sa
from numpy.typing import NDArray
from sqlalchemy.dialects.sqlite import insert

from assay.files.sqlite import Database
from assay.files.sqlite_connections import damaged
from assay.poc.net.refusals import Refusal
from assay.poc.protocol.records import Record, pack_record
from assay.poc.protocol.round import Round
from assay.poc.service.outbox import Outbox
from assay.poc.service.states import State

RECENT = 256
"""Valid nonces that a status shows at most."""

LARGEST_CALLBACK = 2**20
"""Bytes of a body that every receiver takes, a service with its default ``max_body`` among them."""

AROUND = 64  # bytes of a nonce in a callback, beside what it published
FREE = frozenset({"callback_url", "fraud_threshold"})
"""The columns that may change when a round is begun again."""

OF_ROUND = (
    "block_hash",
    "public_key",
    "block_height",
    "preset",
    "seq_len",
    "r_target",
    "strength",
)
"""The columns that a round of the engine has under the same name."""

HIDDEN = frozenset(
    ["callback_url", "under_pins", "next_nonce", "checked", "valid", "seconds", "touched_at"]
)
"""The columns that no page shows: counts change, and the callback URL may contain a token."""

SHARE = ("node_id", "node_count", "group_id", "n_groups")
"""The columns that say which nonces a machine has."""


@dataclass(frozen=True, kw_only=True)
class RoundValues:
    """The values of a requested round: columns of the table ``rounds``.

    ``node_id``, ``node_count``, ``group_id`` and ``n_groups`` are as requested; :attr:`round` folds
    them into one share, whose nonces are ``node_id + group_id · node_count`` and every ``n_groups ·
    node_count`` after it.
    """

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
    under_pins: bool

    def __post_init__(self) -> None:
        if self.node_id < 0 or not 0 <= self.group_id < self.n_groups:
            raise Refusal(
                422,
                ", ".join(f"{name} {getattr(self, name)}" for name in SHARE),
                wanted="0 <= node_id and 0 <= group_id < n_groups",
                do="set all four, or neither group_id nor n_groups",
            )

    @property
    def round(self) -> Round:
        """The round as the engine knows it."""
        return Round(
            node_id=self.node_id + self.group_id * self.node_count,
            node_count=self.node_count * self.n_groups,
            model=self.reference,
            **{name: getattr(self, name) for name in OF_ROUND},
        )


@dataclass(frozen=True, kw_only=True)
class StoredRound(RoundValues):
    """A round as the service keeps it: a row of the table ``rounds``."""

    id: int
    created_at: float
    touched_at: float
    next_nonce: int
    checked: int
    valid: int
    seconds: float

    def public(self) -> dict[str, Any]:
        """Return the public values: without those of :data:`HIDDEN`."""
        return {name: value for name, value in vars(self).items() if name not in HIDDEN}


@dataclass(frozen=True)
class ComputedBatch:
    """Results of one batch on their way to disk."""

    epoch: int
    round_id: int
    records: Sequence[Record]
    valid: Sequence[bool]
    next_nonce: int
    seconds: float


def bin_counts(distances: Sequence[float], edges: NDArray[np.float64]) -> NDArray[np.int64]:
    """Count distances below, between and above ascending edges [E]; returns [E + 1]."""
    return np.bincount(np.searchsorted(edges, distances, side="right"), minlength=len(edges) + 1)


class Rounds:
    """Reads and writes rounds, records and the state of the service."""

    def __init__(self, database: Database, outbox: Outbox) -> None:
        self._db = database
        self._outbox = outbox
        self._rounds = database["rounds"]
        self._records = database["records"]
        self._service = database["service"]

    def current(self) -> tuple[State, StoredRound | None]:
        """Return the state and round in which the service was left."""
        with self._db.read() as connection:
            service_row = connection.execute(sa.select(self._service)).one_or_none()
            if service_row is None or service_row.state not in State.__members__:
                raise damaged(
                    self._db.path,
                    f"the state {service_row.state!r}" if service_row else "the state is missing",
                )
            query = sa.select(self._rounds).where(self._rounds.c.id == service_row.round_id)
            row = connection.execute(query).mappings().first()
        return State(service_row.state), StoredRound(**row) if row else None

    def enter(
        self, state: State, values: RoundValues | None = None, *, reshare: bool = False
    ) -> StoredRound | None:
        """Write a state, with the round of ``values`` where they are given; return that round.

        The round of the same block and key continues where it was. One that was begun with other
        values is refused with 409: one nonce would have two results. With ``reshare`` it may take
        another share and batch size, and continues beyond all nonces that it has.
        """
        rounds = self._rounds
        service = self._service
        now = time.time()
        with self._db.write() as connection:
            if values is None:
                current = sa.select(service.c.round_id).scalar_subquery()
                connection.execute(
                    rounds.update().where(rounds.c.id == current).values(touched_at=now)
                )
                connection.execute(service.update().values(state=str(state)))
                return None
            if reshare:
                self._reshare(connection, values)
            fresh = insert(rounds).values(
                **vars(values), created_at=now, touched_at=now, next_nonce=values.round.node_id
            )
            change: dict[str, sa.ColumnElement[Any]] = {
                name: fresh.excluded[name] for name in ("touched_at", *FREE)
            }
            change["under_pins"] = sa.func.max(rounds.c.under_pins, values.under_pins)
            begin = fresh.on_conflict_do_update(["block_hash", "public_key"], set_=change)
            row = connection.execute(begin.returning(rounds)).mappings().one()
            stored = StoredRound(**row)
            # One nonce must not have two results.
            if different := sorted(
                name for name, value in vars(values).items() if value != getattr(stored, name)
            ):
                raise Refusal(
                    409,
                    "this block and key have a round with another " + ", ".join(different),
                    wanted=", ".join(f"{name} {getattr(stored, name)!r}" for name in different),
                    do="repeat the values of the first request under the same pins, or use a new "
                    "block or key",
                    fields={"fields": different},
                )
            connection.execute(service.update().values(state=str(state), round_id=stored.id))
            return stored

    def _reshare(self, connection: sa.Connection, values: RoundValues) -> None:
        """Give the round of this block and key the share and batch size of ``values``."""
        rounds = self._rounds
        change = {name: getattr(values, name) for name in (*SHARE, "batch_size")}
        of_values = (rounds.c.block_hash == values.block_hash) & (
            rounds.c.public_key == values.public_key
        )
        row = connection.execute(sa.select(rounds).where(of_values)).mappings().first()
        if row is None or all(row[name] == value for name, value in change.items()):
            return
        self._outbox.fix_share(connection, row["id"], row["node_id"])
        largest = sa.select(sa.func.coalesce(sa.func.max(self._records.c.nonce), -1)).where(
            self._records.c.round_id == row["id"]
        )
        first, step = values.round.node_id, values.round.node_count
        passed = max(0, (connection.execute(largest).scalar_one() - first) // step + 1)
        change["next_nonce"] = first + passed * step
        connection.execute(rounds.update().where(of_values).values(change))

    def commit(self, batches: Sequence[ComputedBatch], *, interval: float, most: int) -> None:
        """Write batches of one round, their counts and their callback in one transaction."""
        rounds = self._rounds
        round_id = batches[0].round_id
        pairs = [pair for batch in batches for pair in zip(batch.records, batch.valid, strict=True)]
        valid = [record.nonce for record, is_valid in pairs if is_valid]
        counts = {
            "touched_at": time.time(),
            "next_nonce": batches[-1].next_nonce,
            "checked": rounds.c.checked + len(pairs),
            "valid": rounds.c.valid + len(valid),
            "seconds": rounds.c.seconds + sum(batch.seconds for batch in batches),
        }
        change = (
            rounds.update()
            .where(rounds.c.id == round_id)
            .values(counts)
            .returning(rounds.c.callback_url)
        )
        with self._db.write() as connection:
            connection.execute(
                self._records.insert(),
                [_row(round_id, record, is_valid) for record, is_valid in pairs],
            )
            url = connection.execute(change).scalar_one()
            if url and valid:
                most = _fitting(most, pairs[0][0])
                self._outbox.announce(
                    connection, round_id, url, valid, interval=interval, most=most
                )

    def recent_valid(
        self, round_id: int, *, after: int | None = None, limit: int = RECENT
    ) -> list[tuple[int, float]]:
        """Return the latest valid nonces with distances, or the next ones after ``after``."""
        records = self._records
        condition = (records.c.round_id == round_id) & (records.c.valid == 1)
        order = records.c.nonce.desc() if after is None else records.c.nonce
        if after is not None:
            condition &= records.c.nonce > after
        query = (
            sa.select(records.c.nonce, records.c.distance)
            .where(condition)
            .order_by(order)
            .limit(limit)
        )
        return sorted((row.nonce, row.distance) for row in self._db.rows(query))

    def histogram(self, round_id: int, edges: NDArray[np.float64]) -> NDArray[np.int64]:
        """Count the distances of a round as :func:`bin_counts` does."""
        distance = self._records.c.distance
        query = sa.select(distance).where(
            self._records.c.round_id == round_id, distance.is_not(None)
        )
        counts = bin_counts((), edges)
        with self._db.read() as connection:
            for part in connection.execute(query).scalars().partitions(10_000):
                counts += bin_counts(part, edges)
        return counts

    def prune(self, keep: float) -> int:
        """Delete rounds unused for ``keep`` seconds without pending callbacks; return how many."""
        rounds = self._rounds
        service = self._service
        outbox = self._db["outbox"]
        owed = sa.select(outbox.c.round_id).where(
            outbox.c.round_id.is_not(None), outbox.c.status != "delivered"
        )
        current = sa.select(service.c.round_id).where(service.c.round_id.is_not(None))
        old = (rounds.c.touched_at < self._db.settled_time() - keep) & rounds.c.id.not_in(
            owed.union_all(current)
        )
        return self._db.change(rounds.delete().where(old))


def _fitting(most: int, record: Record) -> int:
    """Return ``most``, or as many records as fill half of a callback that receivers take."""
    packed = len(pack_record(record))
    text = packed * 4 // 3 if record.points is None else 4 * packed  # "15, " for a point
    return max(1, min(most, LARGEST_CALLBACK // (2 * (text + AROUND))))


def _row(round_id: int, record: Record, valid: bool) -> dict[str, Any]:
    return {
        "round_id": round_id,
        "nonce": record.nonce,
        "distance": record.distance if record.has_distance else None,
        "vector": None if record.has_distance else pack_record(record),
        "valid": int(valid),
    }
