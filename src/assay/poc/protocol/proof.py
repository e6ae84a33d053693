"""A complete proof: what a node hands in and a validator reads."""

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Self

import numpy as np
from typing_extensions import override

from assay.errors import AssayError, ProofFormatError, UsageError
from assay.files.jsonl import dumps
from assay.files.storage import write_lines
from assay.poc.protocol.pipelines import get_pipeline
from assay.poc.protocol.record import (
    KIND,
    SCHEMA,
    DistanceRecord,
    Fingerprint,
    Footer,
    Header,
    Record,
    StrictFile,
    TokenRecord,
    VectorRecord,
    check_fields,
    decode_tokens,
    decode_vector,
    format_error,
    is_distance,
    is_valid,
    line_error,
    parse_footer,
    parse_line,
)
from assay.poc.protocol.round import MAX_COUNT, MAX_NAME, MAX_NONCE, Round

LARGEST_SIZE = 2**31 - 1
"""Largest number in a fingerprint."""

_FIELDS = {
    "distance": {"nonce", "distance", "valid"},
    "vector": {"nonce", "vector"},
    "tokens": {"nonce", "tokens", "sketches"},
}
"""Keys of a record line, by what the pipeline publishes."""


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
        first, last = dumps(self.header.as_dict()), dumps(self.footer.as_dict())
        write_lines(path, [first, *map(self.header.line, self.records), last], overwrite=overwrite)

    @override
    @classmethod
    def _read(cls, path: str | Path, lines: Iterator[tuple[int, bytes]]) -> Self:
        number, line = next(lines, (1, b""))
        if not line:
            raise line_error(path, number, "the file is empty", "a proof", "check the path, or fetch the file again")
        header = parse_line(path, number, line, parse_header, lambda header: dumps(header.as_dict()))
        records: list[Record] = []
        digest = hashlib.sha256()
        for nonce in header.all_nonces():
            number, line = next(lines, (number + 1, b""))
            records.append(parse_record_line(path, number, line, header, nonce))
            digest.update(line)
        number, line = next(lines, (number + 1, b""))
        footer = parse_line(path, number, line, _parse_footer, lambda footer: dumps(footer.as_dict()))
        proof = cls.build(header, records, footer.seconds, sha256=digest.hexdigest())
        if footer != proof.footer:
            seen = f"a footer that does not fit the records: {footer.as_dict()}"
            raise line_error(path, number, seen, str(proof.footer.as_dict()))
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


def parse_record_line(path: str | Path, number: int, line: bytes, header: Header, nonce: int) -> Record:
    """Read the line of a nonce, line end included.

    Raises:
        ProofFormatError: The line is wrong; names the file and the line.
    """
    return parse_line(path, number, line, partial(parse_record, header=header, nonce=nonce), header.line)


def parse_header(line: Any) -> Header:
    """Read the header object."""
    check_fields(line, {"kind", "schema", "round", "pipeline", "model", "fingerprint", "nonces"}, "the header")
    if line["kind"] != KIND or line["schema"] != SCHEMA:
        raise format_error(f"kind {line['kind']!r}, schema {line['schema']!r}", f"kind {KIND!r}, schema {SCHEMA}")
    check_fields(line["round"], set(Round.__dataclass_fields__), "the round")
    fingerprint = parse_model(line["model"], line["fingerprint"])
    try:
        round = Round(**line["round"])
        pipeline = get_pipeline(round.preset)
    except AssayError as error:
        raise ProofFormatError(error.seen, wanted=error.wanted, do=error.do) from error
    if line["pipeline"] != json.loads(dumps(pipeline.as_dict())):  # tuples become lists
        raise format_error(f"another pipeline than this version's {pipeline.name}", "the same description")
    if line["model"]["reference"] != round.model:
        raise format_error("two different model references", "one")
    if fingerprint.seq_len != round.seq_len or fingerprint.batch_size < 1:
        raise format_error(
            f"an engine of {fingerprint.batch_size} × {fingerprint.seq_len} positions",
            f"one for seq_len {round.seq_len}, of at least one row",
        )
    return Header(
        round=round,
        pipeline=pipeline,
        digest=line["model"]["digest"],
        weights=line["model"]["weights"],
        fingerprint=fingerprint,
        nonces=_parse_runs(line["nonces"], round),
    )


def parse_model(model: Any, fingerprint: Any) -> Fingerprint:
    """Check the description of a model in a header, and read that of the engine."""
    check_fields(model, {"reference", "digest", "weights"}, "the model")
    for name, value in model.items():
        _check_text(name, value)
    return parse_fingerprint(fingerprint)


def parse_fingerprint(value: Any) -> Fingerprint:
    """Read the description of an engine from a file.

    Raises:
        ProofFormatError: A field is missing, unknown, of another type or out of range.
    """
    check_fields(value, set(Fingerprint.__dataclass_fields__) - {"kernels"}, "the fingerprint")
    for name, part in value.items():
        if name not in ("batch_size", "seq_len", "threads"):
            _check_text(name, part)
        elif type(part) is not int or not 0 <= part <= LARGEST_SIZE:
            raise format_error(f"{name} is {part!r:.60}", f"a whole number in [0, {LARGEST_SIZE}]")
    return Fingerprint.from_dict(value)


def _check_text(name: str, value: object) -> None:
    """Refuse what is not a text that a message can show on a terminal."""
    if not isinstance(value, str) or len(value) > MAX_NAME or not value.isprintable():
        raise format_error(f"{name} is {value!r:.60}", f"a text of at most {MAX_NAME} printable characters")


def parse_record(line: Any, header: Header, nonce: int) -> Record:
    """Read the record of a nonce."""
    pipeline = header.pipeline
    if line is None or (isinstance(line, dict) and "footer" in line):
        raise format_error("the end of the records", f"the record of nonce {nonce}: the file is truncated")
    check_fields(line, _FIELDS[pipeline.output], "a record")
    if line["nonce"] != nonce or type(line["nonce"]) is not int:
        raise format_error(f"nonce {line['nonce']!r}", f"nonce {nonce}, the next one that the header announces")
    if pipeline.output == "vector":
        return VectorRecord(nonce, decode_vector(line["vector"], pipeline.vector_size))
    if pipeline.output == "tokens":
        tokens = decode_tokens(line["tokens"], pipeline.steps)
        sketches = decode_vector(line["sketches"], pipeline.vector_count * pipeline.vector_size)
        return TokenRecord(nonce, tokens, sketches.reshape(pipeline.vector_count, -1))
    distance = line["distance"]
    if type(distance) not in (int, float) or not is_distance(distance):
        raise format_error(f"distance {distance!r}", "a number in [0, 2]")
    if line["valid"] is not is_valid(distance, header.round.r_target):
        raise format_error(f"valid: {line['valid']!r} for distance {distance}", f"distance < {header.round.r_target}")
    return DistanceRecord(nonce, float(distance))


def _parse_runs(runs: Any, round: Round) -> tuple[tuple[int, int, int], ...]:
    well_formed = isinstance(runs, list) and runs and all(isinstance(run, list) and len(run) == 3 for run in runs)
    if not well_formed or any(type(value) is not int for run in runs for value in run):
        raise format_error("nonces that are not runs", "a list of [first, end, step] in whole numbers")
    last = -1
    for first, end, step in runs:
        if not (last < first < end and step >= 1):
            raise format_error(f"run {[first, end, step]}", "runs that ascend without doubles")
        last = range(first, end, step)[-1]
        if last > MAX_NONCE:
            raise format_error(f"nonce {last}", f"nonces up to {MAX_NONCE}")
        if first % round.node_count != round.node_id or (last > first and step % round.node_count):
            raise format_error(f"run {[first, end, step]}", f"nonces of node {round.node_id} of {round.node_count}")
    count = sum(len(range(*run)) for run in runs)
    if count > MAX_COUNT:
        raise format_error(f"{count} nonces", f"at most {MAX_COUNT} in one proof")
    return tuple((first, end, step) for first, end, step in runs)


def _parse_footer(line: Any) -> Footer:
    if line is None:
        raise format_error("the end of the file", "a footer: the proof is not complete")
    return parse_footer(line, Footer)
