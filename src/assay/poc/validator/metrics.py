"""Prometheus metrics of a validator, in base units. Every series exists from the start."""

from typing_extensions import override

from assay.files.jsonl import JsonObject
from assay.poc.net.metrics import Exported
from assay.poc.validator.claims import REASONS

KINDS = ("generated", "validated", "proof", "pulled")
OUTCOMES = ("taken", "empty", "refused", "failed")
VERDICTS = ("honest", "fraud", "undecided", "faulty")
_COUNTS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)


class ValidatorMetrics(Exported):
    """Every figure of a validator. Labels never hold keys, hashes or addresses."""

    def __init__(self) -> None:
        super().__init__("assay_validator")
        counter, gauge, histogram = self.counter, self.gauge, self.histogram
        self.messages = counter(
            "messages",
            "Messages on disk, by kind; repeated ones were there already.",
            {"kind": KINDS, "as": ("new", "repeated")},
        )
        self.refused = counter("refused", "Messages refused, by the value that was not as pinned.", {"value": REASONS})
        self.nonces = counter("nonces", "Nonces recomputed, whose evidence is in the ledger.")
        self.dropped = counter("dropped_draws", "Draws without evidence, because the pins have changed.")
        self.failures = counter("engine_failures", "Batches that the engine failed on.")
        self.verdicts = counter("verdict_changes", "Verdicts that changed, by the new one.", {"verdict": VERDICTS})
        self.polls = counter("polls", "Questions to nodes, by outcome.", {"outcome": OUTCOMES})
        self.requests = counter("http_requests", "Requests by route and status.", {"route": (), "status": ()})
        self.request_seconds = histogram("http_request_seconds", "Time of one request.", ["route"])
        self.commit_seconds = histogram("commit_seconds", "Time of one transaction of the inbox.")
        self.commit_messages = histogram("commit_messages", "Messages of one transaction.", buckets=_COUNTS)
        self.batch_seconds = histogram("batch_seconds", "Time to recompute the nonces of one pass.")
        self.nodes = gauge("nodes", "Nodes by verdict.", ["verdict"])
        self.known = gauge("nodes_pinned", "Nodes that may send.")
        self.ready = gauge("ready", "1 when the model is loaded and nothing has failed.")
        self.storage = gauge("storage_failing", "1 while the disk takes nothing.")
        self.waiting = gauge("nodes_waiting", "Nodes of which nonces may be drawn.")
        for verdict in VERDICTS:
            self.nodes.labels(verdict)

    @override
    def show(self, snapshot: JsonObject) -> None:
        for verdict in VERDICTS:
            self.nodes.labels(verdict).set(snapshot["verdicts"].get(verdict, 0))
        self.known.set(snapshot["nodes_pinned"])
        self.ready.set(snapshot["ready"] and snapshot["error"] is None)
        self.storage.set(snapshot["storage_failing"])
        self.waiting.set(snapshot["nodes_waiting"])
