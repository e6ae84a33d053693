"""The numbers of the current round, kept in memory so that reading them costs nothing."""

import math
import threading
import time
from collections import deque
from functools import cached_property
from typing import Any

import numpy as np

from assay import stats
from assay.poc.protocol.blocks import BlockFactor, block_scale, has_block_factor
from assay.poc.protocol.pipelines import get_pipeline
from assay.poc.protocol.record import DistanceRecord
from assay.poc.service.rounds import RECENT, Batch, Rounds, StoredRound, bin_counts
from assay.stats.blocks import EFFECTIVE_DIMENSION, MeasuredBlockLaw
from assay.stats.chord import chord_mean, chord_std, rate_standard_error

WINDOW = 30.0  # seconds over which the current rate is measured
SPREAD = 5.0  # standard deviations of the chord law that the histogram shows on either side
BINS = 48


class Progress:
    """The committed part of a round. Both sizes of the model are 0 while it is not loaded."""

    def __init__(self, stored: StoredRound, rounds: Rounds, *, hidden_size: int = 0, vocab_size: int = 0) -> None:
        self._lock = threading.Lock()
        self.stored = stored
        self.checked, self.valid, self.seconds = stored.checked, stored.valid, stored.seconds
        self.next_nonce = stored.next_nonce
        pipeline = get_pipeline(stored.preset)
        self.publishes_vectors = pipeline.output != "distance"
        self._recent: deque[tuple[int, float]] = deque(rounds.recent_valid(stored.id), maxlen=RECENT)
        self._steps: deque[tuple[float, int]] = deque()
        self._hidden_size = hidden_size
        self._factor: BlockFactor | None = None
        self._dimension = 0 if self.publishes_vectors else pipeline.output_size(hidden_size, vocab_size)
        if self._dimension:
            mean, spread = chord_mean(self._dimension), SPREAD * chord_std(self._dimension)
            self._edges = np.linspace(mean - spread, mean + spread, BINS + 1)
            self._counts = rounds.histogram(stored.id, self._edges)

    @property
    def wants_block_factor(self) -> bool:
        """Whether the model's states would say more of this block than its head does."""
        return self._factor is None and has_block_factor(get_pipeline(self.stored.preset))

    def measured(self, factor: BlockFactor) -> None:
        """Take how wide the distances of this block are, by its head and the model's states."""
        self._factor = factor

    @property
    def law(self) -> stats.BlockLaw | MeasuredBlockLaw:
        """Law of this block: measured, or what its head alone says under an assumed effective dimension."""
        return self._assumed if self._factor is None else self._factor.law

    @cached_property
    def _assumed(self) -> stats.BlockLaw:
        """Law without a measurement, made when it is first asked for, since a wide head takes a moment to draw."""
        effective = EFFECTIVE_DIMENSION
        if not self._hidden_size or not has_block_factor(get_pipeline(self.stored.preset)):
            return stats.BlockLaw(dimension=self._dimension, freedom=effective)
        scale = block_scale(self.stored.round, self._hidden_size)
        return stats.BlockLaw.of_head(self._dimension, effective, hidden_size=self._hidden_size, scale=scale)

    def add(self, batch: Batch) -> None:
        """Count a batch that is on disk."""
        with self._lock:
            self.next_nonce = batch.next_nonce
            self.checked += len(batch.records)
            self.valid += sum(batch.valid)
            self.seconds += batch.seconds
            self._steps.append((time.monotonic(), len(batch.records)))
            distances = [
                record.distance if isinstance(record, DistanceRecord) else math.nan for record in batch.records
            ]
            for record, distance, valid in zip(batch.records, distances, batch.valid, strict=True):
                if valid:
                    self._recent.append((record.nonce, distance))
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
        rate = self.valid / self.checked if self.checked else None
        checked, r_target, known = self.checked, self.stored.r_target, self._dimension > 0
        return {
            "valid_rate": rate,
            "valid_rate_error": rate_standard_error(rate, self.checked) if rate is not None else None,
            "expected_rate": self.law.valid_rate(r_target) if known else None,
            "expected_rate_error": self.law.rate_error(r_target, checked) if known and checked else None,
            "block_factor": self.law.scale if known else None,
            "block_factor_error": self.law.factor_error if known else None,
        }

    def histogram(self) -> dict[str, Any] | None:
        """Return the bins of the distances beside what this block's law expects; None for vectors."""
        if not self._dimension:
            return None
        with self._lock:
            below, *counts, above = self._counts.tolist()
        expected, of_block = self.law.bins(self._edges)
        errors = np.hypot(of_block * self.checked, np.sqrt(expected * (1 - expected) * self.checked))
        return {
            "low": float(self._edges[0]),
            "high": float(self._edges[-1]),
            "counts": counts,
            "expected": (expected * self.checked).tolist(),
            "expected_errors": errors.tolist(),
            "below": below,
            "above": above,
        }
