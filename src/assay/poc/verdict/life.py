"""The evidence of a node's whole life, under however many laws its residuals were judged.

A life is a sequence of tests k = 1, 2, … with e-values E_k and weights w_k, Σ w_k = 1. Test k convicts when
E_k ≥ 1/(alpha · w_k), which happens to an honest node with chance alpha · w_k at most (Ville 1939). So the whole life
convicts with chance alpha at most, however its tests depend on each other. Evidence for honesty is bounded by beta in
the same way. It is that of the last two tests, because what a node did long ago does not show that it is honest now.

A new calibration begins a test of its own, because an e-value multiplies likelihoods of one law only. The scale of a
machine is the same under both laws, so their e-values are not independent and must not be multiplied. After every
`EPOCH` nonces another test begins from nothing. It catches a node that was honest for long and then cheats; the first
test would first have to make up for everything that spoke for the node.

A ledger keeps a life on disk as entries, each one line of canonical JSON with its place, the hash of the entry before
it, the account, the evidence and the outcome. Its own hash is the SHA-256 of the line. So a change of an entry or of
its place changes the hash of every entry that follows.
"""

import copy
import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any, ClassVar, Literal, Self

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from assay import stats
from assay.errors import DataError, UsageError
from assay.files.jsonl import dumps
from assay.poc.protocol.round import MAX_NONCE, Round
from assay.poc.verdict.noise import AnyNoise, ResponseBlocks, ResponseNoise, ResponseTest, sequential_test
from assay.stats.sequential import Verdict, decide

Residuals = Sequence[float] | npt.NDArray[np.float64] | ResponseBlocks

EPOCH = 1024
"""Number of counted nonces after which the next audit begins another test."""

FIRST_WEIGHT = 0.9
"""Share of the error rates that the first test has."""

_LARGEST = 1e9  # largest logarithm that is written, because JSON has no infinity


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What a life says after its last residual.

    Args:
        verdict: Verdict by :func:`assay.stats.sequential.decide`.
        n: Number of residuals that count.
        tests: Number of tests that have begun.
        log_e_value: Natural logarithm of the e-value: the weighted average over the tests.
        log_e_max: Logarithm of the largest e-value that one test had, times its weight; it decides fraud.
        log_evidence_honest: Logarithm of the larger evidence for honesty of the last two tests, times their weights.
    """

    verdict: Verdict = "undecided"
    n: int = 0
    tests: int = 0
    log_e_value: float = 0.0
    log_e_max: float = 0.0
    log_evidence_honest: float = 0.0


class Life:
    """The evidence of one account: feed it the residuals of audits as they come, read it at any time.

    Args:
        alpha: Bound on the chance that an honest node is ever accused, in its whole life.
        beta: Bound on the chance that a node that cheats is ever called honest while it does.

    Raises:
        UsageError: A rate is not in (0, 1), when the first residuals come.

    Example:
        >>> from assay.poc.verdict.noise import Noise, read_law
        >>> from assay.poc.verdict import Life
        >>> noise = Noise(read_law({"kind": "log", "mu": -3.7, "sd": 0.7}), "an example")
        >>> life = Life(alpha=1e-3, beta=1e-2)
        >>> life.update(noise, [noise.size] * 60).evidence.verdict
        'honest'
        >>> life.update(noise, [1.0] * 60).evidence.verdict
        'fraud'
    """

    def __init__(self, *, alpha: float, beta: float) -> None:
        self.alpha, self.beta = alpha, beta
        self.tests: list[LifeTest] = []
        self._first: dict[str, LifeTest] = {}
        self._epochs: dict[str, LifeTest] = {}
        self._n = 0

    def update(self, noise: AnyNoise, residuals: Residuals, *, doubted: Sequence[float] = ()) -> Self:
        """Take the residuals of one audit, in the order in which they were checked; NaN for a missing value.

        Args:
            noise: Honest noise that they are judged under, chosen without looking at them.
            residuals: Residuals that count, of nonces that did not count before; or the evidence of one response.
            doubted: Further residuals, of nonces at places that may be faulty. They do not accuse, but the evidence for
                honesty is that of all residuals together.
        """
        if not (len(residuals) or doubted):
            return self
        law = dumps(noise.as_dict())
        newest = self._epochs.get(law) or self._first.get(law)
        if newest is None:
            self._first[law] = self._begin(noise)
        elif newest.n >= EPOCH:
            self._epochs[law] = self._begin(noise)
        for test in (self._first[law], self._epochs.get(law)):
            if test is not None:
                test.update(residuals, doubted)
        self._n += len(residuals)
        return self

    def _begin(self, noise: AnyNoise) -> "LifeTest":
        weight = error_share(len(self.tests) + 1)
        rates = {"alpha": self.alpha * weight, "beta": self.beta * weight}
        if isinstance(noise, ResponseNoise):
            test: ResponseTest | stats.SequentialTest = ResponseTest(noise, **rates)
        else:
            test = sequential_test(noise, **rates)
        self.tests.append(LifeTest(test, math.log(weight)))
        return self.tests[-1]

    @property
    def evidence(self) -> Evidence:
        """The evidence, and the verdict that follows from it."""
        log_e_max = max([0.0, *(test.log_weight + test.log_e_max for test in self.tests)])
        honest = max([test.log_weight + test.log_honest for test in self.tests[-2:]], default=0.0)
        return Evidence(
            verdict=decide(log_e_max, honest, alpha=self.alpha, beta=self.beta),
            n=self._n,
            tests=len(self.tests),
            log_e_value=log_average([(test.log_weight, test.log_e) for test in self.tests]),
            log_e_max=log_e_max,
            log_evidence_honest=honest,
        )


@dataclass
class LifeTest:
    """A test of a life, the logarithm of its share of the error rates, and its numbers after the last residual."""

    test: stats.SequentialTest | ResponseTest
    log_weight: float
    log_e: float = 0.0
    log_e_max: float = 0.0
    log_honest: float = 0.0
    n: int = 0
    _of_all: stats.SequentialTest | None = field(default=None, repr=False)
    """The test of doubted residuals too, from the first of them on."""

    def update(self, residuals: Residuals, doubted: Sequence[float]) -> None:
        """Take the residuals of one audit, which must be of responses where the law is."""
        if isinstance(self.test, ResponseTest) != isinstance(residuals, ResponseBlocks):
            raise DataError(
                "residuals of another kind than the law that they are judged under",
                wanted="responses under a law of responses, and nonces under one of nonces",
                do="ask for the file again",
            )
        if doubted and self._of_all is None and isinstance(self.test, stats.SequentialTest):
            self._of_all = copy.deepcopy(self.test)
        result = self.test.update(residuals).result  # type: ignore[arg-type]  # of this kind, by the line above
        honest = result.log_evidence_honest
        if self._of_all is not None:
            honest = self._of_all.update(residuals).update(doubted).result.log_evidence_honest  # type: ignore[arg-type]
        numbers = (result.log_e_value, result.log_e_max, honest)
        self.log_e, self.log_e_max, self.log_honest = (max(-_LARGEST, min(_LARGEST, number)) for number in numbers)
        self.n = result.n


def error_share(number: int) -> float:
    """Return the share of the error rates that a test has: .9 for k = 1, else .1/(k(k − 1)); all shares sum to 1."""
    return FIRST_WEIGHT if number == 1 else (1 - FIRST_WEIGHT) / (number * (number - 1))


def log_average(tests: Sequence[tuple[float, float]]) -> float:
    """Return the logarithm of the average of e-values (log weight, log E); the rest of the weight has E = 1."""
    logs = [log_weight + log_e for log_weight, log_e in tests]
    rest = 1 - math.fsum(math.exp(log_weight) for log_weight, _ in tests)
    return float(np.logaddexp.reduce([*logs, math.log(rest)]))


REPEATED = "repeated"
"""Reason of a nonce that does not count, because the account has an entry of it in the same round."""

FAULTY = "faulty place"
"""Reason of a nonce that does not count, because it stands at a place of the batch where residuals are large."""

SUSPECTED = "suspected place"
"""Reason of a nonce that counts only against honesty: its place may be faulty, and too few were checked to show it."""

MOST_NONCES = 2**18  # of one entry
MOST_PROFILES = 2**25  # characters of the profiles of one response
LARGEST_SEED = 2**256
RESPONSES = "responses"
"""The preset in an account of responses."""

Text = Annotated[str, Field(max_length=1024)]
Name = Annotated[str, Field(min_length=1, max_length=1024)]
Hash = Annotated[str, Field(pattern=r"\A[0-9a-f]{64}\z")]
Count = Annotated[int, Field(ge=0, le=MAX_NONCE)]
Chance = Annotated[float, Field(gt=0, lt=1)]


@dataclass(frozen=True, kw_only=True, order=True)
class Account:
    """The node, model, build and preset that one e-process runs over.

    Args:
        public_key: Key of the node.
        digest: SHA-256 of the tensors of the model.
        build: Build of the prover: a name that the validator gave, or the number format where it gave none.
        preset: Preset of the proofs.
    """

    __pydantic_config__: ClassVar = ConfigDict(strict=True, extra="forbid", revalidate_instances="always")

    public_key: Name
    digest: Name
    build: Name
    preset: Name


@dataclass(frozen=True, kw_only=True)
class Update:
    """The result of one audit, to be added to a ledger.

    Args:
        account: Account of the node.
        round: Identity of the round, by :func:`round_identity`; a nonce counts once in it.
        block_hash: Block of the round.
        noise: Honest noise that the residuals are judged under, chosen without looking at them.
        nonces: Nonces that were checked; the blocks of 32 tokens of a response.
        residuals: Residual of each nonce, NaN or an infinity for a missing value; the distances of the sketches of a
            response.
        profiles: Profiles of the tokens of a response, by :attr:`ResponseBlocks.text`; None without tokens.
        proof: SHA-256 of the proof; None for evidence that is no proof.
        sample_seed: Number that drew the nonces; None where they were not drawn by one.
        excluded: Reasons why nonces must not count, by nonce.
        fault: Pattern of a fault that the audit found; None without one.
        name: Name of the update. A second update of that name changes nothing, so a sender may repeat it safely.
    """

    account: Account
    round: str
    block_hash: str
    noise: AnyNoise
    nonces: Sequence[int]
    residuals: Sequence[float]
    profiles: str | None = None
    proof: str | None = None
    sample_seed: int | None = None
    excluded: Mapping[int, str] = field(default_factory=dict)
    fault: str | None = None
    name: str | None = None


class _Model(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)

    @classmethod
    def parse(cls, text: str, source: str) -> Self:
        """Read canonical JSON.

        Raises:
            DataError: It is not JSON, not of this form, or written in another way than :meth:`line` writes.
        """
        try:
            made = cls.model_validate_json(text)  # it forgives a key given twice, which the next line refuses
        except ValidationError as error:
            raise _malformed(source, error) from None
        if made.line != text:
            seen = f"{source}: not in the form in which it is written"
            raise DataError(seen, wanted=f"{made.line:.60}…", do="ask for the file again, byte for byte")
        return made

    @property
    def line(self) -> str:
        """The canonical JSON."""
        return dumps(self.model_dump())

    @property
    def hash(self) -> str:
        """SHA-256 of the line."""
        return sha256(self.line)


class Genesis(_Model):
    """The beginning of a ledger, whose hash its first entry names.

    Args:
        kind: Kind of file.
        version: Version of the form.
        id: Random digits that tell ledgers apart.
        created: Time at which the ledger was begun, in seconds.
        alpha: Bound on the chance that an honest node is ever accused.
        beta: Bound on the chance that a cheater is called honest.
    """

    kind: Literal["assay.poc.ledger"] = "assay.poc.ledger"
    version: Literal[1] = 1
    id: Annotated[str, Field(pattern=r"\A[0-9a-f]{32}\z")]
    created: Annotated[float, Field(ge=0)]
    alpha: Chance
    beta: Chance


class EntryOutcome(_Model):
    """The state of the account after an entry: the fields of :class:`Evidence`, with two counts.

    Args:
        audits: Number of entries of the account, this one included.
        recorded: Number of nonces in them, those that do not count included.
    """

    audits: Count
    recorded: Count
    verdict: Literal["honest", "fraud", "undecided"]
    n: Count
    tests: Count
    log_e_value: float
    log_e_max: float
    log_evidence_honest: float


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
    excluded: Annotated[list[tuple[Count, Name]], Field(max_length=MOST_NONCES)]
    fault: Text | None
    outcome: EntryOutcome

    @model_validator(mode="after")
    def _fits(self) -> Self:
        places = [place for place, _ in self.excluded]
        if len(self.residuals) != len(self.nonces):
            raise ValueError(f"{len(self.residuals)} residuals of {len(self.nonces)} nonces")
        if any(place >= len(self.nonces) for place in places) or places != sorted(set(places)):
            raise ValueError("excluded places that do not ascend or are not there")
        if self.of_response:
            ResponseBlocks.parse(self.residuals, self.profiles)
        elif self.profiles is not None:
            raise ValueError("profiles of tokens in an entry that is no response")
        return self

    @property
    def evidence(self) -> Evidence:
        """The outcome."""
        return Evidence(**self.outcome.model_dump(exclude={"audits", "recorded"}))

    @property
    def of_response(self) -> bool:
        """Whether the nonces are blocks of a response."""
        return self.account.preset == RESPONSES

    @property
    def counted(self) -> list[float] | ResponseBlocks:
        """Residuals that count, NaN for missing ones; or the blocks of a response that count."""
        out = dict(self.excluded)
        if self.of_response:
            return ResponseBlocks.parse(self.residuals, self.profiles).without(out)
        return [math.nan if x is None else x for place, x in enumerate(self.residuals) if place not in out]

    @property
    def doubted(self) -> list[float]:
        """Residuals at suspected places, NaN for missing ones. They do not accuse, but count against honesty.

        Otherwise a node that cheats at half of its places would be judged by the other half alone, as long as each
        audit checks too few nonces to show a fault.
        """
        chosen = [self.residuals[place] for place, reason in self.excluded if reason == SUSPECTED]
        return [] if self.of_response else [math.nan if x is None else x for x in chosen]


@dataclass(frozen=True, kw_only=True)
class Standing:
    """What a ledger says of an account.

    Args:
        account: Account.
        evidence: Evidence after its last entry.
        audits: Number of its entries.
        recorded: Number of nonces in them, those that do not count included.
        begun: Time of its first entry, in seconds.
        last: Time of its last entry, in seconds.
        fault: Pattern of a fault of the place that one of the last audits found; None without one, or after a later
            audit of as many nonces that found none.
    """

    account: Account
    evidence: Evidence
    audits: int
    recorded: int
    begun: float
    last: float
    fault: str | None

    @property
    def verdict(self) -> Verdict:
        """Verdict over the whole life."""
        return self.evidence.verdict

    def as_dict(self) -> dict[str, Any]:
        """Return JSON-ready values."""
        rest = {name: value for name, value in vars(self).items() if name not in ("account", "evidence")}
        return asdict(self.account) | asdict(self.evidence) | rest


def round_identity(round: Round) -> str:
    """Return SHA-256 of block, preset, length and seed bits, in which equal nonces of a key are one computation."""
    names = ("block_hash", "preset", "seq_len", "strength")
    return sha256(dumps({name: getattr(round, name) for name in names}))


def response_identity(seed_text: str) -> str:
    """Return SHA-256 of the seed text of a response, which replaces the round for its blocks."""
    return sha256(f"{RESPONSES}:{seed_text}")


def sha256(text: str) -> str:
    """Return the SHA-256 of a text in hexadecimal digits."""
    return hashlib.sha256(text.encode()).hexdigest()


def name_reasons(nonces: Sequence[int], places: stats.PlaceTest) -> dict[int, str]:
    """Return why nonces, in the order of a place test, do not count that the test sets aside; by nonce."""
    reason = FAULTY if places.faulty else SUSPECTED
    return {nonce: reason for nonce, aside in zip(nonces, places.set_aside, strict=True) if aside}


def make_entry(update: Update, **added: Any) -> Entry:
    """Return the entry of an update, with the fields that the ledger adds or changes.

    Raises:
        UsageError: A value of the update is not what an entry may hold.
    """
    nonces, residuals = [*map(int, update.nonces)], [float(x) if math.isfinite(x) else None for x in update.residuals]
    values = vars(update) | {"nonces": nonces, "residuals": residuals} | added
    try:
        return Entry.model_validate({name: values[name] for name in Entry.model_fields})
    except ValidationError as error:
        fault = _malformed("an update", error)
        raise UsageError(fault.seen, wanted=fault.wanted, do="correct it before it is recorded") from None


def _malformed(source: str, error: ValidationError) -> DataError:
    fault = error.errors(include_url=False, include_input=False)[0]
    place = ".".join(str(part) for part in fault["loc"])
    return DataError(
        f"{source}: {place or 'the whole'}: {fault['msg']:.200}",
        wanted="an entry as assay writes it",
        do="ask for the file again, or make it anew",
    )
