"""The thread that recomputes samples of many nodes in full batches, and records evidence.

A pass has three steps, of which each may be the last before the process is killed: the draws are
written down, their evidence is added to the ledger under names, and they are noted as done. A start
begins with draws that were not noted; they are recomputed, and the ledger refuses those whose names
it has.

Of every pass a minimum share goes to nodes that are drawn with equal chances among all that are not
convicted, so that no node is ever unwatched. The rest goes to undecided nodes, with chances in
proportion to 1/N, where N is the number of nonces after which the node is expected to be decided at
the pace of its evidence so far: an even chance per nonce of a decision, so that decisions come as
early as they can on average. Convicted nodes get nothing. The draws come from the randomness of the
system, so no node knows its turn.
"""

import hashlib
import math
import random
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import chain

import numpy as np
import numpy.typing as npt
import structlog
from typing_extensions import override

from assay.errors import (
    AssayError,
    BadWeights,
    DataError,
    EngineEnded,
    ProofError,
    StorageError,
    UsageError,
    reason_of,
)
from assay.files.jsonl import JsonObject, dumps
from assay.poc.net.deployment import Deployment
from assay.poc.net.runtime import EngineThread
from assay.poc.protocol.pins import Build
from assay.poc.protocol.records import Record
from assay.poc.protocol.round import Input, Round, group_inputs
from assay.poc.validator.claims import Claim
from assay.poc.validator.epochs import draw
from assay.poc.validator.inbox import Draw, Inbox
from assay.poc.validator.laws import Noises
from assay.poc.validator.registry import Registry
from assay.poc.validator.validator_metrics import ValidatorMetrics
from assay.poc.validator.validator_settings import ValidatorSettings
from assay.poc.verdict.entries import Account, LedgerUpdate, Standing, round_identity
from assay.poc.verdict.honest_noise import Noise
from assay.poc.verdict.ledger import Ledger

EXPECTED = 32.0
"""Nonces that a node without evidence is expected to need."""

BATCHES = 4  # of one pass
IDLE = 0.5  # seconds between two looks where no node has anything to draw from
FAILURE_PAUSE = 5.0
MOST_FAILURES = 24  # passes in a row in which the engine failed, after which the process ends
# What one message can cause: it must neither stop the others nor end the process.
OF_ONE_DRAW = (
    BadWeights,
    DataError,
    ProofError,
    UsageError,
    ArithmeticError,
    LookupError,
    TypeError,
    ValueError,
)


class Budget:
    """Nonces that may be spent: they come at an even rate, and at most an hour's are saved."""

    def __init__(self, per_hour: int) -> None:
        self._per_hour = per_hour
        self._left = 0.0
        self._at = time.monotonic()

    def left(self) -> int:
        """Return the nonces that may be spent now."""
        now = time.monotonic()
        self._left = min(self._per_hour, self._left + (now - self._at) * self._per_hour / 3600)
        self._at = now
        return int(self._left)

    def seconds_until(self, nonces: int) -> float:
        """Return the time after which so many nonces may be spent."""
        return max(0.0, (min(nonces, self._per_hour) - self.left()) * 3600 / self._per_hour)

    def spend(self, nonces: int) -> None:
        """Take nonces."""
        self._left -= nonces


def verdict_of(standing: Standing | None) -> str:
    """Return the verdict on a node, which is undecided before its first audit."""
    return "undecided" if standing is None else standing.verdict


def expected_nonces(standing: Standing | None, *, alpha: float, beta: float) -> float:
    """Return how many more nonces decide a node, at the pace of its evidence so far; at least 1."""
    if standing is None or standing.evidence.n == 0:
        return EXPECTED
    seen = standing.evidence
    paces = (
        (-math.log(beta) - seen.log_evidence_honest, seen.log_evidence_honest / seen.n),
        (-math.log(alpha) - seen.log_e_value, seen.log_e_value / seen.n),
    )
    needed = [missing / pace for missing, pace in paces if pace > 0]
    # Evidence of neither kind: as many again as were seen.
    return max(1.0, min(needed, default=max(EXPECTED, float(seen.n))))


def choose(
    waiting: Sequence[str],
    standings: Mapping[str, Standing],
    turns: int,
    *,
    minimum_share: float,
    alpha: float,
    beta: float,
    chance: random.Random | None = None,
) -> list[str]:
    """Choose which node's message to sample next, once per turn.

    A share of the turns goes to all nodes alike. The draws come from the system's randomness where
    ``chance`` is None.
    """
    chance = chance or random.SystemRandom()
    verdicts = {key: verdict_of(standings.get(key)) for key in waiting}
    watched = [key for key, verdict in verdicts.items() if verdict != "fraud"]
    if not watched:
        return []
    undecided = [key for key in watched if verdicts[key] == "undecided"]
    weights = [1 / expected_nonces(standings.get(key), alpha=alpha, beta=beta) for key in undecided]
    even = sum(chance.random() < minimum_share for _ in range(turns)) if undecided else turns
    chosen = chance.choices(watched, k=even) if even else []
    if turns > even:
        chosen += chance.choices(undecided, weights, k=turns - even)
    return chosen


log = structlog.get_logger("assay.validator.worker")


@dataclass(frozen=True)
class ClaimSample:
    """Nonces that were drawn from a message, with the records that the node claims of them."""

    source: Draw  # draw as it was written down
    round: Round  # round of the message
    inputs: Sequence[Input]  # drawn ones, in the order in which they are drawn
    received: Sequence[Record]
    noise: Noise  # honest noise that they are judged under
    build: Build  # build of the node

    def update(self, account: Account, residuals_N: npt.NDArray[np.float64]) -> LedgerUpdate:
        """Return the evidence of the residuals, for the ledger."""
        round = self.round
        nonces = [nonce for _, nonce in self.inputs]
        size = self.build.batch_size[0] if len(self.build.batch_size) == 1 else None
        return LedgerUpdate(
            account=account,
            round=round_identity(round),
            block_hash=round.block_hash,
            noise=self.noise,
            nonces=nonces,
            residuals=residuals_N.tolist(),
            proof=self.source.digest.hex(),
            sample_seed=self.source.seed,
            # Of machines that are numbered from 1, the last one may name nonce 0 before its first.
            positions=[max(0, nonce - round.node_id) // round.node_count for nonce in nonces],
            batch_size=size if isinstance(size, int) else None,  # None where several may be
            name=self.source.name,
        )


class Recomputer(EngineThread):
    """Spends the budget of nonces, in a thread of its own.

    ``registry`` returns the pins and nodes of now, and ``noises`` the laws of honest noise with the
    pins that they belong to, from the time at which the model is loaded. Nodes of a build without a
    law stay undecided, and their nonces are not recomputed. ``give_up`` ends the process, where the
    engine fails again and again.
    """

    def __init__(
        self,
        load: Callable[[], Deployment | None],
        inbox: Inbox,
        ledger: Ledger,
        *,
        registry: Callable[[], Registry],
        noises: Callable[[], Noises],
        settings: ValidatorSettings,
        metrics: ValidatorMetrics,
        give_up: Callable[[AssayError], None],
    ) -> None:
        super().__init__("assay-worker", load)
        self._give_up = give_up
        self._failures = 0
        self._inbox = inbox
        self._ledger = ledger
        self._registry = registry
        self._noises = noises
        self._settings = settings
        self._metrics = metrics
        self._budget = Budget(settings.nonces_per_hour)
        self._first = {key: row["first_at"] for key, row in inbox.senders().items()}
        self._recording = threading.Lock()
        self.standings: Mapping[str, Standing] = {}
        """Evidence of the nodes on their present builds, by key; replaced as a whole."""
        self._last = inbox.latest_verdicts()
        self.waiting = 0
        """Number of nodes that had something to draw from at the last look."""
        self.error: str | None = None
        """What the engine failed on last; None while it works."""
        self._lives = {
            standing.account: standing for standing in ledger.standings()
        }  # of every account
        self.choose_standings()

    def choose_standings(self) -> None:
        """Choose the evidence of the nodes on their present builds."""
        with self._recording:  # or evidence that is added meanwhile would be taken back
            self.standings = self._present(self._lives.values())

    def _present(self, standings: Iterable[Standing]) -> dict[str, Standing]:
        """Return those of accounts on the present builds of the nodes, by key."""
        registry = self._registry()
        return {
            standing.account.public_key: standing
            for standing in standings
            if standing.account == account_of(standing.account.public_key, registry)
        }

    @override
    def _turn(self, deployment: Deployment) -> None:
        pause = self.step(deployment)
        self.error = None
        self._failures = 0
        self._wait(pause)

    @override
    def _turn_failed(self, error: Exception) -> None:
        self._metrics.failures.inc()
        self.error = reason_of(error)[:300]
        if isinstance(error, StorageError):
            log.warning("waits", reason=error.seen)
        elif isinstance(error, OF_ONE_DRAW):
            log.error("a pass failed", exc_info=error)
        else:  # an engine may raise any error, and messages are still taken
            self._failures += 1
            failed = EngineEnded(
                f"pass {self._failures} in a row failed: {self.error}",
                wanted="an engine that recomputes",
                do=f"see the log; after {MOST_FAILURES} such passes the validator ends with exit "
                "code 2, and a start goes on with what it has drawn",
            )
            self.error = failed.seen
            log.error(failed.seen, wanted=failed.wanted, do=failed.do, exc_info=error)
            if self._failures == MOST_FAILURES:
                self._give_up(failed)
        self._wait(FAILURE_PAUSE)

    def step(self, deployment: Deployment) -> float:
        """Do one pass; return the seconds until the next one."""
        batch = self._settings.batch_size
        draws = self._inbox.unfinished(BATCHES * batch)
        # Beside others a draw shows whether the engine fails on it; one that always fails draws no
        # more than a batch.
        if not draws or (self.error and len(draws) < batch):
            enough = min(batch, self._settings.nonces_per_hour)
            if (seconds := self._budget.seconds_until(enough)) > 0:
                return min(seconds, IDLE)
            draws += self._draw(min(self._budget.left(), BATCHES * batch))
        if not draws:
            return IDLE
        try:
            self._record(deployment, draws)
        except OF_ONE_DRAW:  # a node may choose a nonce that overflows, or find a fault of the code
            self._record_apart(deployment, draws)
        return 0.0

    def _record_apart(self, deployment: Deployment, draws: Sequence[Draw]) -> None:
        """Record draws one by one; drop those that cannot be computed where others can."""
        failed: list[Draw] = []
        for single in draws:
            try:
                self._record(deployment, [single])
            except OF_ONE_DRAW as error:
                failed.append(single)
                if len(failed) == len(draws):  # the fault may be this machine's
                    raise
                log.warning("a draw cannot be computed", id=single.id, reason=reason_of(error))
        if failed:
            self._inbox.finish(failed)
            self._metrics.dropped.inc(len(failed))

    def _draw(self, nonces: int) -> list[Draw]:
        """Write down what is recomputed next."""
        waiting = self._inbox.waiting()
        genesis = self._ledger.genesis
        self.waiting = len(waiting)
        noises = self._noises()
        senders = noises.registry.senders
        known = [
            key for key in waiting if key in senders and noises.of(senders[key].build) is not None
        ]
        chosen = choose(
            known,
            self.standings,
            math.ceil(nonces / self._settings.sample),
            minimum_share=self._settings.minimum_share,
            alpha=genesis.alpha,
            beta=genesis.beta,
        )
        draws = self._inbox.plan(chosen, nonces) if chosen else []
        self._budget.spend(sum(draw.planned - draw.drawn for draw in draws))
        return draws

    def _record(self, deployment: Deployment, draws: Sequence[Draw]) -> None:
        # Pins may be read again meanwhile: a claim is held against those of the law that judges it.
        noises = self._noises()
        registry = noises.registry
        samples = list[ClaimSample]()
        ended = list[Draw]()
        dropped = list[Draw]()
        for source in draws:
            claim = self._claimed(source, registry)
            if claim is None:  # its message ends whole, or would go on taking draws
                ended.append(replace(source, planned=source.nonces))
                dropped.append(source)
                continue
            ended.append(source)
            build = registry.senders[claim.round.public_key].build  # read under this registry
            if (noise := noises.of(build, claim.round)) is not None:
                places = draw(source.seed, claim.nonces, source.drawn, source.planned)
                inputs = [Input(claim.round, claim.nonces[place]) for place in places]
                records = [claim.record(place, registry.pipeline) for place in places]
                samples.append(ClaimSample(source, claim.round, inputs, records, noise, build))
        inputs = [entry for sample in samples for entry in sample.inputs]
        received = [record for sample in samples for record in sample.received]
        size = self._settings.batch_size
        again = recompute(deployment, size, inputs, received)
        controls = {
            control.dtype: recompute(control, size, inputs, received)
            for control in deployment.controls
        }
        updates = list[LedgerUpdate]()
        start = 0
        for sample in samples:
            rows = slice(start, start + len(sample.inputs))
            start = rows.stop
            residuals_N = sample.noise.residuals(
                sample.received,
                again[rows],
                {dtype: records[rows] for dtype, records in controls.items()},
            )
            updates.append(
                sample.update(account_of(sample.round.public_key, registry), residuals_N)
            )
        with self._recording:
            standings = {standing.account: standing for standing in self._ledger.append(updates)}
            self._lives |= standings
        changes = [
            change
            for standing in standings.values()
            if (change := self._change(standing)) is not None
        ]
        try:
            self._inbox.finish(ended, changes, head=self._ledger.head)
        finally:  # who sees a verdict finds when it was reached
            with self._recording:
                self.standings = {**self.standings, **self._present(standings.values())}
        self._last |= {change["account"]: change["verdict"] for change in changes}
        self._budget.spend(sum(source.drawn - source.planned for source in dropped))
        self._metrics.dropped.inc(len(dropped))
        self._metrics.nonces.inc(len(inputs))
        for change in changes:
            self._metrics.verdicts.labels(change["verdict"]).inc()
            log.info(
                "verdict",
                **{name: change[name] for name in ("public_key", "account", "verdict", "nonces")},
            )

    def _claimed(self, source: Draw, registry: Registry) -> Claim | None:
        """Return what a message claims; None where its node is gone, or computes otherwise now."""
        sender = registry.senders.get(source.public_key)
        # Callbacks do not state it: their values would be judged by what was agreed on later. All
        # else was held against the pins of their time.
        if source.claim is None or not sender or source.pins != registry.computed[sender.build]:
            log.warning("a message is no longer as pinned", id=source.id, key=source.public_key)
            return None
        return Claim.decode(source.claim, source.nonces, registry.pipeline)

    def _change(self, standing: Standing) -> JsonObject | None:
        """Return the row of a verdict that changed, or None."""
        key = standing.account.public_key
        verdict = verdict_of(standing)
        account = account_id(standing.account)
        now = time.time()
        if verdict == self._last.get(account, "undecided"):
            return None
        if key not in self._first:
            self._first = {name: row["first_at"] for name, row in self._inbox.senders().items()}
        return {
            "public_key": key,
            "account": account,
            "at": now,
            "verdict": verdict,
            "nonces": standing.evidence.n,
            "seconds": max(0.0, now - self._first.get(key, now)),
            "fault": standing.fault,
        }


def recompute(
    deployment: Deployment,
    batch_size: int,
    inputs: Sequence[Input],
    received: Sequence[Record] = (),
) -> list[Record]:
    """Recompute inputs of several rounds in batches that they fill together; return their records.

    Received records are those of the same inputs as the nodes claim them, from which tokens are
    replayed.
    """
    records: dict[int, Record] = {}
    for places in group_inputs(inputs):
        group = [inputs[place] for place in places]
        claimed = [received[place] for place in places] if received else None
        batches = deployment.compute(group, batch_size, claimed)
        records |= zip(places, chain.from_iterable(batches), strict=True)
    return [records[place] for place in range(len(inputs))]


def account_of(public_key: str, registry: Registry) -> Account:
    """Return the account of a node on its present build."""
    sender = registry.senders.get(public_key)
    build = "" if sender is None else sender.build.name or sender.build.dtype[0]
    return Account(
        public_key=public_key,
        digest=registry.model.digest,
        build=build,
        preset=registry.pipeline.name,
    )


@lru_cache(maxsize=2**16)
def account_id(account: Account) -> str:
    """Return sixteen hexadecimal digits that stand for an account in addresses."""
    return hashlib.sha256(dumps(vars(account)).encode()).hexdigest()[:16]
