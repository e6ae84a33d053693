"""Proof files: JSON Lines with a header, one record per nonce, and a footer.

    {"kind":"assay.poc.proof","schema":1,"round":…,"pipeline":…,"model":…,"fingerprint":…,"nonces":…}
    {"nonce":0,"distance":1.4131,"valid":true}        or  {"nonce":0,"vector":"base64"}
    or {"nonce":0,"tokens":"base64","sketches":"base64"}
    {"footer":{"records":256,"valid":151,"seconds":8.1,"sha256":"…"}}

The SHA-256 covers the bytes of the record lines, newlines included. Reading is strict: anything
that is not exactly a proof, spaces and the order of keys included, is an error that names the line.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Self

import numpy as np
from typing_extensions import override

from assay.errors import UsageError
from assay.files.jsonl import dumps
from assay.poc.protocol.header import Header, parse_header
from assay.poc.protocol.records import Record, RecordLine, published_form
from assay.poc.protocol.round import Round
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


@dataclass(frozen=True, kw_only=True)
class Footer(LastLine):
    """Last line of a complete proof.

    Args:
        records: Number of records.
        valid: Number of those that count; all of them where nothing is called valid.
        seconds: Time that the proof took. Of a proof that was interrupted and continued, that of
            the last run alone.
        sha256: SHA-256 of the record lines.
    """

    __pydantic_config__: ClassVar = STRICT

    records: int
    valid: int
    seconds: Seconds
    sha256: str


@dataclass(frozen=True, eq=False)
class Proof(StrictFile):
    """A complete proof."""

    header: Header
    records: tuple[Record, ...]
    footer: Footer

    @property
    def round(self) -> Round:
        """The round for which it was made."""
        return self.header.round

    @property
    def distances(self) -> np.ndarray:
        """Distances [N] in float64; NaN where something else is published."""
        return np.array([record.distance for record in self.records])

    @property
    def valid_rate(self) -> float:
        """Share of the nonces that are valid."""
        return self.footer.valid / max(1, self.footer.records)

    @override
    def lines(self) -> list[str]:
        return [
            dumps(self.header.as_dict()),
            *map(self.header.line, self.records),
            self.footer.line(),
        ]

    @override
    @classmethod
    def _read(cls, path: str | Path, lines: Iterator[tuple[int, bytes]]) -> Self:
        number, line = next(lines, (1, b""))
        header = parse_line(
            path, number, line, parse_header, lambda header: dumps(header.as_dict())
        )
        records: list[Record] = []
        digest = hashlib.sha256()
        for nonce in header.all_nonces():
            number, line = next(lines, (number + 1, b""))
            records.append(parse_record_line(path, number, line, header, nonce))
            digest.update(line)
        number, line = next(lines, (number + 1, b""))
        footer = Footer.read_end(
            path,
            number,
            line,
            lines,
            lambda seconds: cls.build(header, records, seconds, sha256=digest.hexdigest()).footer,
        )
        return cls(header, tuple(records), footer)

    @classmethod
    def build(
        cls, header: Header, records: Sequence[Record], seconds: float, *, sha256: str | None = None
    ) -> Self:
        """Return the proof of these records, with the footer that follows from them.

        Args:
            header: Header of the proof.
            records: Records of all its nonces, in order.
            seconds: Time that the proof took, as it is written; see :class:`Footer`.
            sha256: Hash of the record lines, if the caller has it already.

        Raises:
            UsageError: The header announces another number of records.
        """
        if len(records) != header.count:
            raise UsageError(
                f"{len(records)} records for {header.count} nonces",
                wanted="one record for each nonce of the header",
                do="compute the nonces that are missing",
            )
        if sha256 is None:
            sha256 = hashlib.sha256(
                "".join(f"{header.line(record)}\n" for record in records).encode()
            ).hexdigest()
        footer = Footer(
            records=len(records),
            valid=sum(map(header.is_valid, records)),
            seconds=seconds,
            sha256=sha256,
        )
        return cls(header, tuple(records), footer)


def parse_record_line(
    path: str | Path, number: int, line: bytes, header: Header, nonce: int
) -> Record:
    """Read the line of a nonce, line end included; a ProofFormatError names file and line."""
    if not line or line.startswith(FOOTER):
        raise line_error(
            path,
            number,
            "the end of the records",
            f"the record of nonce {nonce}: the file is truncated",
        )
    return parse_line(
        path, number, line, lambda line: _parse_record(line, header, nonce), header.line
    )


def _parse_record(line: bytes, header: Header, nonce: int) -> Record:
    fields = read_as(RecordLine, line)
    if fields.nonce != nonce:
        raise format_error(
            f"nonce {fields.nonce!r:.60}", f"nonce {nonce}, the next one that the header announces"
        )
    return published_form(header.pipeline).read(fields, header.pipeline)
