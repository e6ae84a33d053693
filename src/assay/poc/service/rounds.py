"""Rounds: the states of the service with every transition between them, rounds and records on disk,
and their numbers.

docs/service.md shows the table of transitions.
"""

import math
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import numpy as np
import sqlalchemy as sa
from numpy.typing import NDArray
from sqlalchemy.dialects.sqlite import insert

from assay import stats
from assay.files.sqlite import Database
from assay.files.sqlite_connections import damaged
from assay.poc.net.refusals import Refusal
from assay.poc.net.runtime import settled_time
from assay.poc.protocol.blocks import BlockFactor, has_block_factor
from assay.poc.protocol.pipelines import get_pipeline
from assay.poc.protocol.proof import DistanceRecord, Record, TokenRecord, pack_record
from assay.poc.protocol.round import Round
from assay.poc.service.callbacks import Outbox
from assay.stats.chord import chord_mean, chord_std, rate_standard_error


class State(StrEnum):
    """The present work of the service."""

    IDLE = "IDLE"
    GENERATING = "GENERATING"
    VALIDATING = "VALIDATING"
    STOPPED = "STOPPED"


_I = State.IDLE
_G = State.GENERATING
_V = State.VALIDATING
_S = State.STOPPED

TRANSITIONS: dict[str, dict[State, State]] = {
    "init": {_I: _I, _V: _I, _S: _I},
    "init/generate": {_I: _G, _V: _G, _S: _G},
    "init/validate": {_I: _V, _V: _V, _S: _V},
    "phase/generate": {_I: _G, _G: _G, _V: _G, _S: _G},
    "phase/validate": {_I: _V, _G: _V, _V: _V, _S: _V},
    "validate": {_V: _V},
    "stop": {_I: _S, _G: _S, _V: _S, _S: _S},
    "engine failure": {_G: _S, _I: _I, _V: _V, _S: _S},
}
"""Call → state before → state after. In a state that is missing, the call is refused with 409."""

NEEDS_ROUND = frozenset({"phase/generate", "phase/validate"})
"""Calls that are refused before the first round."""


def after(call: str, state: State, *, has_round: bool) -> State:
    """Return the state that a call leads to; refuse with 409 one that is not allowed now, naming
    those that are.
    """
    choices = [
        candidate
        for candidate, row in TRANSITIONS.items()
        if state in row
        and candidate != "engine failure"
        and (has_round or candidate not in NEEDS_ROUND)
    ]
    if call in choices or call == "engine failure":
        return TRANSITIONS[call][state]
    seen = (
        f"{call} while {state}"
        if has_round or call not in NEEDS_ROUND
        else f"{call} before any init"
    )
    raise Refusal(
        409,
        seen,
        wanted="one of " + ", ".join(choices),
        do="ask /status, then make an allowed call",
        fields={"state": str(state), "allowed": choices},
    )


RECENT = 256
"""Valid nonces that a status shows at most."""

LARGEST_CALLBACK = 2**20
"""Bytes of a body that every receiver takes, a service with its default ``max_body`` among them."""

AROUND = 64  # bytes of a nonce in a callback, beside what it published


@dataclass(frozen=True, kw_only=True)
class RoundValues:
    """What a request asks a round to be: columns of the table ``rounds``. A share that does not
    exist is refused.

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
        for name, high in (("node_id", "node_count"), ("group_id", "n_groups")):
            value = getattr(self, name)
            count = getattr(self, high)
            if not 0 <= value < count:
                raise Refusal(
                    422,
                    f"{name} {value} with {high} {count}",
                    wanted=f"0 <= {name} < {high}",
                    do=f"set both {name} and {high}",
                )

    @property
    def round(self) -> Round:
        """The round as the engine knows it."""
        shared = (
            "block_hash",
            "public_key",
            "block_height",
            "preset",
            "seq_len",
            "r_target",
            "strength",
        )
        return Round(
            node_id=self.node_id + self.group_id * self.node_count,
            node_count=self.node_count * self.n_groups,
            model=self.reference,
            **{name: getattr(self, name) for name in shared},
        )


FREE = frozenset({"callback_url", "fraud_threshold"})
"""The columns that may change when a round is begun again."""


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
        """Return what a reader may know: all but the callback URL, which may contain a token, and
        the counts.
        """
        hidden = {
            "callback_url",
            "under_pins",
            "next_nonce",
            "checked",
            "valid",
            "seconds",
            "touched_at",
        }
        return {name: value for name, value in self.__dict__.items() if name not in hidden}


@dataclass(frozen=True)
class Batch:
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

    def enter(self, state: State, values: RoundValues | None = None) -> StoredRound | None:
        """Write a state, with the round of ``values`` where they are given; return that round.

        The round of the same block and key continues where it was. One that was begun with other
        values is refused with 409: one nonce would have two results.
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
            fresh = {
                **vars(values),
                "created_at": now,
                "touched_at": now,
                "next_nonce": values.round.node_id,
            }
            change = {name: fresh[name] for name in ("touched_at", *FREE)}
            change["under_pins"] = sa.func.max(rounds.c.under_pins, values.under_pins)
            begin = (
                insert(rounds)
                .on_conflict_do_update(["block_hash", "public_key"], set_=change)
                .returning(rounds)
            )
            stored = StoredRound(**connection.execute(begin.values(fresh)).mappings().one())
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

    def commit(self, batches: Sequence[Batch], *, interval: float, most: int) -> None:
        """Write batches of one round, their counts, and the callback that announces them, in one
        transaction.
        """
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
                fitting = _fitting(most, pairs[0][0])
                self._outbox.announce(
                    connection, round_id, url, valid, interval=interval, most=fitting
                )

    def owed(self, round_id: int) -> int:
        """Return how many callbacks of a round are undelivered."""
        with self._db.read() as connection:
            return self._outbox.owed(connection, round_id)

    def recent_valid(
        self, round_id: int, *, after: int | None = None, limit: int = RECENT
    ) -> list[tuple[int, float]]:
        """Return the latest valid nonces with their distances, ascending; with ``after``, the next
        ones after it.
        """
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
        """Delete rounds that were last used more than ``keep`` seconds ago and owe no callback;
        return how many.
        """
        rounds = self._rounds
        service = self._service
        outbox = self._db["outbox"]
        owed = sa.select(outbox.c.round_id).where(
            outbox.c.round_id.is_not(None), outbox.c.status != "delivered"
        )
        current = sa.select(service.c.round_id).where(service.c.round_id.is_not(None))
        old = (rounds.c.touched_at < settled_time() - keep) & rounds.c.id.not_in(
            owed.union_all(current)
        )
        return self._db.change(rounds.delete().where(old))


def _fitting(most: int, record: Record) -> int:
    """Return ``most``, or as many records with tokens as fill half of a callback that receivers
    take.
    """
    if not isinstance(record, TokenRecord):
        return most
    return max(1, min(most, LARGEST_CALLBACK // (2 * (len(pack_record(record)) * 4 // 3 + AROUND))))


def _row(round_id: int, record: Record, valid: bool) -> dict[str, Any]:
    vector, distance = (
        (None, record.distance)
        if isinstance(record, DistanceRecord)
        else (pack_record(record), None)
    )
    return {
        "round_id": round_id,
        "nonce": record.nonce,
        "distance": distance,
        "vector": vector,
        "valid": int(valid),
    }


WINDOW = 30.0  # seconds over which the current rate is measured
SPREAD = 5.0  # standard deviations of the chord law that the histogram shows on either side
BINS = 48
EXPECTED = tuple(
    name + error
    for name in ("valid_rate", "expected_rate", "block_factor")
    for error in ("", "_error")
)
"""Names of what :meth:`Progress.expectation` returns."""


class Progress:
    """The committed part of a round. Both sizes of the model are 0 while it is not loaded."""

    def __init__(
        self,
        stored: StoredRound,
        rounds: Rounds,
        *,
        hidden_size: int = 0,
        vocab_size: int = 0,
        effective_dimension: float | None = None,
    ) -> None:
        self._lock = threading.Lock()
        self.stored = stored
        self.checked = stored.checked
        self.valid = stored.valid
        self.seconds = float(stored.seconds)  # SQLite hands a default of 0 back as an integer
        self.next_nonce = stored.next_nonce
        pipeline = get_pipeline(stored.preset)
        self.publishes_vectors = pipeline.output != "distance"
        self._recent: deque[tuple[int, float]] = deque(
            rounds.recent_valid(stored.id), maxlen=RECENT
        )
        self._steps: deque[tuple[float, int]] = deque()
        self._of_calibration: stats.BlockLaw | None = None
        self.factor: BlockFactor | None = None
        """How wide the distances of this block are, by its head and the model's states; None before
        it was measured.
        """
        self._dimension = (
            0 if self.publishes_vectors else pipeline.output_size(hidden_size, vocab_size)
        )
        if self._dimension:
            mean = chord_mean(self._dimension)
            spread = SPREAD * chord_std(self._dimension)
            self._edges = np.linspace(mean - spread, mean + spread, BINS + 1)
            self._counts = rounds.histogram(stored.id, self._edges)
        if self._dimension and effective_dimension is not None and has_block_factor(pipeline):
            self._of_calibration = stats.BlockLaw(
                dimension=self._dimension, freedom=effective_dimension
            )

    @property
    def law(self) -> stats.BlockLaw | None:
        """Law of this block by the model's states, or of any block by a calibration; None before
        either.
        """
        return self._of_calibration if self.factor is None else self.factor.law

    def add(self, batch: Batch) -> None:
        """Count a batch that is on disk."""
        with self._lock:
            self.next_nonce = batch.next_nonce
            self.checked += len(batch.records)
            self.valid += sum(batch.valid)
            self.seconds += batch.seconds
            self._steps.append((time.monotonic(), len(batch.records)))
            distances = [
                r.distance if isinstance(r, DistanceRecord) else math.nan for r in batch.records
            ]
            places = zip(batch.records, distances, batch.valid, strict=True)
            self._recent.extend(
                (record.nonce, distance) for record, distance, valid in places if valid
            )
            if self._dimension:
                self._counts += bin_counts(distances, self._edges)

    def latest(self) -> list[tuple[int, float]]:
        """Return the latest valid nonces with their distances, ascending."""
        with self._lock:
            return list(self._recent)

    @property
    def rate(self) -> float:
        """Nonces per second over the whole round."""
        return self.checked / self.seconds if self.seconds > 0 else 0.0

    @property
    def current_rate(self) -> float:
        """Nonces per second over the last half minute."""
        now = time.monotonic()
        with self._lock:
            while self._steps and self._steps[0][0] < now - WINDOW:
                self._steps.popleft()
            steps = list(self._steps)
        if len(steps) < 2:
            return 0.0
        # The first batch of the window ended at its start: its nonces were made before.
        since, skipped = steps[0]
        return (sum(count for _, count in steps) - skipped) / max(now - since, 1e-9)

    def expectation(self) -> dict[str, Any]:
        """Return valid rate, what this block's law expects, and the standard errors of both."""
        checked = self.checked
        r_target = self.stored.r_target
        expected = dict[str, Any].fromkeys(EXPECTED)
        if checked:
            rate = self.valid / checked
            expected |= {"valid_rate": rate, "valid_rate_error": rate_standard_error(rate, checked)}
        if (law := self.law) is not None and self._dimension:
            error = law.rate_error(r_target, checked) if checked else None
            expected |= {"expected_rate": law.valid_rate(r_target), "expected_rate_error": error}
            expected |= {"block_factor": law.scale, "block_factor_error": law.factor_error}
        return expected

    def histogram(self) -> dict[str, Any] | None:
        """Return the bins of the distances beside what this block, or the average one, expects;
        None for vectors.
        """
        if not self._dimension:
            return None
        with self._lock:
            below, *counts, above = self._counts.tolist()
        law = self.law or stats.BlockLaw(dimension=self._dimension, freedom=math.inf)
        expected, of_block = law.bins(self._edges)
        errors = np.hypot(
            of_block * self.checked, np.sqrt(expected * (1 - expected) * self.checked)
        )
        return {
            "low": float(self._edges[0]),
            "high": float(self._edges[-1]),
            "counts": counts,
            "expected": (expected * self.checked).tolist(),
            "expected_errors": errors.tolist(),
            "below": below,
            "above": above,
        }
