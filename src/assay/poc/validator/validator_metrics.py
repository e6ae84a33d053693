"""Prometheus metrics of a validator. Every series exists from the start."""

from assay.poc.net.metrics import Exported, Gauged
from assay.poc.validator.claims import REASONS

KINDS = ("generated", "validated", "proof", "pulled")
OUTCOMES = ("taken", "empty", "refused", "failed")
VERDICTS = ("honest", "fraud", "undecided", "faulty")
SHOWN = (
    Gauged(
        "nodes",
        "Nodes by verdict.",
        lambda s: {n: s["verdicts"].get(n, 0) for n in VERDICTS},
        "verdict",
    ),
    Gauged("nodes_pinned", "Nodes that may send.", lambda s: s["nodes_pinned"]),
    Gauged(
        "ready",
        "1 when the model is loaded and nothing has failed.",
        lambda s: s["ready"] and s["error"] is None,
    ),
    Gauged("storage_failing", "1 while the disk takes nothing.", lambda s: s["storage_failing"]),
    Gauged("nodes_waiting", "Nodes of which nonces may be drawn.", lambda s: s["nodes_waiting"]),
)


class ValidatorMetrics(Exported):
    """Every figure of a validator."""

    def __init__(self) -> None:
        super().__init__("assay_validator", SHOWN)
        self.messages = self.counter(
            "messages",
            "Messages on disk, by kind; repeated ones were there already.",
            {"kind": KINDS, "as": ("new", "repeated")},
        )
        self.refused = self.counter(
            "refused", "Messages refused, by the value that was not as pinned.", {"value": REASONS}
        )
        self.nonces = self.counter("nonces", "Nonces recomputed, whose evidence is in the ledger.")
        self.dropped = self.counter(
            "dropped_draws", "Draws without evidence, because the pins have changed."
        )
        self.failures = self.counter("engine_failures", "Batches that the engine failed on.")
        self.verdicts = self.counter(
            "verdict_changes", "Verdicts that changed, by the new one.", {"verdict": VERDICTS}
        )
        self.polls = self.counter("polls", "Questions to nodes, by outcome.", {"outcome": OUTCOMES})
