"""What a validator is made of, and what it says of itself."""

import threading
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial

import structlog
from typing_extensions import override

from assay.errors import AssayError, UsageError, reason_of
from assay.files.jsonl import JsonObject
from assay.poc.net.deployment import Deployment
from assay.poc.net.refusals import Refusal
from assay.poc.net.runtime import Runtime
from assay.poc.net.server_settings import ServerSettings
from assay.poc.protocol.checks import check_name
from assay.poc.validator.claims import Block, Reader
from assay.poc.validator.inbox import Inbox
from assay.poc.validator.inbox_writer import InboxWriter
from assay.poc.validator.laws import Noises
from assay.poc.validator.recomputer import Recomputer, account_id, verdict_of
from assay.poc.validator.registry import Registry
from assay.poc.validator.validator_metrics import ValidatorMetrics
from assay.poc.validator.validator_settings import ValidatorSettings
from assay.poc.verdict.entries import Standing
from assay.poc.verdict.ledger import Ledger

log = structlog.get_logger("assay.validator")

SCHEMA = "assay.poc.validator/1"
LEDGER = "ledger.sqlite3"
"""Name of the ledger in the data directory of a validator."""

SHOWN = 200  # nodes of a snapshot
_RANKS = {"fraud": 0, "faulty": 1, "undecided": 2, "honest": 3}


class ValidatorController(Runtime):
    """Holds the parts of a validator together, and starts and ends them.

    ``reference`` names the model, which tells those of the pins apart; ``load`` runs in a thread.
    ``signed`` says that others reach the port, so that every node needs a secret.

    Raises:
        DataError: The pins or the nodes file cannot be read.
        UsageError: They do not fit each other, or the ledger.
        StorageError: The data directory is in use or cannot be written, or the ledger is not the
            one of the last run.
    """

    metrics: ValidatorMetrics
    worker: Recomputer

    def __init__(
        self,
        load: Callable[[], Deployment],
        settings: ValidatorSettings,
        server: ServerSettings,
        *,
        reference: str = "",
        signed: bool = False,
    ) -> None:
        super().__init__(server, ValidatorMetrics())
        self.settings = settings
        self._reference = reference
        self._signed = signed
        self._read_at = self._modified()
        self._reading = threading.Lock()
        self.registry = self._read()
        """Pins and nodes of now."""
        # An error leaves no file open, and no lock on the directory.
        with ExitStack() as opened:
            self.inbox = Inbox(
                server.data_dir,
                epoch_seconds=settings.epoch,
                sample=settings.sample,
                most=settings.max_kept,
            )
            opened.callback(self.inbox.close)
            self.ledger = Ledger(
                server.data_dir / LEDGER, alpha=self.registry.alpha, beta=server.beta
            )
            opened.callback(self.ledger.close)
            self.inbox.check_ledger(self.ledger)
            self._blocks = self.inbox.blocks(settings.open_blocks)
            self._announcing = threading.Lock()
            self.writer = InboxWriter(
                self.inbox,
                self.metrics,
                most=settings.max_unwritten,
                keep=settings.keep,
                open_blocks=lambda: self.open_blocks,
            )
            self.writers = (self.writer,)
            self.worker = Recomputer(
                partial(self.load_model, load),
                self.inbox,
                self.ledger,
                registry=lambda: self.registry,
                noises=self._current_noises,
                settings=settings,
                metrics=self.metrics,
                give_up=self.failed.set_exception,
            )
            self._files = opened.pop_all()
        self._noises: Noises | None = None

    @override
    def _begin(self, deployment: Deployment) -> None:
        # Pins that are read meanwhile would be judged by the laws of the old ones.
        with self._reading:
            self._noises = self._laws(self.registry, deployment)
            super()._begin(deployment)

    @override
    def _check_model(self, deployment: Deployment) -> None:
        pinned = self.registry.model
        if (pinned.digest, pinned.weights) != (deployment.digest, deployment.weights):
            raise UsageError(
                f"{deployment.reference} ({deployment.weights}, {deployment.digest[:12]})",
                wanted=f"the model of the pins, {pinned.reference:.80} ({pinned.weights}, "
                f"{pinned.digest[:12]})",
                do="pass the --model that the network agreed on",
            )
        self.registry.check_length(deployment)

    def _laws(self, registry: Registry, deployment: Deployment) -> Noises:
        """Read the laws, and say what they need and which are missing: nodes of such a build stay
        undecided.
        """
        noises = Noises(self.server, registry, deployment, self.settings.batch_size)
        for law in noises.laws:
            (log.info if law["missing"] is None else log.warning)("law", **law)
        return noises

    def _current_noises(self) -> Noises:
        # Made before anything is recomputed.
        assert self._noises is not None
        return self._noises

    def _read(self) -> Registry:
        registry = Registry.load(
            self.settings.pins, self.settings.nodes, self.server, model=self._reference
        )
        if self._signed and not all(sender.signatures for sender in registry.senders.values()):
            raise UsageError(
                "nodes that sign nothing",
                wanted="a secret of every node where others reach the port",
                do="write it into the file of --nodes",
            )
        return registry

    def _modified(self) -> list[int]:
        """Return numbers that change when the files do."""
        files = [
            path
            for path in (self.settings.pins, self.settings.nodes)
            if path is not None and path.is_file()
        ]
        return [path.stat().st_mtime_ns for path in files]

    @override
    def tend(self) -> None:
        # Pins and nodes are read again where a file has changed; the old ones hold where the new
        # are wrong.
        modified = self._modified()
        if modified == self._read_at:
            return
        self._read_at = modified
        with self._reading:
            self._read_again()

    def _read_again(self) -> None:
        try:
            fresh = self._read()
            # The loaded model has these, whatever the pins say now.
            now, start = (
                (pins.model.digest, pins.model.weights, pins.model.frame, pins.alpha)
                for pins in (fresh, self.registry)
            )
            if now != start:
                raise UsageError(
                    "pins with another model, weight mode, frame or alpha",
                    wanted="those of the start",
                    do="restart the validator",
                )
            if self.deployment is not None:
                fresh.check_length(self.deployment)
                self._noises = self._laws(fresh, self.deployment)
        except AssayError as error:
            log.error(
                "the pins or the nodes are wrong, and the old ones hold",
                reason=error.seen,
                do=error.do,
            )
            return
        self.registry = fresh
        self.worker.choose_standings()
        log.info("pins and nodes were read again", nodes=len(fresh.senders))

    @property
    def reader(self) -> Reader:
        """What reads claims under the pins of now."""
        return Reader(self.registry, self.open_blocks, self.settings.positions)

    def announce(self, block_hash: str, block_height: int) -> bool:
        """Open a block, and close the oldest one beyond the bound; return whether it is new."""
        check_name("block_hash", block_hash, do="announce the block hash as the chain prints it")
        if self.registry.network.round.block_hash is not None:
            raise UsageError(
                "a block beside pins that name one",
                wanted="blocks from one place",
                do="leave block_hash out of the pins to announce blocks",
            )
        # Another announcement would be lost between what is read and what is put there.
        with self._announcing:
            new = self.inbox.announce(block_hash, block_height, self.registry.computed.values())
            self._blocks = self.inbox.blocks(self.settings.open_blocks)
        return new

    @property
    def open_blocks(self) -> Mapping[str, Block]:
        """The open blocks by hash, the newest first."""
        pinned = self.registry.network.round
        if pinned.block_hash is not None:
            return {pinned.block_hash: Block(pinned.block_height)}
        return self._blocks

    def blocks(self) -> list[JsonObject]:
        """Return the open blocks, the newest first."""
        return [
            {"block_hash": name, "block_height": block.height}
            for name, block in self.open_blocks.items()
        ]

    @property
    def error(self) -> str | None:
        """What keeps the validator from taking messages or recomputing; None while nothing does."""
        if self.loaded.done() and (error := self.loaded.exception()):
            return reason_of(error)
        return self.writer.error or self.worker.error

    @override
    def check_ready(self) -> None:
        # Messages are taken before that.
        if self.error is not None or self.deployment is None:
            raise Refusal(
                503,
                self.error or "the model is being loaded",
                wanted="a loaded model, and no failure",
                do="wait, or see the log",
                retry_after=5,
            )

    def nodes(self) -> list[JsonObject]:
        """Return every pinned or heard node, the strongest evidence of a fault or fraud first."""
        senders = self.inbox.senders()
        standings = self.worker.standings
        decided = {row["account"]: row for row in reversed(self.inbox.verdicts(10_000))}
        keys = dict.fromkeys([*self.registry.senders, *senders])
        listed = [_node(key, senders.get(key, {}), standings.get(key), decided) for key in keys]
        return sorted(
            listed,
            key=lambda node: (_RANKS[node["verdict"]], -node["log_e_value"], node["public_key"]),
        )

    @override
    def snapshot(self) -> JsonObject:
        nodes = self.nodes()
        round = self.registry.network.round
        return {
            **self.about(SCHEMA),
            "ready": self.deployment is not None,
            "error": self.error,
            "storage_failing": self.writer.failing,
            "model": {
                "reference": self.registry.model.reference,
                "digest": self.registry.model.digest,
            },
            "pins": {
                name: getattr(round, name) for name in ("preset", "seq_len", "strength", "r_target")
            },
            "blocks": self.blocks(),
            "inbox": self.inbox.counts(),
            "nonces_per_hour": self.settings.nonces_per_hour,
            "laws": [] if self._noises is None else self._noises.laws,
            "network": None if self._noises is None else self._noises.promise,
            "recomputed": sum(node["recorded"] for node in nodes),
            "nodes_pinned": len(self.registry.senders),
            "nodes_waiting": self.worker.waiting,
            "verdicts": dict(Counter(node["verdict"] for node in nodes)),
            "epoch": self.inbox.epochs(2)[-1],
            "nodes": nodes[:SHOWN],
            "changes": self.inbox.verdicts(20),
        }


def _node(
    key: str, sent: JsonObject, standing: Standing | None, decided: dict[str, JsonObject]
) -> JsonObject:
    account = account_id(standing.account) if standing is not None else None
    change = decided.get(account or "", {})
    return {
        "public_key": key,
        "account": account,
        "verdict": verdict_of(standing),
        "build": standing.account.build if standing else None,
        "checked": standing.evidence.n if standing else 0,
        "recorded": standing.recorded if standing else 0,
        "log_e_value": standing.evidence.log_e_max if standing else 0.0,
        "log_evidence_honest": standing.evidence.log_evidence_honest if standing else 0.0,
        "fault": standing.fault if standing else None,
        "payable": standing.payable if standing else None,
        "messages": sent.get("messages", 0),
        "claimed": sent.get("nonces", 0),
        "first_at": sent.get("first_at"),
        "last_at": sent.get("last_at"),
        "decided_at": change.get("at"),
        "seconds_to_decision": change.get("seconds"),
        "nonces_to_decision": change.get("nonces"),
    }
