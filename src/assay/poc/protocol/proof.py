"""A complete proof: what a node hands in and a validator reads."""

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

import numpy as np
from pydantic import FailFast
from typing_extensions import override

from assay.errors import UsageError
from assay.files.jsonl import dumps
from assay.files.storage import write_lines
from assay.poc.protocol.pipelines import get_pipeline
from assay.poc.protocol.record import (
    FOOTER,
    STRICT,
    DistanceRecord,
    Fingerprint,
    Footer,
    Header,
    Record,
    StrictFile,
    Text,
    TokenRecord,
    VectorRecord,
    decode_vector,
    format_error,
    is_distance,
    line_error,
    parse_line,
    read_as,
)
from assay.poc.protocol.round import MAX_COUNT, MAX_NONCE, Round


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
        return np.array(
            [record.distance if isinstance(record, DistanceRecord) else math.nan for record in self.records]
        )

    @property
    def valid_rate(self) -> float:
        """Share of the nonces that are valid."""
        return self.footer.valid / max(1, self.footer.records)

    def save(self, path: str | Path, *, overwrite: bool = False) -> None:
        """Write the proof; the final name appears when the file is whole.

        Raises:
            StorageError: The file cannot be written.
        """
        lines = [_header_line(self.header), *map(self.header.line, self.records), self.footer.line()]
        write_lines(path, lines, overwrite=overwrite)

    @override
    @classmethod
    def _read(cls, path: str | Path, lines: Iterator[tuple[int, bytes]]) -> Self:
        number, line = next(lines, (1, b""))
        header = parse_line(path, number, line, parse_header, _header_line)
        records: list[Record] = []
        digest = hashlib.sha256()
        for nonce in header.all_nonces():
            number, line = next(lines, (number + 1, b""))
            records.append(parse_record_line(path, number, line, header, nonce))
            digest.update(line)
        number, line = next(lines, (number + 1, b""))
        footer = Footer.read(path, number, line)
        proof = cls.build(header, records, footer.seconds, sha256=digest.hexdigest())
        if footer != proof.footer:
            seen = f"a footer that does not fit the records: {footer.line()}"
            raise line_error(path, number, seen, proof.footer.line())
        for number, _ in lines:
            raise line_error(path, number, "a line after the footer", "the end of the file")
        return proof

    @classmethod
    def build(cls, header: Header, records: Sequence[Record], seconds: float, *, sha256: str | None = None) -> Self:
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
            sha256 = hashlib.sha256("".join(f"{header.line(record)}\n" for record in records).encode()).hexdigest()
        valid = sum(header.is_valid(record) for record in records)
        footer = Footer(records=len(records), valid=valid, seconds=seconds, sha256=sha256)
        return cls(header, tuple(records), footer)


@dataclass(frozen=True, kw_only=True)
class ModelLine:
    """What a header says of the model."""

    __pydantic_config__: ClassVar = STRICT

    reference: Text
    digest: Text
    weights: Text


@dataclass(frozen=True, kw_only=True)
class _HeaderLine:
    __pydantic_config__: ClassVar = STRICT

    kind: Literal["assay.poc.proof"]
    schema: Literal[1]
    round: dict[str, Any]
    pipeline: dict[str, Any]
    model: ModelLine
    fingerprint: Fingerprint
    nonces: Annotated[tuple[tuple[int, int, int], ...], FailFast()]


@dataclass(frozen=True, kw_only=True)
class _RecordLine:
    """The line of a nonce. Fields that a pipeline has not are left out, as the bytes of the line are compared."""

    __pydantic_config__: ClassVar = STRICT

    nonce: int
    distance: int | float = math.nan
    valid: bool = False
    vector: str = ""
    tokens: str = ""
    sketches: str = ""


def _header_line(header: Header) -> str:
    return dumps(header.as_dict())


def parse_header(line: bytes) -> Header:
    """Read the header line of a proof.

    Raises:
        AssayError: The line is wrong; names what is.
    """
    read = read_as(_HeaderLine, line)
    if read.round.keys() != Round.__dataclass_fields__.keys():
        odd = ", ".join(sorted(read.round.keys() ^ Round.__dataclass_fields__.keys()))
        raise format_error(f"a round with {odd:.200} missing or unknown", ", ".join(Round.__dataclass_fields__))
    round, fingerprint = Round(**read.round), read.fingerprint
    pipeline = get_pipeline(round.preset)
    if read.pipeline != json.loads(dumps(pipeline.as_dict())):  # tuples become lists
        raise format_error(f"another pipeline than this version's {pipeline.name}", "the same description")
    if read.model.reference != round.model:
        raise format_error("two different model references", "one")
    if fingerprint.seq_len != round.seq_len or fingerprint.batch_size < 1:
        raise format_error(
            f"an engine of {fingerprint.batch_size} × {fingerprint.seq_len} positions",
            f"one for seq_len {round.seq_len}, of at least one row",
        )
    _check_runs(read.nonces, round)
    return Header(
        round=round,
        pipeline=pipeline,
        digest=read.model.digest,
        weights=read.model.weights,
        fingerprint=fingerprint,
        nonces=read.nonces,
    )


def parse_record_line(path: str | Path, number: int, line: bytes, header: Header, nonce: int) -> Record:
    """Read the line of a nonce, line end included.

    Raises:
        ProofFormatError: The line is wrong; names the file and the line.
    """
    if not line or line.startswith(FOOTER):
        wanted = f"the record of nonce {nonce}: the file is truncated"
        raise line_error(path, number, "the end of the records", wanted)
    return parse_line(path, number, line, lambda line: _parse_record(line, header, nonce), header.line)


def _parse_record(line: bytes, header: Header, nonce: int) -> Record:
    read, pipeline = read_as(_RecordLine, line), header.pipeline
    if read.nonce != nonce:
        raise format_error(f"nonce {read.nonce!r:.60}", f"nonce {nonce}, the next one that the header announces")
    if pipeline.output == "vector":
        return VectorRecord(nonce, decode_vector(read.vector, pipeline.vector_size))
    if pipeline.output == "tokens":
        tokens = decode_vector(read.tokens, pipeline.steps, "<u4")
        sketches = decode_vector(read.sketches, pipeline.vector_count * pipeline.vector_size)
        return TokenRecord(nonce, tokens, sketches.reshape(pipeline.vector_count, -1))
    if not is_distance(read.distance):
        raise format_error(f"distance {read.distance!r:.60}", "a number in [0, 2]")
    return DistanceRecord(nonce, float(read.distance))


def _check_runs(runs: Sequence[tuple[int, int, int]], round: Round) -> None:
    """Refuse runs of nonces that do not ascend, or are not of the node of a round."""
    last = -1
    for first, end, step in runs:
        if not (last < first < end and step >= 1):
            raise format_error(f"run {[first, end, step]}", "runs that ascend without doubles")
        last = range(first, end, step)[-1]
        if last > MAX_NONCE:
            raise format_error(f"nonce {last}", f"nonces up to {MAX_NONCE}")
        if first % round.node_count != round.node_id or (last > first and step % round.node_count):
            raise format_error(f"run {[first, end, step]}", f"nonces of node {round.node_id} of {round.node_count}")
    if not 0 < (count := sum(len(range(*run)) for run in runs)) <= MAX_COUNT:
        raise format_error(f"{count} nonces", f"at most {MAX_COUNT} in one proof, and one at least")
