"""What a validator is made of, and what it says of itself."""

import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import ExitStack

import structlog

from assay._version import __version__
from assay.errors import AssayError, UsageError, reason_of
from assay.files.jsonl import JsonObject
from assay.poc.protocol.builds import Build
from assay.poc.protocol.round import Round, check_name
from assay.poc.service.deployment import Deployment
from assay.poc.service.settings import Settings
from assay.poc.validator.budget import verdict_of
from assay.poc.validator.inbox import Inbox
from assay.poc.validator.metrics import Metrics
from assay.poc.validator.noises import Noises
from assay.poc.validator.registry import Registry, modified
from assay.poc.validator.settings import ValidatorSettings
from assay.poc.validator.worker import Worker, account_id
from assay.poc.validator.writer import Writer
from assay.poc.verdict.ledger import Ledger
from assay.poc.verdict.ledger_entries import Standing
from assay.poc.verdict.noise import Noise

log = structlog.get_logger("assay.validator")

SCHEMA = "assay.poc.validator/1"
LEDGER = "ledger.sqlite3"
"""Name of the ledger in the data directory of a validator."""

SHOWN = 200  # nodes of a snapshot
_RANKS = {"fraud": 0, "faulty": 1, "undecided": 2, "honest": 3}


class Controller:
    """Holds the parts of a validator together, and starts and ends them.

    Args:
        load: Function that loads the model and returns its deployment; it runs in a thread.
        settings: Settings of the validator.
        service: Settings that a validator shares with a service.
        reference: Name of the model, which tells those of the pins apart.

    Raises:
        DataError: The pins or the nodes file cannot be read.
        UsageError: They do not fit each other, or the ledger.
        StorageError: The data directory is in use or cannot be written.
    """

    def __init__(
        self, load: Callable[[], Deployment], settings: ValidatorSettings, service: Settings, *, reference: str = ""
    ) -> None:
        self.settings, self.service = settings, service
        self._load, self._reference = load, reference
        self.started_at = time.time()
        self.closing = threading.Event()
        self.loaded: Future[Deployment] = Future()
        self.metrics = Metrics()
        self._read_at = self._modified()
        self.registry = self._read()
        """Pins and nodes of now."""
        with ExitStack() as opened:
            self.inbox = Inbox(
                service.data_dir, epoch_seconds=settings.epoch, sample=settings.sample, most=settings.max_kept
            )
            opened.callback(self.inbox.close)
            self.ledger = Ledger(service.data_dir / LEDGER, alpha=service.alpha, beta=service.beta)
            opened.callback(self.ledger.close)
            self._blocks = self.inbox.blocks(settings.open_blocks)
            self.writer = Writer(self.inbox, self.metrics, most=settings.max_unwritten, keep=settings.keep)
            self.worker = Worker(
                self.inbox,
                self.ledger,
                registry=lambda: self.registry,
                noise=self._noise,
                settings=settings,
                metrics=self.metrics,
            )
            opened.pop_all()
        self._noises: Noises | None = None
        self._loading = threading.Thread(target=self._load_model, name="assay-load", daemon=True)
        self.ended = True

    def start(self) -> None:
        """Begin to take messages, load the model, and recompute once it is there."""
        self.writer.start()
        self.worker.start(self.loaded)
        self._loading.start()

    def close(self) -> None:
        """Keep the messages that wait, finish the batch that runs, and close the files."""
        self.closing.set()
        self.writer.close()
        self.ended = self.worker.close(self.service.drain) and not self._loading.is_alive()
        self.ledger.close()
        self.inbox.close()

    def _load_model(self) -> None:
        try:
            deployment = self._load()
            self._check_model(deployment)
            self._noises = Noises(self.service.calibration, self.registry, deployment)
            self.loaded.set_result(deployment)
        except Exception as error:  # whatever the loading raises ends the process, with its reason
            log.error("model not loaded", error=reason_of(error))
            self.loaded.set_exception(error)

    def _check_model(self, deployment: Deployment) -> None:
        pinned = self.registry.model
        if (pinned.digest, pinned.weights) != (deployment.digest, deployment.weights):
            raise UsageError(
                f"{deployment.reference} ({deployment.weights}, {deployment.digest[:12]})",
                wanted=f"the model of the pins, {pinned.reference:.80} ({pinned.weights}, {pinned.digest[:12]})",
                do="pass the --model that the network agreed on",
            )
        self.registry.check_length(deployment)

    def _noise(self, build: Build, round: Round) -> Noise:
        assert self._noises is not None  # made before anything is recomputed
        return self._noises.of(build, round)

    # Pins, nodes and blocks

    def _read(self) -> Registry:
        return Registry.load(self.settings.pins, self.settings.nodes, self.service, model=self._reference)

    def _modified(self) -> tuple[int, int]:
        return modified(self.settings.pins), modified(self.settings.nodes)

    def reread(self) -> None:
        """Read the pins and the nodes file again where one has changed; keep the old ones where the new are wrong."""
        found = self._modified()
        if found == self._read_at:
            return
        self._read_at = found
        try:
            fresh = self._read()
            if fresh.model.digest != self.registry.model.digest:
                raise UsageError("pins of another model", wanted="the model of the start", do="restart the validator")
            if self.loaded.done() and not self.loaded.exception():
                self._noises = Noises(self.service.calibration, fresh, self.loaded.result())
        except AssayError as error:
            log.error("the pins or the nodes are wrong, and the old ones hold", reason=error.seen, do=error.do)
            return
        self.registry = fresh
        self.worker.load_standings()
        log.info("pins and nodes were read again", nodes=len(fresh))

    def is_open(self, block_hash: str, block_height: int) -> bool:
        """Return whether messages of a block are accepted."""
        if self.registry.blocks:
            height = self.registry.network.round.block_height
            return block_hash in self.registry.blocks and height in (None, block_height)
        return self._blocks.get(block_hash) == block_height

    def announce(self, block_hash: str, block_height: int) -> bool:
        """Open a block, and close the oldest one beyond the bound; return whether it is new.

        Raises:
            UsageError: The pins name the block, or no round can have it.
        """
        check_name("block_hash", block_hash, do="announce the block hash as the chain prints it")
        if self.registry.blocks:
            raise UsageError(
                "a block beside pins that name one",
                wanted="blocks from one place",
                do="leave block_hash out of the pins to announce blocks",
            )
        new = self.inbox.announce(block_hash, block_height)
        self._blocks = self.inbox.blocks(self.settings.open_blocks)
        return new

    @property
    def open_blocks(self) -> dict[str, int | None]:
        """Heights of the open blocks by hash, the newest first; None where the pins do not say."""
        if self.registry.blocks:
            return dict.fromkeys(self.registry.blocks, self.registry.network.round.block_height)
        return dict(self._blocks)

    # What it says of itself

    @property
    def error(self) -> str | None:
        """What keeps the validator from taking messages or recomputing; None while nothing does."""
        if self.loaded.done() and (error := self.loaded.exception()):
            return reason_of(error)
        return self.writer.error or self.worker.error

    @property
    def ready(self) -> bool:
        """Whether the model is loaded."""
        return self.loaded.done() and self.loaded.exception() is None

    def nodes(self) -> list[JsonObject]:
        """Return every node that is pinned or has sent, the strongest evidence of anything wrong first."""
        senders, standings = self.inbox.senders(), self.worker.standings
        decided = {row["account"]: row for row in reversed(self.inbox.last_verdicts(10_000))}
        keys = dict.fromkeys([*self.registry.keys, *senders])
        return sorted((_node(key, senders.get(key), standings.get(key), decided) for key in keys), key=_rank)

    def snapshot(self) -> JsonObject:
        """Collect what the page and the metrics show. It reads the database, so it runs in a thread."""
        nodes, round = self.nodes(), self.registry.network.round
        return {
            "schema": SCHEMA,
            "time": time.time(),
            "version": __version__,
            "uptime_seconds": time.time() - self.started_at,
            "ready": self.ready,
            "error": self.error,
            "storage_failing": self.writer.failing,
            "model": {"reference": self.registry.model.reference, "digest": self.registry.model.digest},
            "pins": {name: getattr(round, name) for name in ("preset", "seq_len", "strength", "r_target")},
            "blocks": [{"block_hash": hash, "block_height": height} for hash, height in self.open_blocks.items()],
            "inbox": self.inbox.counts(),
            "nonces_per_hour": self.settings.nonces_per_hour,
            "recomputed": sum(node["recorded"] for node in nodes),
            "nodes_pinned": len(self.registry),
            "nodes_waiting": self.worker.waiting,
            "verdicts": dict(Counter(node["verdict"] for node in nodes)),
            "epoch": self.inbox.epochs(2)[-1],
            "nodes": nodes[:SHOWN],
            "changes": self.inbox.last_verdicts(20),
        }


def _node(key: str, sender: JsonObject | None, standing: Standing | None, decided: dict[str, JsonObject]) -> JsonObject:
    account = account_id(standing.account) if standing is not None else None
    change = decided.get(account) if account else None
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
        "messages": sender["messages"] if sender else 0,
        "claimed": sender["nonces"] if sender else 0,
        "first_at": sender["first_at"] if sender else None,
        "last_at": sender["last_at"] if sender else None,
        "decided_at": change["at"] if change else None,
        "seconds_to_decision": change["seconds"] if change else None,
        "nonces_to_decision": change["nonces"] if change else None,
    }


def _rank(node: JsonObject) -> tuple[int, float, str]:
    return _RANKS.get(node["verdict"], 1), -node["log_e_value"], node["public_key"]
