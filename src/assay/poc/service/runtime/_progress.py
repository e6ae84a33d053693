"""The numbers of the current round, kept in memory so that reading them costs nothing."""

import itertools
import math
import threading
import time
from collections import deque
from typing import Any

from assay import stats
from assay.poc.protocol import get_pipeline
from assay.poc.service.store import RECENT, Batch, Histogram, Rounds, StoredRound

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
        self.publishes_vectors = pipeline.output == "vector"
        self._recent: deque[tuple[int, float]] = deque(rounds.recent_valid(stored.id), maxlen=RECENT)
        self._steps: deque[tuple[float, int]] = deque()
        self._dimension = 0 if self.publishes_vectors else pipeline.output_size(hidden_size, vocab_size)
        self._bins = self._counts = None
        if self._dimension:
            mean, spread = stats.chord_mean(self._dimension), SPREAD * stats.chord_std(self._dimension)
            self._bins = Histogram(mean - spread, mean + spread, BINS)
            self._counts = rounds.histogram(stored.id, self._bins) if stored.checked else {}

    def add(self, batch: Batch) -> None:
        """Count a batch that is on disk."""
        with self._lock:
            self.next_nonce = batch.next_nonce
            self.checked += len(batch.records)
            self.valid += sum(batch.valid)
            self.seconds += batch.seconds
            self._steps.append((time.monotonic(), len(batch.records)))
            for record, valid in zip(batch.records, batch.valid, strict=True):
                distance = record.distance if record.vector is None else math.nan
                if valid:
                    self._recent.append((record.nonce, distance))
                if self._bins and self._counts is not None:
                    index = self._bins.bin(distance)
                    self._counts[index] = self._counts.get(index, 0) + 1

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
        """Return valid rate, the chord law's, and the standard errors of both."""
        rate = self.valid / self.checked if self.checked else None
        law = stats.valid_rate(self.stored.r_target, self._dimension) if self._dimension else None
        return {
            "valid_rate": rate,
            "valid_rate_error": stats.rate_standard_error(rate, self.checked) if rate is not None else None,
            "expected_rate": law,
            "expected_rate_error": stats.rate_standard_error(law, self.checked) if law and self.checked else None,
        }

    def histogram(self) -> dict[str, Any] | None:
        """Return the bins of the distances beside what the chord law expects; None for vectors."""
        if self._bins is None or self._counts is None:
            return None
        with self._lock:
            bins, counts = self._bins, dict(self._counts)
        edges = [bins.low + (bins.high - bins.low) * i / bins.size for i in range(bins.size + 1)]
        law = stats.chord_cdf(edges, self._dimension)
        return {
            "low": bins.low,
            "high": bins.high,
            "counts": [counts.get(i, 0) for i in range(bins.size)],
            "expected": [float(b - a) * self.checked for a, b in itertools.pairwise(law)],
            "below": counts.get(-1, 0),
            "above": counts.get(bins.size, 0),
        }
