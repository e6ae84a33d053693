"""The entries of a ledger, each with the hash of the one before it.

An entry is one line of canonical JSON. It holds its place, the hash of the entry before it, the account, the evidence
and the outcome. Its own hash is the SHA-256 of the line. So a change of an entry or of its place changes the hash of
every entry that follows.
"""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from assay import stats
from assay.errors import DataError, UsageError
from assay.files.jsonl import dumps
from assay.poc.protocol.round import MAX_NONCE, Round
from assay.poc.verdict.life import Evidence
from assay.poc.verdict.noise import AnyNoise, ResponseBlocks
from assay.stats.sequential import Verdict

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
        if self.of_response:
            return []
        chosen = (self.residuals[place] for place, reason in self.excluded if reason == SUSPECTED)
        return [math.nan if x is None else x for x in chosen]


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
        rest = {name: value for name, value in self.__dict__.items() if name not in ("account", "evidence")}
        return {**asdict(self.account), **asdict(self.evidence), **rest}


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
