"""The evidence of a node's whole life, under however many laws its residuals were judged.

A life is a sequence of tests k = 1, 2, … with e-values E_k and weights w_k, Σ w_k = 1. An honest
node ever has E_k ≥ 1/(alpha · w_k) with chance alpha · w_k at most (Ville 1939), so in its whole
life with chance alpha at most, however its tests depend on each other. That raises a suspicion.
docs/statistics.md ("The account") says what a test needs besides to convict, which can only lower
the chance, when a node is honest, and which laws share a test.

A test that began after `EPOCH` nonces catches a node that was honest for long and then cheats: the
first test would first have to make up for everything that spoke for the node. Of older pools of
places, the blocks that accuse most are kept apart. For responses, which have no places in a batch,
a test convicts by its e-value alone.

A ledger keeps a life on disk as entries, each one line of canonical JSON with its place, the hash
of the entry before it, the account, the evidence and the outcome. Its own hash is the SHA-256 of
the line. Evidence in entries of earlier releases counts by this rule; their outcomes stay as they
were written.
"""

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any, ClassVar, Literal, Self

import numpy as np
import numpy.typing as npt
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    model_serializer,
    model_validator,
)

from assay import stats
from assay.errors import DataError, UsageError
from assay.files.jsonl import dumps
from assay.poc.protocol.round import MAX_NONCE, Round
from assay.poc.verdict.noise import (
    AnyNoise,
    FloatArray,
    ResponseBlocks,
    ResponseNoise,
    ResponseTest,
    sequential_test,
)
from assay.stats.e_values import Decision, decide
from assay.stats.sequential import SHARES

Residuals = Sequence[float] | npt.NDArray[np.float64] | ResponseBlocks

# counted nonces after which the next audit begins another test, and the pool of places another one
EPOCH = 1024
FIRST_WEIGHT = 0.9  # share of the error rates that the first test has
# nonces of a pool from which it convicts: fewer may not show that a machine is wrong at fixed
# places
PLACES = 128
# blocks of older pools that can be left out: those that accuse most, because leaving out another
# takes less
APART = 8
HONEST = 0.2  # largest share of cheap nonces that is not excluded at which a life is called honest
_LARGEST = 1e9  # largest logarithm that is written, because JSON has no infinity

MOST_NONCES = 2**18  # of one entry
MOST_PROFILES = 2**25  # characters of the profiles of one response
LARGEST_SEED = 2**256
RESPONSES = "responses"  # the preset in an account of responses
# reason of a nonce that does not count, because the account has an entry of it in the same round
REPEATED = "repeated"
# reason of earlier releases; now the pool of all audits decides, and the nonce counts
SUSPECTED = "suspected place"

Text = Annotated[str, Field(max_length=1024)]
Name = Annotated[str, Field(min_length=1, max_length=1024)]
Hash = Annotated[str, Field(pattern=r"\A[0-9a-f]{64}\z")]
Count = Annotated[int, Field(ge=0, le=MAX_NONCE)]
Chance = Annotated[float, Field(gt=0, lt=1)]

_ADDED = {
    "positions",
    "batch_size",
    "log_e_held",
    "share",
}  # fields that entries of earlier releases do not have


class _Model(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)

    @classmethod
    def parse(cls, text: str, source: str) -> Self:
        """Read canonical JSON; a DataError where it is not JSON, of another form, or not what
        :attr:`line` writes.
        """
        try:
            made = cls.model_validate_json(
                text
            )  # it forgives a key given twice, which the next line refuses
        except ValidationError as error:
            raise _malformed(source, error) from None
        if made.line != text:
            seen = f"{source}: not in the form in which it is written"
            raise DataError(
                seen, wanted=f"{made.line:.60}…", do="ask for the file again, byte for byte"
            )
        return made

    @model_serializer(mode="wrap")
    def _without_absent(self, handler: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
        """Leave out added fields where they say nothing, so that lines of earlier releases keep
        their bytes.
        """
        return {
            name: value
            for name, value in handler(self).items()
            if value is not None or name not in _ADDED
        }

    @property
    def line(self) -> str:
        """The canonical JSON."""
        return dumps(self.model_dump())

    @property
    def hash(self) -> str:
        """SHA-256 of the line."""
        return sha256(self.line)


class Evidence(_Model):
    """The state of an account after an audit: what its life says after the last residual, with two
    counts of a ledger.

    Args:
        audits: Number of entries of the account, this one included; a life outside a ledger counts
            none.
        recorded: Number of nonces in them, those that do not count included.
        verdict: Decision by :func:`verdict_on_life`.
        n: Number of residuals that count.
        tests: Number of tests that have begun.
        log_e_value: Natural logarithm of the e-value: the weighted average over the tests.
        log_e_max: Logarithm of the largest e-value that one test had, times its weight: a
            suspicion.
        log_evidence_honest: Logarithm of the larger evidence for honesty of the last two tests,
            times their weights.
        log_e_held: Logarithm of the largest e-value, times its weight, that stood without any one
            block and without places that may be faulty; it decides fraud. It is 0 until there is a
            suspicion, and None for responses and entries of earlier releases, as are the next two.
        share: Largest share of cheap nonces that was not excluded yet: 1 at first, and it only
            falls.
        faulty_places: Places of the batch at which residuals of several audits together are large;
            None without any. An entry has it beside its outcome.
    """

    audits: Count = 0
    recorded: Count = 0
    verdict: Decision = "undecided"
    n: Count = 0
    tests: Count = 0
    log_e_value: float = 0.0
    log_e_max: float = 0.0
    log_evidence_honest: float = 0.0
    log_e_held: float | None = None
    share: float | None = None
    faulty_places: Annotated[Text | None, Field(exclude=True)] = None


def verdict_on_life(found: Evidence, *, alpha: float, beta: float) -> Decision:
    """Return the verdict that follows from the numbers of a life."""
    if found.log_e_held is None or found.share is None:
        return decide(found.log_e_max, found.log_evidence_honest, alpha=alpha, beta=beta)
    if found.log_e_held >= -math.log(alpha):
        return "fraud"
    return "honest" if found.share <= HONEST else "undecided"


class Life:
    """The evidence of one account: feed it the residuals of audits as they come, read it at any
    time.

    Args:
        alpha: Bound on the chance that an honest node is ever accused, in its whole life.
        beta: Bound on the chance that a share of cheap nonces is excluded that a node has.

    Raises:
        UsageError: A rate is not in (0, 1), when the first residuals come.

    Example:
        >>> from assay.poc.verdict.noise import Noise, read_law
        >>> from assay.poc.verdict import Life
        >>> noise = Noise(read_law({"kind": "log", "mu": -3.7, "sd": 0.7}), "an example")
        >>> life = Life(alpha=1e-3, beta=1e-2)
        >>> life.update(noise, [noise.size] * 60, block="one").evidence.verdict
        'honest'
        >>> [life.update(noise, [1.0] * 60, block=block).evidence.verdict for block in ("two", "three")]
        ['honest', 'fraud']
    """

    def __init__(self, *, alpha: float, beta: float) -> None:
        self.alpha = alpha
        self.beta = beta
        self.tests: list[LifeTest] = []
        self._running: dict[
            str, list[LifeTest]
        ] = {}  # of each law: its first test, and the newest one beside it
        self._n = 0
        self._pool: list[_Pooled] = []
        self._open = np.ones(len(SHARES), dtype=np.bool_)  # shares that are not excluded yet
        self._fault: str | None = None
        self._only_responses = True

    def update(
        self,
        noise: AnyNoise,
        residuals: Residuals,
        *,
        block: str = "",
        positions: Sequence[int] | None = None,
        batch_size: int | None = None,
    ) -> Self:
        """Take the residuals of one audit, in the order in which they were checked; NaN for a
        missing value.

        Args:
            noise: Honest noise that they are judged under, chosen without looking at them.
            residuals: Residuals that count, of nonces that did not count before; or the evidence of
                one response.
            block: Block of the nonces.
            positions: Index of each nonce in the node's own sequence; its place in ``residuals``
                when None.
            batch_size: Batch size that the node states.

        Raises:
            DataError: The residuals are of nonces and the noise of responses, or the other way
                round.
        """
        if not len(residuals):
            return self
        self._n += len(residuals)
        if isinstance(noise, ResponseNoise) and isinstance(residuals, ResponseBlocks):
            for test in self._tests_of(noise, dumps(noise.as_dict())):
                test.update(residuals)
        elif isinstance(noise, ResponseNoise) or isinstance(residuals, ResponseBlocks):
            wanted = "responses under a law of responses, and nonces under one of nonces"
            do = "ask for the file again"
            raise DataError(
                "residuals of another kind than the law that they are judged under",
                wanted=wanted,
                do=do,
            )
        else:
            law = noise.shape
            self._only_responses = False
            if (
                self._pooled_count >= EPOCH
            ):  # another pool begins; residuals at places that may be faulty never convict
                for test in self.tests:
                    test.settle(self._pool)
                self._pool = []
            running = self._tests_of(noise, law)
            sizes = np.asarray(residuals, dtype=np.float64) / noise.size
            for test in running:
                test.update(sizes * running[0].size)
            places = (
                np.arange(len(sizes))
                if positions is None
                else np.asarray(positions, dtype=np.int64)
            )
            self._pool.append(_Pooled(law, block, sizes, places))
            self._look(running, batch_size)
        return self

    def _tests_of(self, noise: AnyNoise, law: str) -> list["LifeTest"]:
        """Return the tests that residuals under a law go to; another one begins where it is
        time.
        """
        running = self._running.setdefault(law, [])
        if not running or running[-1].n >= EPOCH:
            weight = error_share(len(self.tests) + 1)
            rates = {"alpha": self.alpha * weight, "beta": self.beta * weight}
            test = (
                ResponseTest(noise, **rates)
                if isinstance(noise, ResponseNoise)
                else sequential_test(noise, **rates)
            )
            size = 0.0 if isinstance(noise, ResponseNoise) else noise.size
            made = LifeTest(test, math.log(weight), law, size, begins=len(self._pool))
            self.tests.append(made)
            running[1:] = [made]
        return running

    @property
    def _pooled_count(self) -> int:
        return sum(len(one.sizes) for one in self._pool)

    def _look(self, running: Sequence["LifeTest"], batch_size: int | None) -> None:
        """Exclude shares, look for faulty places in the pool, and weigh what a suspicion stands
        on.
        """
        for test in running:
            if isinstance(test.test, stats.SequentialTest):
                self._open &= test.log_weight + test.test.honest_over() < -math.log(self.beta)
        pool = self._pool
        if self._pooled_count >= PLACES:
            sizes, positions = (
                np.concatenate([getattr(one, name) for one in pool])
                for name in ("sizes", "positions")
            )
            found = stats.place_test(sizes, positions, batch_size=batch_size, honest_size=1.0)
            self._fault = found.pattern if found.faulty else None
            ends = np.cumsum([len(one.sizes) for one in pool])[:-1]
            for one, aside in zip(pool, np.split(found.set_aside, ends), strict=True):
                one.aside = aside
        needed = -math.log(self.alpha)
        for test in running:
            if test.log_weight + test.log_e_max >= needed > test.log_e_held:
                held = test.log_weight + min(self.held(test), test.log_e_max)
                test.log_e_held = max(test.log_e_held, min(_LARGEST, held))

    def held(self, test: "LifeTest") -> float:
        """Return the logarithm of what stands of a test's e-value without any one block and without
        faulty places.
        """
        return test.held(self._pool if self._pooled_count >= PLACES else [])

    @property
    def evidence(self) -> Evidence:
        """The evidence, and the verdict that follows from it."""
        honest = max([test.log_weight + test.log_honest for test in self.tests[-2:]], default=0.0)
        found = Evidence(
            n=self._n,
            tests=len(self.tests),
            log_e_value=log_average([(test.log_weight, test.log_e) for test in self.tests]),
            log_e_max=max([0.0, *(test.log_weight + test.log_e_max for test in self.tests)]),
            log_evidence_honest=honest,
            log_e_held=None
            if self._only_responses
            else max([0.0, *(test.log_e_held for test in self.tests)]),
            share=None
            if self._only_responses
            else max([0.0, *np.array(SHARES)[self._open].tolist()]),
            faulty_places=self._fault,
        )
        return found.model_copy(
            update={"verdict": verdict_on_life(found, alpha=self.alpha, beta=self.beta)}
        )


@dataclass
class _Pooled:
    """Residuals of one audit, [N], over the typical one of their law, with their block and
    places.
    """

    law: str
    block: str
    sizes: FloatArray
    positions: npt.NDArray[np.int64]
    aside: npt.NDArray[np.bool_] | None = (
        None  # those at places that may be faulty; None before a pool tells
    )


@dataclass
class LifeTest:
    """A test of a life, the logarithm of its share of the error rates, and its numbers after the
    last residual.
    """

    test: stats.SequentialTest | ResponseTest
    log_weight: float
    law: str
    size: float = 0.0  # typical residual of its law; 0 for responses
    log_e: float = 0.0
    log_e_max: float = 0.0
    log_honest: float = 0.0
    log_e_held: float = 0.0
    n: int = 0
    begins: int = 0  # audit of the pool from which on it takes residuals
    blocks: dict[str | None, FloatArray] = field(default_factory=dict)
    """What earlier pools add to its paths, by block; under None, what can no longer be left out."""

    def update(self, residuals: Residuals) -> None:
        """Take the residuals of one audit, in its own unit, or those of a response."""
        result = self.test.update(residuals).result  # type: ignore[arg-type]  # of its kind: see `Life.update`
        numbers = (result.log_e_value, result.log_e_max, result.log_evidence_honest)
        self.log_e, self.log_e_max, self.log_honest = (
            max(-_LARGEST, min(_LARGEST, number)) for number in numbers
        )
        self.n = result.n

    def held(self, pool: Sequence[_Pooled]) -> float:
        """Return the logarithm of the e-value of what is left without any one block, at sound
        places of the pool.
        """
        if not isinstance(
            self.test, stats.SequentialTest
        ):  # all of it for responses: tokens have no place in a batch
            return self.log_e
        if len({one.block for one in pool[self.begins :]} | self.blocks.keys()) < 2:
            return 0.0  # nothing is left
        found = self._sums(self.test, pool)
        whole = self.test.prior + sum(found.values())
        left = (
            float(self.test.log_e(whole - part))
            for block, part in found.items()
            if block is not None
        )
        return min(left, default=0.0)

    def settle(self, pool: Sequence[_Pooled]) -> None:
        """Keep what a pool adds to the paths, apart for the blocks that accuse most."""
        test = self.test
        if not isinstance(test, stats.SequentialTest):
            return
        found = self._sums(test, pool)
        weights = {
            block: float(test.log_e(test.prior + part))
            for block, part in found.items()
            if block is not None
        }
        for block in sorted(weights, key=weights.__getitem__, reverse=True)[APART:]:
            found[None] = found.get(None, 0.0) + found.pop(block)
        self.blocks = found
        self.begins = 0

    def _sums(
        self, test: stats.SequentialTest, pool: Sequence[_Pooled]
    ) -> dict[str | None, FloatArray]:
        """Return what all residuals add to the paths, those at places that may be faulty left out,
        by block.
        """
        found = dict(self.blocks)
        for one in (one for one in pool[self.begins :] if one.law == self.law):
            values = self.size * (one.sizes if one.aside is None else one.sizes[~one.aside])
            parts = (
                values[start : start + EPOCH] for start in range(0, len(values), EPOCH)
            )  # bounds memory
            start = found.get(one.block, np.zeros_like(test.prior))
            found[one.block] = sum((test.steps(part).sum(axis=0) for part in parts), start=start)
        return found


def error_share(number: int) -> float:
    """Return the share of the error rates that a test has: .9 for k = 1, else .1/(k(k − 1)); all
    shares sum to 1.
    """
    return FIRST_WEIGHT if number == 1 else (1 - FIRST_WEIGHT) / (number * (number - 1))


def log_average(tests: Sequence[tuple[float, float]]) -> float:
    """Return the logarithm of the average of e-values (log weight, log E); the rest of the weight
    has E = 1.
    """
    logs = [log_weight + log_e for log_weight, log_e in tests]
    rest = 1 - math.fsum(math.exp(log_weight) for log_weight, _ in tests)
    return float(np.logaddexp.reduce([*logs, math.log(rest)]))


@dataclass(frozen=True, kw_only=True, order=True)
class Account:
    """The node, model, build and preset that one e-process runs over.

    Args:
        public_key: Key of the node.
        digest: SHA-256 of the tensors of the model.
        build: Build of the prover: a name that the validator gave, or the number format where it
            gave none.
        preset: Preset of the proofs.
    """

    __pydantic_config__: ClassVar = ConfigDict(
        strict=True, extra="forbid", revalidate_instances="always"
    )

    public_key: Name
    digest: Name
    build: Name
    preset: Name


@dataclass(frozen=True, kw_only=True)
class Update:
    """The result of one audit, to be added to a ledger; of a response, the nonces are its blocks of
    32 tokens.
    """

    account: Account
    round: str  # identity of the round, by `round_identity`; a nonce counts once in it
    block_hash: str
    noise: AnyNoise  # that the residuals are judged under, chosen without looking at them
    nonces: Sequence[int]  # those that were checked
    residuals: Sequence[
        float
    ]  # of each nonce, or distance of its sketch; NaN or an infinity for a missing value
    profiles: str | None = (
        None  # of the tokens of a response, by `ResponseBlocks.text`; None without tokens
    )
    proof: str | None = None  # SHA-256 of the proof; None for evidence that is no proof
    sample_seed: int | None = (
        None  # number that drew the nonces; None where they were not drawn by one
    )
    positions: Sequence[int] | None = (
        None  # index of each nonce in the node's own sequence; its number when None
    )
    batch_size: int | None = None  # that the node states
    name: str | None = (
        None  # a second update of this name changes nothing, so a sender may repeat it safely
    )


class Genesis(_Model):
    """The beginning of a ledger, whose hash its first entry names: when it was created, in seconds,
    and its rates.
    """

    kind: Literal["assay.poc.ledger"] = "assay.poc.ledger"
    version: Literal[1] = 1
    id: Annotated[str, Field(pattern=r"\A[0-9a-f]{32}\z")]  # random digits that tell ledgers apart
    created: Annotated[float, Field(ge=0)]
    alpha: Chance
    beta: Chance


class Entry(_Model):
    """One row of a ledger: its place, the fields of :class:`Update`, and the outcome."""

    seq: Annotated[int, Field(ge=1, le=MAX_NONCE)]
    previous: Hash
    time: Annotated[float, Field(ge=0)]
    name: Name | None
    account: Account
    round: Name
    block_hash: Text
    proof: Hash | None
    sample_seed: Annotated[int, Field(ge=0, le=LARGEST_SEED)] | None
    law: Hash
    nonces: Annotated[list[Count], Field(min_length=1, max_length=MOST_NONCES)]
    residuals: Annotated[list[float | None], Field(max_length=MOST_NONCES)]
    profiles: Annotated[str, Field(max_length=MOST_PROFILES)] | None
    positions: Annotated[list[Count], Field(max_length=MOST_NONCES)] | None = None
    batch_size: Annotated[int, Field(ge=1, le=MAX_NONCE)] | None = None
    excluded: Annotated[list[tuple[Count, Name]], Field(max_length=MOST_NONCES)]
    fault: Text | None
    outcome: Evidence

    @model_validator(mode="after")
    def _fits(self) -> Self:
        places = [place for place, _ in self.excluded]
        if len(self.residuals) != len(self.nonces):
            raise ValueError(f"{len(self.residuals)} residuals of {len(self.nonces)} nonces")
        if self.positions is not None and len(self.positions) != len(self.nonces):
            raise ValueError(f"{len(self.positions)} positions of {len(self.nonces)} nonces")
        if any(place >= len(self.nonces) for place in places) or places != sorted(set(places)):
            raise ValueError("excluded places that do not ascend or are not there")
        if self.of_response:
            ResponseBlocks.parse(self.residuals, self.profiles)
        elif self.profiles is not None:
            raise ValueError("profiles of tokens in an entry that is no response")
        return self

    @property
    def evidence(self) -> Evidence:
        """The outcome with the fault."""
        return self.outcome.model_copy(update={"faulty_places": self.fault})

    @property
    def of_response(self) -> bool:
        """Whether the nonces are blocks of a response."""
        return self.account.preset == RESPONSES

    @property
    def former(self) -> bool:
        """Whether the outcome follows the rule of an earlier release."""
        return self.outcome.share is None and not self.of_response

    def give(self, life: Life, noise: AnyNoise) -> Life:
        """Give a life the residuals that count, with their block and places."""
        out = {place for place, reason in self.excluded if reason != SUSPECTED}
        if self.of_response:
            return life.update(
                noise, ResponseBlocks.parse(self.residuals, self.profiles).without(out)
            )
        kept = [place for place in range(len(self.nonces)) if place not in out]
        values = [math.nan if (x := self.residuals[place]) is None else x for place in kept]
        positions = [(self.positions or self.nonces)[place] for place in kept]
        return life.update(
            noise, values, block=self.block_hash, positions=positions, batch_size=self.batch_size
        )


@dataclass(frozen=True, kw_only=True)
class Standing:
    """What a ledger says of an account."""

    account: Account
    evidence: Evidence  # after its last entry
    audits: int  # number of its entries
    recorded: int  # nonces in them, those that do not count included
    begun: float  # time of its first entry, in seconds
    last: float  # time of its last entry
    fault: (
        str | None
    )  # places of the batch at which the residuals of its last audits together are large

    @property
    def verdict(self) -> Decision:
        """Decision over the whole life."""
        return self.evidence.verdict

    def as_dict(self) -> dict[str, Any]:
        """Return JSON-ready values."""
        rest = {
            name: value for name, value in vars(self).items() if name not in ("account", "evidence")
        }
        return asdict(self.account) | dict(self.evidence) | rest


def round_identity(round: Round) -> str:
    """Return SHA-256 of block, preset, length and seed bits, in which equal nonces of a key are one
    computation.
    """
    values = vars(round.plain)
    return sha256(
        dumps({name: values[name] for name in ("block_hash", "preset", "seq_len", "strength")})
    )


def response_identity(seed_text: str) -> str:
    """Return SHA-256 of the seed text of a response, which replaces the round for its blocks."""
    return sha256(f"{RESPONSES}:{seed_text}")


def sha256(text: str) -> str:
    """Return the SHA-256 of a text in hexadecimal digits."""
    return hashlib.sha256(text.encode()).hexdigest()


def make_entry(update: Update, **added: Any) -> Entry:
    """Return the entry of an update, with what the ledger adds; a UsageError refuses what an entry
    may not hold.
    """
    nonces = [*map(int, update.nonces)]
    residuals = [float(x) if math.isfinite(x) else None for x in update.residuals]
    values = vars(update) | {"nonces": nonces, "residuals": residuals} | added
    if update.positions is not None:
        places = [*map(int, update.positions)]
        values["positions"] = None if places == nonces else places
    try:
        return Entry.model_validate({name: values[name] for name in Entry.model_fields})
    except ValidationError as error:
        fault = _malformed("an update", error)
        raise UsageError(
            fault.seen, wanted=fault.wanted, do="correct it before it is recorded"
        ) from None


def _malformed(source: str, error: ValidationError) -> DataError:
    fault = error.errors(include_url=False, include_input=False)[0]
    place = ".".join(str(part) for part in fault["loc"])
    wanted = "an entry as assay writes it"
    do = "ask for the file again, or make it anew"
    return DataError(f"{source}: {place or 'the whole'}: {fault['msg']:.200}", wanted=wanted, do=do)
