"""Prometheus metrics of a service."""

from assay.poc.net.metrics import Exported, Gauged

STATES = ("IDLE", "GENERATING", "VALIDATING", "STOPPED")
VERDICTS = ("honest", "fraud", "undecided", "faulty")
OUTCOMES = ("delivered", "failed", "dead")
PAUSES = ("storage", "callbacks")
SHOWN = (
    Gauged(
        "state",
        "1 for the state the service is in.",
        lambda s: {n: n == s["state"] for n in STATES},
        "state",
    ),
    Gauged("ready", "1 when the model is loaded.", lambda s: s["ready"]),
    Gauged(
        "paused",
        "1 while generation waits, by reason.",
        lambda s: {n: n == s["paused"] for n in PAUSES},
        "reason",
    ),
    Gauged(
        "callbacks_pending", "Callbacks not delivered yet.", lambda s: s["callbacks"]["pending"]
    ),
    Gauged("callbacks_dead", "Dead letters.", lambda s: s["callbacks"]["dead"]),
    Gauged(
        "nonces_per_second", "Rate over the last half minute.", lambda s: s["nonces_per_second"]
    ),
    Gauged("valid_ratio", "Valid share of the current round.", lambda s: s["valid_rate"]),
    Gauged(
        "valid_expected_ratio",
        "Valid share that the law of the block expects.",
        lambda s: s["expected_rate"],
    ),
    Gauged(
        "valid_expected_error_ratio",
        "Standard error of that share: of the nonces checked, and of the block's law.",
        lambda s: s["expected_rate_error"],
    ),
    Gauged("jobs", "Artifact jobs by status.", lambda s: s["jobs"], "status"),
)


class Metrics(Exported):
    """Every figure of a service."""

    def __init__(self) -> None:
        super().__init__("assay_poc", SHOWN)
        counter = self.counter
        histogram = self.histogram
        self.nonces = counter("nonces", "Nonces computed and written.")
        self.valid = counter("valid_nonces", "Of these, the valid ones.")
        self.failures = counter(
            "engine_failures", "Rounds or loads ended by an error of the engine."
        )
        self.verdicts = counter(
            "verdicts", "Validation requests by residual verdict.", {"verdict": VERDICTS}
        )
        self.deliveries = counter(
            "callback_attempts", "Callback deliveries by outcome.", {"outcome": OUTCOMES}
        )
        self.batch_seconds = histogram("batch_seconds", "Time of one batch in the engine.")
        self.commit_seconds = histogram("commit_seconds", "Time of one transaction of the writer.")
        self.validation_seconds = histogram(
            "validation_seconds", "Time of one validation in the engine."
        )
        self.delivery_seconds = histogram("callback_seconds", "Time of one callback delivery.")
        self.receipts = counter(
            "receipts",
            "Receipts of responses on disk; repeated ones were there already.",
            {"as": ("new", "repeated")},
        )
        self.receipts_refused = counter(
            "receipts_refused", "Receipts that could not be stored, and their responses."
        )
        self.receipts_failing = self.gauge("receipts_failing", "1 while no receipt can be stored.")
