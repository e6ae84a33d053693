"""What a page and a metric show of the round that is being computed."""

import math
import threading
import time
from collections import deque
from typing import Any

import numpy as np

from assay import stats
from assay.poc.protocol.blocks import BlockFactor, has_block_factor
from assay.poc.protocol.pipelines import get_pipeline
from assay.poc.service.rounds import RECENT, ComputedBatch, Rounds, StoredRound, bin_counts
from assay.stats.chord import chord_mean, chord_std, rate_standard_error

WINDOW = 30.0  # seconds over which the current rate is measured
# Standard deviations of the chord law that the histogram shows on either side.
SPREAD = 5.0
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
        self._rounds = rounds
        self.stored = stored
        self.checked = stored.checked
        self.valid = stored.valid
        # SQLite hands a default of 0 back as an integer.
        self.seconds = float(stored.seconds)
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

    def is_of_another(self, stored: StoredRound) -> bool:
        """Return whether a round is another one than this, or has another share than it had."""
        before = self.stored
        return (before.id, before.round, before.batch_size) != (
            stored.id,
            stored.round,
            stored.batch_size,
        )

    @property
    def law(self) -> stats.BlockLaw | None:
        """Law of this block from the model's states, else of any block from a calibration."""
        return self._of_calibration if self.factor is None else self.factor.law

    def add(self, batch: ComputedBatch) -> None:
        """Count a batch that is on disk."""
        with self._lock:
            self.next_nonce = batch.next_nonce
            self.checked += len(batch.records)
            self.valid += sum(batch.valid)
            self.seconds += batch.seconds
            self._steps.append((time.monotonic(), len(batch.records)))
            places = zip(batch.records, batch.valid, strict=True)
            self._recent.extend(
                (record.nonce, record.distance) for record, valid in places if valid
            )
            if self._dimension:
                self._counts += bin_counts(
                    [record.distance for record in batch.records], self._edges
                )

    def latest(self, after: int | None = None, limit: int = 0) -> list[tuple[int, float]]:
        """Return the latest valid nonces with their distances, ascending, or with ``after`` the
        first ``limit`` above it, from the database.
        """
        if after is not None:
            return self._rounds.recent_valid(self.stored.id, after=after, limit=limit)
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
            expected |= {
                "expected_rate": law.valid_rate(r_target),
                "expected_rate_error": law.rate_error(r_target, checked) if checked else None,
                "block_factor": law.scale,
                "block_factor_error": law.factor_error,
            }
        return expected

    def histogram(self) -> dict[str, Any] | None:
        """Return the bins of the distances with their expected counts; None for vectors."""
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
