"""Files of receipts: written line by line, read strictly."""

import hashlib
import io
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from assay.errors import UsageError
from assay.poc.protocol import (
    SKETCH_SIZE,
    check_fields,
    decode_vector,
    malformed,
    malformed_line,
    numbered_lines,
    parse_footer,
    parse_line,
    parse_model,
    sketch_steps,
)
from assay.poc.responses._adapters import Adapter
from assay.poc.responses._receipts import (
    KIND,
    MOST_TOKENS,
    SCHEMA,
    SKETCH,
    Prompt,
    Receipt,
    ReceiptFooter,
    ReceiptHeader,
)
from assay.poc.responses._sampling import RANGES, Sampling, biases_of
from assay.reports import PartialFile

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
class Receipts:
    """A complete file of receipts."""

    header: ReceiptHeader
    receipts: tuple[Receipt, ...]
    footer: ReceiptFooter

    @classmethod
    def build(cls, header: ReceiptHeader, receipts: Sequence[Receipt], seconds: float) -> "Receipts":
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
        with PartialFile(path, overwrite=overwrite) as out:
            out.restart()
            out.append_lines([self.header.line()])
            out.append_lines(receipt.line() for receipt in self.receipts)
            out.append_lines([self.footer.line()])
            out.commit()

    @classmethod
    def load(cls, path: str | Path) -> "Receipts":
        """Read and check a file of receipts.

        Raises:
            ProofFormatError: The file is not complete and consistent; the message names the line.
        """
        return cls._read(path, numbered_lines(path))

    @classmethod
    def parse(cls, source: str, content: bytes) -> "Receipts":
        """Read and check receipts that are in memory.

        Args:
            source: Name of the file, for errors.
            content: Bytes of the file.

        Raises:
            ProofFormatError: The content is not complete and consistent; the message names the line.
        """
        return cls._read(source, enumerate(io.BytesIO(content), start=1))

    @classmethod
    def _read(cls, path: str | Path, lines: Iterator[tuple[int, bytes]]) -> "Receipts":
        number, line = next(lines, (1, b""))
        if not line:
            raise malformed_line(path, number, "the file is empty", "receipts", "check the path, or fetch it again")
        header = parse_header(line, source=path, number=number)
        receipts: list[Receipt] = []
        tally = Tally(header)
        footer = None
        for number, line in lines:
            if footer is not None:
                raise malformed_line(path, number, "a line after the footer", "the end of the file")
            if line.startswith(b'{"footer":'):
                footer = _bounded_line(
                    path, number, line, partial(parse_footer, kind=ReceiptFooter), ReceiptFooter.line
                )
                wanted = tally.footer(footer.seconds)
                if footer != wanted:
                    seen = f"a footer that does not fit the receipts: {line[:300]!r}"
                    raise malformed_line(path, number, seen, wanted.line())
                continue
            receipt = parse_receipt(line, source=path, number=number)
            try:
                tally.add(receipt, line[:-1].decode())
            except UsageError as error:
                raise malformed_line(path, number, error.seen, error.wanted) from None
            receipts.append(receipt)
        if footer is None:
            raise malformed_line(path, number + 1, "the end of the file", "a footer: the file is truncated")
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
    return _bounded_line(source, number, line, _parse_receipt, Receipt.line)


def parse_header(line: bytes, *, source: str | Path = "receipts", number: int = 1) -> ReceiptHeader:
    """Read the header line of a file of receipts; arguments and errors are those of :func:`parse_receipt`."""
    return _bounded_line(source, number, line, _parse_header, ReceiptHeader.line)


def _bounded_line(
    path: str | Path, number: int, line: bytes, parse: Callable[[Any], T], write: Callable[[T], str]
) -> T:
    if len(line) > LONGEST_LINE:
        raise malformed_line(path, number, f"a line of {len(line)} bytes", f"at most {LONGEST_LINE}")
    return parse_line(path, number, line, parse, write, MOST_PARTS)


def _parse_header(line: Any) -> ReceiptHeader:
    check_fields(line, {"kind", "schema", "public_key", "model", "fingerprint", "sketch"}, "the header")
    if line["kind"] != KIND or line["schema"] != SCHEMA:
        raise malformed(f"kind {line['kind']!r:.60}, schema {line['schema']!r:.60}", f"kind {KIND!r}, schema {SCHEMA}")
    fingerprint = parse_model(line["model"], line["fingerprint"])
    for name in ("batch_size", "seq_len"):
        if not getattr(fingerprint, name):
            raise malformed(f"{name} is 0", "at least 1")
    if line["sketch"] is not None and line["sketch"] != SKETCH:
        raise malformed(f"sketch is {line['sketch']!r:.60}", f"{json.dumps(SKETCH)} or null")
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
        raise malformed("the end of the file", "a receipt")
    adapter = line.get("adapter")
    check_fields(line, FIELDS | ({"adapter"} if adapter is not None else set()), "a receipt")
    if adapter is not None:
        check_fields(adapter, {"name", "digest"}, "the adapter")
    for name in ("output", "sketches"):
        if not isinstance(line[name], list):
            raise malformed(f"{name} is {line[name]!r:.60}", "a list")
    output = line["output"]
    wanted = len(sketch_steps(len(output)))
    if len(line["sketches"]) not in (0, wanted):
        raise malformed(f"{len(line['sketches'])} sketches for {len(output)} tokens", f"{wanted}, or no sketches")
    sketches = [decode_vector(sketch, SKETCH_SIZE) for sketch in line["sketches"]]
    values = {name: line[name] for name in FIELDS - {"sampling", "prompt", "output", "sketches"}}
    return _made(
        lambda: Receipt(
            **values,
            sampling=None if line["sampling"] is None else _parse_sampling(line["sampling"]),
            prompt=_parse_prompt(line["prompt"]),
            adapter=None if adapter is None else Adapter(**adapter),
            output=tuple(output),
            sketches=np.array(sketches, dtype=np.float16).reshape(-1, SKETCH_SIZE),
        )
    )


def _parse_prompt(value: Any) -> Prompt:
    if isinstance(value, dict) and "ids" in value:
        check_fields(value, {"ids"}, "the prompt")
        if not isinstance(value["ids"], list):
            raise malformed(f"ids of a prompt are {value['ids']!r:.60}", "a list of token ids")
        return Prompt.of(value["ids"])
    check_fields(value, {"sha256", "tokens"}, "the prompt")
    return Prompt(value["sha256"], value["tokens"])


def _parse_sampling(value: Any) -> Sampling:
    check_fields(value, {*RANGES, "top_k", "logit_bias"}, "sampling")
    return Sampling(**value | {"logit_bias": biases_of(value["logit_bias"])})


def _made(make: Callable[[], T]) -> T:
    """Return what a constructor makes of values of a file; its error is one of the format."""
    try:
        return make()
    except UsageError as error:
        raise malformed(error.seen, error.wanted) from None
