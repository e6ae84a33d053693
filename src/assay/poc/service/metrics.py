"""Prometheus metrics of a service."""

import math

from typing_extensions import override

from assay.files.jsonl import JsonObject
from assay.poc.net.metrics import Exported
from assay.poc.service.rounds import State

VERDICTS = ("honest", "fraud", "undecided")
OUTCOMES = ("delivered", "failed", "dead")


class Metrics(Exported):
    """Every figure of a service. Labels never hold keys, hashes or URLs."""

    def __init__(self) -> None:
        super().__init__("assay_poc")
        counter, gauge, histogram = self.counter, self.gauge, self.histogram
        self.nonces = counter("nonces", "Nonces computed and written.")
        self.valid = counter("valid_nonces", "Of these, the valid ones.")
        self.failures = counter("engine_failures", "Rounds or loads ended by an error of the engine.")
        self.verdicts = counter("verdicts", "Validation requests by residual verdict.", {"verdict": VERDICTS})
        self.lives = counter(
            "life_verdicts", "Recorded validations by the verdict on the node's life.", {"verdict": VERDICTS}
        )
        self.deliveries = counter("callback_attempts", "Callback deliveries by outcome.", {"outcome": OUTCOMES})
        self.requests = counter("http_requests", "Requests by route and status.", {"route": (), "status": ()})
        self.batch_seconds = histogram("batch_seconds", "Time of one batch in the engine.")
        self.commit_seconds = histogram("commit_seconds", "Time of one transaction of the writer.")
        self.validation_seconds = histogram("validation_seconds", "Time of one validation in the engine.")
        self.delivery_seconds = histogram("callback_seconds", "Time of one callback delivery.")
        self.request_seconds = histogram("http_request_seconds", "Time of one request.", ["route"])
        self.state = gauge("state", "1 for the state the service is in.", ["state"])
        self.ready = gauge("ready", "1 when the model is loaded.")
        self.paused = gauge("paused", "1 while generation waits, by reason.", ["reason"])
        self.pending = gauge("callbacks_pending", "Callbacks not delivered yet.")
        self.dead = gauge("callbacks_dead", "Dead letters.")
        self.rate = gauge("nonces_per_second", "Rate over the last half minute.")
        self.valid_share = gauge("valid_ratio", "Valid share of the current round.")
        self.expected_share = gauge("valid_expected_ratio", "Valid share that the law of the block expects.")
        self.expected_error = gauge(
            "valid_expected_error_ratio", "Standard error of that share: of the nonces checked, and of the block's law."
        )
        self.block_factor = gauge("block_factor_ratio", "Width of the block's distances over that of the chord law.")
        self.block_factor_error = gauge("block_factor_error_ratio", "Standard error of that width.")
        self.receipts = counter(
            "receipts", "Receipts of responses on disk; repeated ones were there already.", {"as": ("new", "repeated")}
        )
        self.receipts_refused = counter("receipts_refused", "Receipts that could not be stored, and their responses.")
        self.receipts_deleted = counter(
            "receipts_deleted", "Receipts deleted, by reason.", {"reason": ("age", "request")}
        )
        self.receipt_seconds = histogram("receipt_commit_seconds", "Time of one transaction that stores receipts.")
        self.receipts_failing = gauge("receipts_failing", "1 while no receipt can be stored.")
        self.jobs = gauge("jobs", "Artifact jobs by status.", ["status"])

    def recorded(self, verdict: str) -> None:
        """Count a validation that was written to the ledger, by the verdict on the node's life."""
        self.lives.labels(verdict).inc()

    @override
    def show(self, snapshot: JsonObject) -> None:
        for state in State:
            self.state.labels(str(state)).set(snapshot["state"] == str(state))
        for reason in ("storage", "callbacks"):
            self.paused.labels(reason).set(snapshot["paused"] == reason)
        self.ready.set(snapshot["ready"])
        self.pending.set(snapshot["callbacks"]["pending"])
        self.dead.set(snapshot["callbacks"]["dead"])
        for status, count in snapshot["jobs"].items():
            self.jobs.labels(status).set(count)
        for metric, name in (
            (self.rate, "nonces_per_second"),
            (self.valid_share, "valid_rate"),
            (self.expected_share, "expected_rate"),
            (self.expected_error, "expected_rate_error"),
            (self.block_factor, "block_factor"),
            (self.block_factor_error, "block_factor_error"),
        ):
            metric.set(math.nan if snapshot[name] is None else snapshot[name])
