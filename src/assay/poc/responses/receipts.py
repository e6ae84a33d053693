"""Receipts: what a server states about the responses that it gave, as JSON Lines.

    {"kind":"assay.poc.receipts","schema":1,"public_key":…,"model":…,"fingerprint":…,"sketch":…}
    {"request_id":…,"chosen_by":…,"index":0,"user_seed":…,"block_hash":…,"sampling":…,"prompt":…,"output":[…],…}
    {"footer":{"receipts":200,"tokens":12800,"seconds":81.2,"sha256":"…"}}

The SHA-256 covers the bytes of the receipt lines, newlines included. Reading is as strict as that of proofs, and a line
is refused before it is parsed if it is longer, or has more parts, than any receipt. docs/responses.md has the format.
"""

import copy
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

import numpy as np
from numpy.typing import NDArray
from typing_extensions import override

from assay.errors import UsageError
from assay.files.jsonl import dumps
from assay.files.storage import write_lines
from assay.poc.protocol.pipelines import SKETCH_EVERY, SKETCH_SIZE, sketch_steps
from assay.poc.protocol.proof import parse_model
from assay.poc.protocol.record import (
    Fingerprint,
    StrictFile,
    check_fields,
    decode_vector,
    encode_vector,
    format_error,
    line_error,
    parse_footer,
    parse_line,
)
from assay.poc.protocol.round import check_name, check_number
from assay.poc.responses.adapters import Adapter
from assay.poc.responses.sampling import (
    HIGHEST_INDEX,
    HIGHEST_TOKEN,
    RANGES,
    ResponseSeed,
    Sampling,
    check_block_hash,
    check_digest,
    check_request_texts,
    parse_biases,
)

KIND = "assay.poc.receipts"
SCHEMA = 1
SKETCH = {"every": SKETCH_EVERY, "size": SKETCH_SIZE}

MOST_TOKENS = 2**20
"""Tokens of a prompt, and of an output: the positions that a proof may have."""

CHOOSERS = ("client", "server")
FINISHES = ("stop", "length", "abort")


@dataclass(frozen=True)
class Prompt:
    """The prompt of a response: its token ids, or only what identifies them.

    Two prompts are equal if their hashes are, whether or not the ids are there. Make one with :meth:`of`.

    Args:
        sha256: SHA-256 of the ids as little-endian uint32.
        tokens: Number of the ids.
        ids: Token ids; None where the client keeps them.

    Raises:
        UsageError: A value is out of range.
    """

    sha256: str
    tokens: int
    ids: tuple[int, ...] | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        check_digest("sha256", self.sha256)
        check_number("the number of tokens of the prompt", self.tokens, 1, MOST_TOKENS)

    @classmethod
    def of(cls, ids: Sequence[int]) -> "Prompt":
        """Return the prompt of these token ids."""
        listed = check_ids("the prompt", ids, fewest=1)
        return cls(hashlib.sha256(np.array(listed, dtype="<u4").tobytes()).hexdigest(), len(listed), listed)


@dataclass(frozen=True, kw_only=True, eq=False)
class Receipt:
    """What a server states about one response.

    Args:
        request_id: Name of the request.
        user_seed: Seed of the client; empty where it gave none.
        block_hash: Beacon that became known after the request was accepted.
        prompt: Prompt, with or without its ids.
        output: Ids of the tokens of the response, in order, the one that ended it included.
        sketches: Sketches [S, 12] in float16, of every 32nd token from the first; empty where the engine has none.
        sampling: Parameters of the seeded sampling; None where the engine sampled by itself.
        index: Place among the answers that were asked for with one request.
        chosen_by: Who chose the request id, ``client`` or ``server``. A server that chooses it can try many.
        finish: What ended the response: ``stop``, ``length`` or ``abort``.
        mask: Whether a grammar, or a list of allowed tokens, forbade tokens.
        adapter: LoRA adapter that answered; None where the model did by itself.

    Raises:
        UsageError: A value is out of range; names it.
    """

    request_id: str
    user_seed: str
    block_hash: str
    prompt: Prompt
    output: tuple[int, ...]
    sketches: NDArray[np.float16]
    sampling: Sampling | None
    index: int = 0
    chosen_by: Literal["client", "server"] = "server"
    finish: Literal["stop", "length", "abort"] = "stop"
    mask: bool = False
    adapter: Adapter | None = None

    def __post_init__(self) -> None:
        check_request_texts(user_seed=self.user_seed, request_id=self.request_id)
        check_block_hash(self.block_hash)
        check_number("index", self.index, 0, HIGHEST_INDEX)
        _check_word("chosen_by", self.chosen_by, CHOOSERS)
        _check_word("finish", self.finish, FINISHES)
        if type(self.mask) is not bool:
            raise UsageError(f"mask is {self.mask!r:.60}", wanted="true or false", do="correct mask")
        object.__setattr__(self, "output", check_ids("the output", self.output, fewest=0))
        object.__setattr__(self, "sketches", self._checked_sketches())

    def _checked_sketches(self) -> NDArray[np.float16]:
        given = np.asarray(self.sketches, dtype=np.float16)
        wanted = (len(sketch_steps(len(self.output))), SKETCH_SIZE)
        if given.size == 0:
            return given.reshape(0, SKETCH_SIZE)
        if given.shape != wanted or not np.isfinite(given).all():
            raise UsageError(
                f"sketches for {len(self.output)} tokens, of shape {given.shape}",
                wanted=f"finite numbers of shape {wanted}, or no sketches",
                do=f"sketch the state of every {SKETCH_EVERY}nd token, from the first",
            )
        return given

    @property
    def request(self) -> tuple[str, str, str, int]:
        """What sets the seed apart from those of other responses of this node and model."""
        return self.user_seed, self.request_id, self.block_hash, self.index

    @property
    def seeded(self) -> bool:
        """Whether a replay can measure its tokens: sampled with a seed, and without a mask."""
        return self.sampling is not None and not self.mask

    def without_prompt(self) -> "Receipt":
        """Return the receipt with the hash of the prompt in place of its ids."""
        if self.prompt.ids is None:
            return self
        other = copy.copy(self)  # unlike a new one, it is not checked again
        object.__setattr__(other, "prompt", replace(self.prompt, ids=None))
        return other

    def line(self) -> str:
        """Return the canonical line of the file, without its newline; without an adapter there is no field for it."""
        prompt = self.prompt
        known = {"sha256": prompt.sha256, "tokens": prompt.tokens} if prompt.ids is None else {"ids": list(prompt.ids)}
        values = {
            "request_id": self.request_id,
            "chosen_by": self.chosen_by,
            "index": self.index,
            "user_seed": self.user_seed,
            "block_hash": self.block_hash,
            "sampling": None if self.sampling is None else self.sampling.as_dict(),
            "prompt": known,
            "output": list(self.output),
            "finish": self.finish,
            "mask": self.mask,
            **({} if self.adapter is None else {"adapter": asdict(self.adapter)}),
            "sketches": [encode_vector(sketch) for sketch in self.sketches],
        }
        return dumps(values)


@dataclass(frozen=True, kw_only=True)
class ReceiptHeader:
    """First line of a file of receipts: the node, the model and the engine.

    Args:
        public_key: Key of the node.
        reference: Reference of the model, as the node names it.
        digest: SHA-256 of the tensors of the checkpoint.
        weights: Weight mode of the model: trained, random-all or random-embed.
        fingerprint: Description of the engine; ``seq_len`` is the number of positions that it was made for.
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

    def seed(self, receipt: Receipt) -> ResponseSeed:
        """Return the seed of a response."""
        return ResponseSeed(
            user_seed=receipt.user_seed,
            request_id=receipt.request_id,
            public_key=self.public_key,
            digest=self.digest,
            block_hash=receipt.block_hash,
            index=receipt.index,
        )

    def line(self) -> str:
        """Return the canonical line of the file, without its newline."""
        values = {
            "kind": KIND,
            "schema": SCHEMA,
            "public_key": self.public_key,
            "model": {"reference": self.reference, "digest": self.digest, "weights": self.weights},
            "fingerprint": self.fingerprint.as_dict(),
            "sketch": SKETCH if self.sketched else None,
        }
        return dumps(values)


@dataclass(frozen=True, kw_only=True)
class ReceiptFooter:
    """Last line of a file of receipts.

    Args:
        receipts: Number of the receipts.
        tokens: Number of the tokens of all outputs.
        seconds: Time that the responses took; of a file that was interrupted and continued, that of the last run alone.
        sha256: SHA-256 of the receipt lines, newlines included.
    """

    receipts: int
    tokens: int
    seconds: float
    sha256: str

    def line(self) -> str:
        """Return the canonical line of the file, without its newline."""
        return dumps({"footer": vars(self)})


def check_ids(what: str, ids: Iterable[int], *, fewest: int) -> tuple[int, ...]:
    """Return token ids as a tuple of Python numbers.

    Raises:
        UsageError: There are too few or too many, or one is not a whole number in range.
    """
    listed: tuple[Any, ...] = tuple(ids)  # what a caller passes may be of numpy, or of a file
    plain = not set(map(type, listed)) - {int}  # and mostly is: then nothing is looked at one by one
    if not plain:
        listed = tuple(int(token) if isinstance(token, np.integer) else token for token in listed)
    if not fewest <= len(listed) <= MOST_TOKENS:
        raise UsageError(
            f"{what} of {len(listed)} tokens", wanted=f"{fewest} to {MOST_TOKENS}", do=f"give {what} in token ids"
        )
    if not plain or not 0 <= min(listed, default=0) <= max(listed, default=0) <= HIGHEST_TOKEN:
        for token in listed:
            check_number(f"a token of {what}", token, 0, HIGHEST_TOKEN)
    return listed


def _check_word(name: str, value: object, words: tuple[str, ...]) -> None:
    if not isinstance(value, str) or value not in words:
        raise UsageError(f"{name} is {value!r:.60}", wanted=" or ".join(words), do=f"correct {name}")


T = TypeVar("T")

LONGEST_LINE = 2**25
"""Bytes of the longest line: prompt, output and sketches of the most tokens take 2**24 or less."""

MOST_PARTS = {b",": 2 * MOST_TOKENS + 2**16, b"[": 2**13, b"{": 2**13}
"""How often a character may be in a line."""

MOST_RECEIPTS = 2**20
MOST_FILE_TOKENS = 2**24
"""Tokens of all prompts and outputs of a file: what a reader has to have room for."""

FIELDS = {
    "request_id", "chosen_by", "index", "user_seed", "block_hash", "sampling", "prompt", "output", "finish", "mask",
    "sketches",
}  # fmt: skip


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

    def save(self, path: str | Path, *, overwrite: bool = False) -> None:
        """Write the file; the final name appears when it is whole.

        Raises:
            StorageError: The file cannot be written.
        """
        lines = [self.header.line(), *(receipt.line() for receipt in self.receipts), self.footer.line()]
        write_lines(path, lines, overwrite=overwrite)

    @override
    @classmethod
    def _read(cls, path: str | Path, lines: Iterator[tuple[int, bytes]]) -> Self:
        number, line = next(lines, (1, b""))
        if not line:
            raise line_error(path, number, "the file is empty", "receipts", "check the path, or fetch it again")
        header = parse_header(line, source=path, number=number)
        receipts: list[Receipt] = []
        tally = Tally(header)
        footer = None
        for number, line in lines:
            if footer is not None:
                raise line_error(path, number, "a line after the footer", "the end of the file")
            if line.startswith(b'{"footer":'):
                read = partial(parse_footer, kind=ReceiptFooter)
                footer = parse_line(path, number, line, read, ReceiptFooter.line, MOST_PARTS, LONGEST_LINE)
                wanted = tally.footer(footer.seconds)
                if footer != wanted:
                    seen = f"a footer that does not fit the receipts: {line[:300]!r}"
                    raise line_error(path, number, seen, wanted.line())
                continue
            receipt = parse_receipt(line, source=path, number=number)
            try:
                tally.add(receipt, line[:-1].decode())
            except UsageError as error:
                raise line_error(path, number, error.seen, error.wanted) from None
            receipts.append(receipt)
        if footer is None:
            raise line_error(path, number + 1, "the end of the file", "a footer: the file is truncated")
        return cls(header, tuple(receipts), footer)


class Tally:
    """The footer of a file of receipts, while it grows.

    Args:
        header: Header of the file.
    """

    def __init__(self, header: ReceiptHeader) -> None:
        self._header = header
        self._seen: set[tuple[str, str, str, int]] = set()
        self._tokens = 0
        self._room = MOST_FILE_TOKENS
        self._digest = hashlib.sha256()

    def add(self, receipt: Receipt, line: str) -> None:
        """Count a receipt.

        Args:
            receipt: Receipt.
            line: Line of the receipt, without its newline.

        Raises:
            UsageError: The response has a receipt already, its sketches are not those that the header announces, or
                the file would be too large.
        """
        if receipt.request in self._seen:
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
        self._room -= len(receipt.output) + (receipt.prompt.tokens if receipt.prompt.ids is not None else 0)
        if self._room < 0 or len(self._seen) == MOST_RECEIPTS:
            raise UsageError(
                "too many receipts in one file",
                wanted=f"at most {MOST_RECEIPTS} receipts and {MOST_FILE_TOKENS} tokens",
                do="write several files",
            )
        self._seen.add(receipt.request)
        self._tokens += len(receipt.output)
        self._digest.update(line.encode() + b"\n")

    def footer(self, seconds: float) -> ReceiptFooter:
        """Return the footer of what was counted.

        Args:
            seconds: Time that the responses took.
        """
        return ReceiptFooter(
            receipts=len(self._seen), tokens=self._tokens, seconds=seconds, sha256=self._digest.hexdigest()
        )


def parse_receipt(line: bytes, *, source: str | Path = "receipt", number: int = 1) -> Receipt:
    """Read the line of one receipt.

    Args:
        line: Bytes of the line, with its line end.
        source: Name of the file, for errors.
        number: Number of the line, for errors.

    Raises:
        ProofFormatError: The line is wrong; names the file and the line.
    """
    return parse_line(source, number, line, _parse_receipt, Receipt.line, MOST_PARTS, LONGEST_LINE)


def parse_header(line: bytes, *, source: str | Path = "receipts", number: int = 1) -> ReceiptHeader:
    """Read the header line of a file of receipts; arguments and errors are those of :func:`parse_receipt`."""
    return parse_line(source, number, line, _parse_header, ReceiptHeader.line, MOST_PARTS, LONGEST_LINE)


def _parse_header(line: Any) -> ReceiptHeader:
    check_fields(line, {"kind", "schema", "public_key", "model", "fingerprint", "sketch"}, "the header")
    if line["kind"] != KIND or line["schema"] != SCHEMA:
        raise format_error(
            f"kind {line['kind']!r:.60}, schema {line['schema']!r:.60}", f"kind {KIND!r}, schema {SCHEMA}"
        )
    fingerprint = parse_model(line["model"], line["fingerprint"])
    for name in ("batch_size", "seq_len"):
        if not getattr(fingerprint, name):
            raise format_error(f"{name} is 0", "at least 1")
    if line["sketch"] is not None and line["sketch"] != SKETCH:
        raise format_error(f"sketch is {line['sketch']!r:.60}", f"{json.dumps(SKETCH)} or null")
    return _made(
        lambda: ReceiptHeader(
            public_key=line["public_key"],
            **line["model"],
            fingerprint=fingerprint,
            sketched=line["sketch"] is not None,
        )
    )


def _parse_receipt(line: Any) -> Receipt:
    if line is None:
        raise format_error("the end of the file", "a receipt")
    adapter = line.get("adapter")
    check_fields(line, FIELDS | ({"adapter"} if adapter is not None else set()), "a receipt")
    if adapter is not None:
        check_fields(adapter, {"name", "digest"}, "the adapter")
    for name in ("output", "sketches"):
        if not isinstance(line[name], list):
            raise format_error(f"{name} is {line[name]!r:.60}", "a list")
    sketches = [decode_vector(sketch, SKETCH_SIZE) for sketch in line["sketches"]]
    values = {name: line[name] for name in FIELDS - {"sampling", "prompt", "output", "sketches"}}
    return _made(
        lambda: Receipt(
            **values,
            sampling=None if line["sampling"] is None else _parse_sampling(line["sampling"]),
            prompt=_parse_prompt(line["prompt"]),
            adapter=None if adapter is None else Adapter(**adapter),
            output=tuple(line["output"]),
            sketches=np.array(sketches, dtype=np.float16).reshape(-1, SKETCH_SIZE),
        )
    )


def _parse_prompt(value: Any) -> Prompt:
    if isinstance(value, dict) and isinstance(value.get("ids"), list):
        check_fields(value, {"ids"}, "the prompt")
        return Prompt.of(value["ids"])
    check_fields(value, {"sha256", "tokens"}, "the prompt")
    return Prompt(value["sha256"], value["tokens"])


def _parse_sampling(value: Any) -> Sampling:
    check_fields(value, {*RANGES, "top_k", "logit_bias"}, "sampling")
    return Sampling(**value | {"logit_bias": parse_biases(value["logit_bias"])})


def _made(make: Callable[[], T]) -> T:
    """Return what a constructor makes of values of a file; its error is one of the format."""
    try:
        return make()
    except UsageError as error:
        raise format_error(error.seen, error.wanted) from None
