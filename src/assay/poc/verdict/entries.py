"""Entries of a ledger: each one line of canonical JSON with its hash and the one before it.

An entry has its place, the hash of the entry before it, the account, the evidence and the outcome.
Its own hash is the SHA-256 of the line.
"""

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    model_serializer,
    model_validator,
)

from assay.errors import DataError, UsageError
from assay.files.jsonl import check_colons, dumps
from assay.files.names import normal_form
from assay.poc.protocol.checks import MAX_NONCE
from assay.poc.protocol.round import Round
from assay.poc.verdict.pool_faults import STRIKES
from assay.poc.verdict.response_noise import AnyNoise, ResponseBlocks
from assay.stats.e_values import Outcome, decide

# Largest share of cheap nonces that is not excluded at which a life is called honest.
HONEST = 0.2
MOST_NONCES = 2**18  # of one entry
MOST_BLOCKS = 2**15  # of one response: 2**20 tokens
MOST_PROFILES = 2**25  # characters of the profiles of one response
LARGEST_SEED = 2**256
RESPONSES = "responses"  # the preset in an account of responses
# reason of a nonce that does not count, because the account has an entry of it in the same round
REPEATED = "repeated"
Text = Annotated[str, Field(max_length=1024)]
Name = Annotated[str, Field(min_length=1, max_length=1024)]
Hash = Annotated[str, Field(pattern=r"\A[0-9a-f]{64}\z")]
Count = Annotated[int, Field(ge=0, le=MAX_NONCE)]
Chance = Annotated[float, Field(gt=0, lt=1)]
# Fields that a line leaves out where they say nothing.
_OPTIONAL = {"positions", "batch_size", "log_e_held", "share", "credited", "strikes"}


class CanonicalModel(BaseModel):
    """A value with one canonical line of JSON, and the SHA-256 of it."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)

    @classmethod
    def parse(cls, text: str, source: str) -> Self:
        """Read canonical JSON; a DataError unless :attr:`line` would write it alike."""
        check_colons(text, source)
        try:
            # It forgives a key given twice, which the next line refuses.
            parsed = cls.model_validate_json(text)
        except ValidationError as error:
            raise malformed_entry(source, error) from None
        if parsed.line != text:
            raise DataError(
                f"{source}: not in the form in which it is written",
                wanted=f"{parsed.line:.60}…",
                do="ask for the file again, byte for byte",
            )
        return parsed

    @model_serializer(mode="wrap")
    def _without_optional(self, handler: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
        """Leave out optional fields where they say nothing."""
        return {
            name: value
            for name, value in handler(self).items()
            if value is not None or name not in _OPTIONAL
        }

    @property
    def line(self) -> str:
        """The canonical JSON."""
        return dumps(self.model_dump())

    @property
    def hash(self) -> str:
        """SHA-256 of the line."""
        return sha256(self.line)


class AccountEvidence(CanonicalModel):
    """The state of an account after an audit, with two counts of the ledger.

    Args:
        audits: Number of entries of the account, this one included; a life outside a ledger counts
            none.
        recorded: Number of nonces in them, those that do not count included.
        verdict: Outcome by :func:`verdict_on_life`; in an entry of before 0.4, an open fault did
            not enter it.
        n: Number of residuals that count.
        tests: Number of tests that have begun.
        log_e_value: Natural logarithm of the e-value: the weighted average over the tests.
        log_e_max: Logarithm of the largest e-value that one test had, times its weight: a
            suspicion.
        log_evidence_honest: Logarithm of the larger evidence for honesty of the last two tests,
            times their weights.
        log_e_held: Logarithm of the largest e-value, times its weight, that stood without any one
            block and without places that may be faulty; it decides fraud. It is 0 until there is a
            suspicion, and None for responses, as is the next one.
        share: Largest share of cheap nonces that was not excluded yet: 1 at first, and it only
            falls.
        credited: Number of residuals that count and stand at no place that their pool calls faulty;
            None where that is all of them, and in entries of before 0.4, as is the next one.
        strikes: Largest number of strikes that faulty pools had
            (:mod:`assay.poc.verdict.pool_faults`).
        faulty_places: Places of the batch at which residuals of several audits together are large,
            or on which an accusation rests; None without any. An entry has it beside its outcome.
    """

    audits: Count = 0
    recorded: Count = 0
    verdict: Outcome = "undecided"
    n: Count = 0
    tests: Count = 0
    log_e_value: float = 0.0
    log_e_max: float = 0.0
    log_evidence_honest: float = 0.0
    log_e_held: float | None = None
    share: float | None = None
    credited: Count | None = None
    strikes: Count | None = None
    faulty_places: Annotated[Text | None, Field(exclude=True)] = None


def verdict_on_life(evidence: AccountEvidence, *, alpha: float, beta: float) -> Outcome:
    """Return the verdict that follows from the numbers of a life.

    Evidence with an open fault and without ``credited`` is of before 0.4, when the fault did not
    enter the verdict.
    """
    if evidence.log_e_held is None or evidence.share is None:
        return decide(evidence.log_e_max, evidence.log_evidence_honest, alpha=alpha, beta=beta)
    if evidence.log_e_held >= -math.log(alpha) or (evidence.strikes or 0) >= STRIKES:
        return "fraud"
    if evidence.faulty_places is not None and evidence.credited is not None:
        return "faulty"
    return "honest" if evidence.share <= HONEST else "undecided"


def beside_fault(verdict: Outcome, fault: str | None) -> Outcome:
    """Return ``faulty`` in place of any verdict but fraud while a fault is open.

    Entries of before 0.4 have their verdict without it.
    """
    return "faulty" if fault is not None and verdict != "fraud" else verdict


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

    @property
    def normal(self) -> "Account":
        """The account with its names in the form in which a ledger has them."""
        return Account(**{name: normal_form(value) for name, value in vars(self).items()})


@dataclass(frozen=True, kw_only=True)
class LedgerUpdate:
    """The result of one audit for a ledger; a response's nonces are blocks of 32 tokens."""

    account: Account
    round: str  # identity of the round, by `round_identity`; a nonce counts once in it
    block_hash: str
    noise: AnyNoise  # that the residuals are judged under, chosen without looking at them
    nonces: Sequence[int]  # those that were checked
    # One for each nonce, or the distance of its sketch; NaN or infinite if a value is missing.
    residuals: Sequence[float]
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

    def __post_init__(self) -> None:
        # Two spellings of one name are one account; entries that are read stay as they are.
        object.__setattr__(self, "account", self.account.normal)


class Genesis(CanonicalModel):
    """The beginning of a ledger: its time and error rates; the first entry names its hash."""

    kind: Literal["assay.poc.ledger"] = "assay.poc.ledger"
    version: Literal[1] = 1
    id: Annotated[str, Field(pattern=r"\A[0-9a-f]{32}\z")]  # random digits that tell ledgers apart
    created: Annotated[float, Field(ge=0)]
    alpha: Chance
    beta: Chance


class Entry(CanonicalModel):
    """One row of a ledger: its place, the fields of :class:`LedgerUpdate`, and the outcome."""

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
    nonces: Annotated[list[Count], Field(fail_fast=True, min_length=1, max_length=MOST_NONCES)]
    residuals: Annotated[list[float | None], Field(fail_fast=True, max_length=MOST_NONCES)]
    profiles: Annotated[str, Field(max_length=MOST_PROFILES)] | None
    positions: Annotated[list[Count], Field(fail_fast=True, max_length=MOST_NONCES)] | None = None
    batch_size: Annotated[int, Field(ge=1, le=MAX_NONCE)] | None = None
    excluded: Annotated[list[tuple[Count, Name]], Field(fail_fast=True, max_length=MOST_NONCES)]
    fault: Text | None
    outcome: AccountEvidence

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
            if len(self.nonces) > MOST_BLOCKS:
                raise ValueError(f"a response of {len(self.nonces)} blocks")
            ResponseBlocks.parse(self.residuals, self.profiles)
        elif self.profiles is not None:
            raise ValueError("profiles of tokens in an entry that is no response")
        return self

    @property
    def evidence(self) -> AccountEvidence:
        """The outcome with the fault."""
        return self.outcome.model_copy(update={"faulty_places": self.fault})

    @property
    def verdict(self) -> Outcome:
        """Verdict on the life after this audit, which is never honest while a fault is open."""
        return beside_fault(self.outcome.verdict, self.fault)

    @property
    def of_response(self) -> bool:
        """Whether the nonces are blocks of a response."""
        return self.account.preset == RESPONSES


@dataclass(frozen=True, kw_only=True)
class Standing:
    """What a ledger says of an account."""

    account: Account
    evidence: AccountEvidence  # after its last entry
    audits: int  # number of its entries
    recorded: int  # nonces in them, those that do not count included
    begun: float  # time of its first entry, in seconds
    last: float  # time of its last entry
    # Places of the batch at which the residuals of its last audits together are large.
    fault: str | None

    @property
    def verdict(self) -> Outcome:
        """Verdict on the whole life, which is never honest while a fault is open."""
        return beside_fault(self.evidence.verdict, self.fault)

    @property
    def payable(self) -> float | None:
        """Share of the nonces to pay; None while undecided, where the network's rules say.

        Nothing is paid after fraud, nor while a fault is open. When it has ended, what stood at
        faulty places stays unpaid.
        """
        if self.verdict in ("fraud", "faulty"):
            return 0.0
        evidence = self.evidence
        credited = evidence.n if evidence.credited is None else evidence.credited
        return credited / evidence.n if self.verdict == "honest" and evidence.n else None

    def as_dict(self) -> dict[str, Any]:
        """Return JSON-ready values."""
        counts = {
            name: value for name, value in vars(self).items() if name not in ("account", "evidence")
        }
        verdict = {"verdict": self.verdict, "payable": self.payable}
        return asdict(self.account) | dict(self.evidence) | counts | verdict


def round_identity(round: Round) -> str:
    """Return the SHA-256 of block, preset, length and seed bits, which identify a round."""
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


def make_entry(update: LedgerUpdate, **added: Any) -> Entry:
    """Return the ledger entry of an update; a UsageError for invalid values."""
    nonces = [*map(int, update.nonces)]
    residuals = [float(x) if math.isfinite(x) else None for x in update.residuals]
    values = vars(update) | {"nonces": nonces, "residuals": residuals} | added
    if update.positions is not None:
        places = [*map(int, update.positions)]
        values["positions"] = None if places == nonces else places
    try:
        return Entry.model_validate({name: values[name] for name in Entry.model_fields})
    except ValidationError as error:
        fault = malformed_entry("an update", error)
        raise UsageError(
            fault.seen, wanted=fault.wanted, do="correct it before it is recorded"
        ) from None


def malformed_entry(source: str, error: ValidationError) -> DataError:
    """Return the error of a value that is no entry, which names the field."""
    fault = error.errors(include_url=False, include_input=False)[0]
    place = ".".join(str(part) for part in fault["loc"])
    return DataError(
        f"{source}: {place or 'the whole'}: {fault['msg']:.200}",
        wanted="an entry as assay writes it",
        do="ask for the file again, or make it anew",
    )
