"""Receipts: what a server states about the responses that it gave, as JSON Lines.

    {"kind":"assay.poc.receipts","schema":1,"public_key":…,"model":…,"fingerprint":…,"sketch":…}
    {"request_id":…,"chosen_by":…,"index":0,"user_seed":…,"block_hash":…,"sampling":…,"prompt":…,"output":[…],…}
    {"footer":{"receipts":200,"tokens":12800,"seconds":81.2,"sha256":"…"}}

The SHA-256 covers the bytes of the receipt lines, newlines included. Reading is as strict as that
of proofs, and a line is refused before it is parsed if it is longer, or has more parts, than any
receipt. docs/responses.md has the format.
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self, get_args

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, PlainValidator
from typing_extensions import override

from assay.errors import DataError, ModelError, UsageError
from assay.files.jsonl import dumps
from assay.files.reading import digest_file
from assay.files.references import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from assay.files.tensors import LONGEST_TENSORS, check_tensors
from assay.poc.protocol.checks import check_digest, check_name, check_number
from assay.poc.protocol.fingerprint import LARGEST_SIZE, Fingerprint
from assay.poc.protocol.header import ModelLine
from assay.poc.protocol.pipelines import SKETCH_EVERY, SKETCH_SIZE, sketch_steps
from assay.poc.protocol.records import decode_vector, encode_vector
from assay.poc.protocol.strict_file import (
    FOOTER,
    STRICT,
    LastLine,
    Seconds,
    StrictFile,
    format_error,
    line_error,
    parse_line,
    read_as,
)
from assay.poc.responses.sampling import (
    HIGHEST_TOKEN,
    ResponseName,
    ResponseSeed,
    Sampling,
    check_block_hash,
)

KIND = "assay.poc.receipts"
SCHEMA = 1
SKETCH = {"every": SKETCH_EVERY, "size": SKETCH_SIZE}

# Tokens of a prompt, and of an output: the positions that a proof may have.
MOST_TOKENS = 2**20

Chooser = Literal["client", "server"]
Finish = Literal["stop", "length", "abort"]
# Bytes of the longest line: prompt, output and sketches of the most tokens take 2**24 or less.
LONGEST_LINE = 2**25
# How often a character may be in a line.
MOST_PARTS = {b",": 2 * MOST_TOKENS + 2**16, b"[": 2**13, b"{": 2**13}
MOST_RECEIPTS = 2**20
# Tokens of all prompts and outputs of a file: what a reader has to have room for.
MOST_FILE_TOKENS = 2**24


# A list of token ids, of which the first wrong one is named; check_ids() checks their ranges.
Ids = Annotated[tuple[int, ...], Field(fail_fast=True)]


@dataclass(frozen=True)
class Adapter:
    """What a receipt says of an adapter.

    Raises:
        UsageError: A value is out of range.
    """

    name: str  # name under which requests ask for it
    digest: str  # :func:`digest_adapter` of its files

    def __post_init__(self) -> None:
        check_name("the name of the adapter", self.name, do="pass the name that requests ask for")
        check_digest("digest of the adapter", self.digest)


def digest_adapter(path: str | Path) -> str:
    """Return the SHA-256 of the hashes of an adapter's configuration and weights, in hex.

    Raises:
        ModelError: A file is missing or cannot be read.
    """
    try:
        check_tensors(Path(path) / ADAPTER_WEIGHTS, LONGEST_TENSORS)
        parts = [digest_file(Path(path) / name) for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS)]
    except (OSError, DataError) as error:
        reason = error.seen if isinstance(error, DataError) else error.strerror
        raise ModelError(
            f"no adapter in {path}: {reason}",
            wanted=f"a directory with {ADAPTER_CONFIG} and {ADAPTER_WEIGHTS}",
            do="pass the directory of a LoRA adapter",
        ) from None
    return hashlib.sha256(b"".join(parts)).hexdigest()


@dataclass(frozen=True)
class Prompt:
    """The prompt of a response: its token ids, or only what identifies them.

    Two prompts are equal if their hashes are, whether or not the ids are there. Make one with
    :meth:`of`.

    Args:
        sha256: SHA-256 of the ids as little-endian uint32; that of the ids where they are given.
        tokens: Number of the ids, likewise.
        ids: Token ids; None where the client keeps them.

    Raises:
        UsageError: A value is out of range.
    """

    sha256: str = ""
    tokens: int = 0
    ids: Ids | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        if self.ids is not None:
            ids = check_ids("the prompt", self.ids, fewest=1)
            sha256 = hashlib.sha256(np.array(ids, dtype="<u4").tobytes()).hexdigest()
            for name, value in {"sha256": sha256, "tokens": len(ids), "ids": ids}.items():
                object.__setattr__(self, name, value)
        check_digest("sha256", self.sha256)
        check_number("the number of tokens of the prompt", self.tokens, 1, MOST_TOKENS)

    @classmethod
    def of(cls, ids: Sequence[int]) -> "Prompt":
        """Return the prompt of these token ids."""
        return cls(ids=tuple(ids))


def _read_sketches(encoded: Any) -> NDArray[np.float16]:
    if not isinstance(encoded, list):
        raise format_error(f"sketches of {type(encoded).__name__}", "a list")
    return np.array([decode_vector(sketch, SKETCH_SIZE) for sketch in encoded], dtype=np.float16)


@dataclass(frozen=True, kw_only=True, eq=False)
class Receipt(ResponseName):
    """What a server states about one response.

    Args:
        user_seed, request_id, index: As of :class:`ResponseName`.
        block_hash: Beacon that became known after the request was accepted.
        prompt: Prompt, with or without its ids.
        output: Ids of the tokens of the response, in order, with the one that ended it.
        sketches: Sketches [S, 12] in float16, of every 32nd token from the first; empty where the
            engine has none.
        sampling: Parameters of the seeded sampling; None where the engine sampled by itself.
        chosen_by: Who chose the request id, ``client`` or ``server``, which can try many.
        finish: What ended the response: ``stop``, ``length`` or ``abort``.
        mask: Whether a grammar, or a list of allowed tokens, forbade tokens.
        adapter: LoRA adapter that answered; None where the model did by itself.
        chat_template: SHA-256 of the template that made the prompt; None if unknown or unused.

    Raises:
        UsageError: A value is out of range; names it.
    """

    __pydantic_config__: ClassVar = STRICT

    block_hash: str
    prompt: Prompt
    output: Ids
    sketches: Annotated[NDArray[np.float16], PlainValidator(_read_sketches)]
    sampling: Sampling | None
    chosen_by: Chooser = "server"
    finish: Finish = "stop"
    mask: bool = False
    adapter: Adapter | None = None
    chat_template: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_block_hash(self.block_hash)
        check_word("chosen_by", self.chosen_by, Chooser)
        check_word("finish", self.finish, Finish)
        check_word("mask", self.mask, Literal[True, False])
        if self.chat_template is not None:
            check_digest("chat_template", self.chat_template)
        object.__setattr__(self, "output", check_ids("the output", self.output, fewest=0))
        sketches = np.asarray(self.sketches, dtype=np.float16)
        expected_shape = (len(sketch_steps(len(self.output))), SKETCH_SIZE)
        if sketches.size == 0:
            sketches = sketches.reshape(0, SKETCH_SIZE)
        elif sketches.shape != expected_shape or not np.isfinite(sketches).all():
            raise UsageError(
                f"sketches for {len(self.output)} tokens, of shape {sketches.shape}",
                wanted=f"finite numbers of shape {expected_shape}, or no sketches",
                do=f"sketch the state of every {SKETCH_EVERY}nd token, from the first",
            )
        object.__setattr__(self, "sketches", sketches)

    @property
    def seeded(self) -> bool:
        """Whether a replay can measure its tokens: sampled with a seed, and without a mask."""
        return self.sampling is not None and not self.mask

    def without_prompt(self) -> "Receipt":
        """Return the receipt with the hash of the prompt in place of its ids."""
        return replace(self, prompt=replace(self.prompt, ids=None))

    def line(self) -> str:
        """Return the canonical line of the file, without its newline."""
        prompt = self.prompt
        return dumps(
            {
                "request_id": self.request_id,
                "chosen_by": self.chosen_by,
                "index": self.index,
                "user_seed": self.user_seed,
                "block_hash": self.block_hash,
                "sampling": self.sampling and self.sampling.as_dict(),
                "prompt": {"sha256": prompt.sha256, "tokens": prompt.tokens}
                if prompt.ids is None
                else {"ids": prompt.ids},
                "output": self.output,
                "finish": self.finish,
                "mask": self.mask,
                **({"adapter": asdict(self.adapter)} if self.adapter is not None else {}),
                **({"chat_template": self.chat_template} if self.chat_template is not None else {}),
                "sketches": [encode_vector(sketch) for sketch in self.sketches],
            }
        )


@dataclass(frozen=True, kw_only=True)
class ReceiptHeader:
    """First line of a file of receipts: the node, the model and the engine.

    Args:
        public_key: Key of the node.
        reference: Reference of the model, as the node names it.
        digest: SHA-256 of the tensors of the checkpoint.
        weights: Weight mode of the model: trained, random-all or random-embed.
        fingerprint: Description of the engine; ``seq_len`` is the number of positions that it was
            made for.
        sketched: Whether the receipts have sketches.

    Raises:
        UsageError: A value is out of range; names it.
    """

    public_key: str
    reference: str
    digest: str
    weights: str
    fingerprint: Fingerprint
    sketched: bool = True

    def __post_init__(self) -> None:
        check_name("public_key", self.public_key, do="pass the public key as the chain prints it")
        check_name("the model's reference", self.reference, do="pass the reference of the model")
        check_digest("digest", self.digest)
        check_name("weights", self.weights, do="pass the weight mode of the model")

    def seed(self, response: ResponseName, block_hash: str = "") -> ResponseSeed:
        """Return the seed of a response, by its receipt, or by its request and a block."""
        names = {name: getattr(response, name) for name in ("user_seed", "request_id", "index")}
        block = block_hash or getattr(response, "block_hash", "")
        return ResponseSeed(
            **names, public_key=self.public_key, digest=self.digest, block_hash=block
        )

    def line(self) -> str:
        """Return the canonical line of the file, without its newline."""
        return dumps(
            {
                "kind": KIND,
                "schema": SCHEMA,
                "public_key": self.public_key,
                "model": {
                    "reference": self.reference,
                    "digest": self.digest,
                    "weights": self.weights,
                },
                "fingerprint": self.fingerprint.as_dict(),
                "sketch": SKETCH if self.sketched else None,
            }
        )


@dataclass(frozen=True, kw_only=True)
class ReceiptFooter(LastLine):
    """Last line of a file of receipts.

    Args:
        receipts: Number of the receipts.
        tokens: Number of the tokens of all outputs.
        seconds: Time that the responses took; of a file that was interrupted and continued, that of
            the last run alone.
        sha256: SHA-256 of the receipt lines, newlines included.
    """

    __pydantic_config__: ClassVar = STRICT

    receipts: int
    tokens: int
    seconds: Seconds
    sha256: str


def check_ids(name: str, ids: Iterable[int], *, fewest: int) -> tuple[int, ...]:
    """Return token ids as a tuple of ints; a UsageError names a count or id out of range."""
    listed: tuple[Any, ...] = tuple(ids)  # what a caller passes may be of numpy, or of a file
    # Mostly all are plain integers: then none is looked at by itself.
    plain = not set(map(type, listed)) - {int}
    if not plain:
        listed = tuple(int(token) if isinstance(token, np.integer) else token for token in listed)
    if not fewest <= len(listed) <= MOST_TOKENS:
        raise UsageError(
            f"{name} of {len(listed)} tokens",
            wanted=f"{fewest} to {MOST_TOKENS}",
            do=f"give {name} in token ids",
        )
    if not plain or not 0 <= min(listed, default=0) <= max(listed, default=0) <= HIGHEST_TOKEN:
        for token in listed:
            check_number(f"a token of {name}", token, 0, HIGHEST_TOKEN)
    return listed


def check_word(name: str, value: object, words: Any) -> None:
    """Refuse a value that is not a word of a ``Literal``; the UsageError names both."""
    choices = get_args(words)
    if type(value) is not type(choices[0]) or value not in choices:
        raise UsageError(
            f"{name} is {value!r:.60}", wanted=" or ".join(map(str, choices)), do=f"correct {name}"
        )


@dataclass(frozen=True, eq=False)
class Receipts(StrictFile):
    """A complete file of receipts."""

    header: ReceiptHeader
    receipts: tuple[Receipt, ...]
    footer: ReceiptFooter

    @classmethod
    def build(cls, header: ReceiptHeader, receipts: Sequence[Receipt], seconds: float) -> Self:
        """Return a complete file of these receipts, with the footer that follows from them.

        Raises:
            UsageError: Two receipts are of one response, or there are too many.
        """
        tally = Tally(header)
        for receipt in receipts:
            tally.add(receipt, receipt.line())
        return cls(header, tuple(receipts), tally.footer(seconds))

    @override
    def lines(self) -> list[str]:
        return [
            self.header.line(),
            *(receipt.line() for receipt in self.receipts),
            self.footer.line(),
        ]

    @override
    @classmethod
    def _read(cls, path: str | Path, lines: Iterator[tuple[int, bytes]]) -> Self:
        number, line = next(lines, (1, b""))
        header = parse_header(line, source=path, number=number)
        receipts: list[Receipt] = []
        tally = Tally(header)
        for number, line in lines:
            if line.startswith(FOOTER):
                footer = ReceiptFooter.read_end(path, number, line, lines, tally.footer)
                return cls(header, tuple(receipts), footer)
            receipts.append(parse_receipt(line, source=path, number=number))
            try:
                tally.add(receipts[-1], line[:-1].decode())
            except UsageError as error:
                raise line_error(path, number, error.seen, error.wanted) from None
        raise line_error(path, number + 1, "the end of the file", "a footer: the file is truncated")


class Tally:
    """The footer of a file of receipts, while it grows."""

    def __init__(self, header: ReceiptHeader) -> None:
        self._header = header
        self._seen: set[tuple[object, str]] = set()
        self._tokens = 0
        self._room = MOST_FILE_TOKENS
        self._digest = hashlib.sha256()

    def add(self, receipt: Receipt, line: str) -> None:
        """Count a receipt; a UsageError for a second one, a wrong model, or too many."""
        # What sets its seed apart from others of this node and model.
        seeded = (receipt.name, receipt.block_hash)
        if seeded in self._seen:
            raise UsageError(
                f"a second receipt of request {receipt.request_id!r:.80}, index {receipt.index}",
                wanted="one receipt for each response",
                do="leave one of them out",
            )
        sketched = len(sketch_steps(len(receipt.output))) if self._header.sketched else 0
        if len(receipt.sketches) != sketched:
            raise UsageError(
                f"{len(receipt.sketches)} sketches for {len(receipt.output)} tokens",
                wanted=f"{sketched}, as the header says",
                do="write receipts with and without sketches into files of their own",
            )
        self._room -= len(receipt.output) + (
            receipt.prompt.tokens if receipt.prompt.ids is not None else 0
        )
        if self._room < 0 or len(self._seen) == MOST_RECEIPTS:
            raise UsageError(
                "too many receipts in one file",
                wanted=f"at most {MOST_RECEIPTS} receipts and {MOST_FILE_TOKENS} tokens",
                do="write several files",
            )
        self._seen.add(seeded)
        self._tokens += len(receipt.output)
        self._digest.update(line.encode() + b"\n")

    def footer(self, seconds: float) -> ReceiptFooter:
        """Return the footer of what was counted in so many seconds."""
        return ReceiptFooter(
            receipts=len(self._seen),
            tokens=self._tokens,
            seconds=seconds,
            sha256=self._digest.hexdigest(),
        )


def parse_receipt(line: bytes, *, source: str | Path = "receipt", number: int = 1) -> Receipt:
    """Read one receipt line; a ProofFormatError names the source and the line."""
    return parse_line(
        source,
        number,
        line,
        lambda line: read_as(Receipt, line),
        Receipt.line,
        MOST_PARTS,
        LONGEST_LINE,
    )


def parse_header(line: bytes, *, source: str | Path = "receipts", number: int = 1) -> ReceiptHeader:
    """Read the header line of a file of receipts, as :func:`parse_receipt` reads a line."""
    return parse_line(
        source, number, line, _read_header, ReceiptHeader.line, MOST_PARTS, LONGEST_LINE
    )


@dataclass(frozen=True, kw_only=True)
class _ReceiptHeaderLine:
    __pydantic_config__: ClassVar = STRICT

    kind: Literal["assay.poc.receipts"]
    schema: Literal[1]
    public_key: str
    model: ModelLine
    fingerprint: Fingerprint
    sketch: dict[str, int] | None


def _read_header(line: bytes) -> ReceiptHeader:
    read = read_as(_ReceiptHeaderLine, line)
    for name in ("batch_size", "seq_len"):
        check_number(name, getattr(read.fingerprint, name), 1, LARGEST_SIZE)
    if read.sketch not in (None, SKETCH):
        raise format_error(f"sketch is {read.sketch!r:.60}", f"{dumps(SKETCH)} or null")
    return ReceiptHeader(
        public_key=read.public_key,
        **vars(read.model),
        fingerprint=read.fingerprint,
        sketched=read.sketch is not None,
    )
