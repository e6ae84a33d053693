"""Proof files: JSON Lines with a header, one record per nonce, and a footer.

    {"kind":"assay.poc.proof","schema":1,"round":…,"pipeline":…,"model":…,"fingerprint":…,"nonces":…}
    {"nonce":0,"distance":1.4131,"valid":true}        or  {"nonce":0,"vector":"base64"}
    {"footer":{"records":256,"valid":151,"seconds":8.1,"sha256":"…"}}

The SHA-256 is over the bytes of the record lines, newlines included. Reading is strict: whatever
is not exactly a proof, spaces and the order of keys included, is an error that names the line.
"""

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from assay.poc._pipelines import Pipeline
from assay.poc._round import Round
from assay.poc._vectors import encode_vector
from assay.poc.engines._base import Fingerprint
from assay.reports import PartialFile, dumps

__all__ = ["KIND", "SCHEMA", "Footer", "Header", "Proof", "Record"]

KIND = "assay.poc.proof"
SCHEMA = 1


@dataclass(frozen=True, kw_only=True)
class Header:
    """What a proof says about itself before the first record.

    Args:
        round: the round, with its model named.
        pipeline: the description of the preset.
        digest: SHA-256 of the tensors of the checkpoint.
        weights: weight mode of the model: trained, random-all or random-embed.
        fingerprint: how the prover's engine computes.
        nonces: which nonces follow, in order, as runs ``[first, end, step]``.
    """

    round: Round
    pipeline: Pipeline
    digest: str
    weights: str
    fingerprint: Fingerprint
    nonces: tuple[tuple[int, int, int], ...]

    def as_dict(self) -> dict[str, Any]:
        """Return the header line."""
        return {
            "kind": KIND,
            "schema": SCHEMA,
            "round": self.round.as_dict(),
            "pipeline": self.pipeline.as_dict(),
            "model": {"reference": self.round.model, "digest": self.digest, "weights": self.weights},
            "fingerprint": self.fingerprint.as_dict(),
            "nonces": [list(run) for run in self.nonces],
        }

    def all_nonces(self) -> Iterator[int]:
        """Iterate over the nonces in the order of the records."""
        for run in self.nonces:
            yield from range(*run)

    @property
    def count(self) -> int:
        """Number of records that a complete proof has."""
        return sum(len(range(*run)) for run in self.nonces)

    def line(self, record: "Record") -> str:
        """Return the line of a record, without its newline."""
        if record.vector is not None:
            return dumps({"nonce": record.nonce, "vector": encode_vector(record.vector)})
        return dumps({"nonce": record.nonce, "distance": record.distance, "valid": self.is_valid(record)})

    def is_valid(self, record: "Record") -> bool:
        """Say whether a record's distance is strictly below the target; always for vectors."""
        return record.vector is not None or record.distance < self.round.r_target


@dataclass(frozen=True, eq=False)
class Record:
    """The result of one nonce: a distance, or a vector [K] in float16."""

    nonce: int
    distance: float = math.nan
    vector: np.ndarray | None = None


@dataclass(frozen=True, kw_only=True)
class Footer:
    """What a proof says when it is complete."""

    records: int
    valid: int
    seconds: float
    sha256: str

    def as_dict(self) -> dict[str, Any]:
        """Return the footer line."""
        return {"footer": {field.name: getattr(self, field.name) for field in fields(self)}}


@dataclass(frozen=True, eq=False)
class Proof:
    """A complete proof."""

    header: Header
    records: tuple[Record, ...]
    footer: Footer

    @property
    def round(self) -> Round:
        """The round it was made for."""
        return self.header.round

    @property
    def distances(self) -> np.ndarray:
        """Distances [N] in float64; NaN where vectors are published."""
        return np.array([record.distance for record in self.records])

    @property
    def valid_rate(self) -> float:
        """Share of the nonces that are valid."""
        return self.footer.valid / max(1, self.footer.records)

    def save(self, path: str | Path, *, overwrite: bool = False) -> None:
        """Write the proof; the final name appears when the file is whole.

        Raises:
            StorageError: the file cannot be written.
        """
        with PartialFile(path, overwrite=overwrite) as out:
            out.restart()
            out.append(self.header.as_dict())
            out.append_lines(map(self.header.line, self.records))
            out.append(self.footer.as_dict())
            out.commit()

    @classmethod
    def load(cls, path: str | Path) -> "Proof":
        """Read and check a proof file.

        Raises:
            ProofFormatError: it is not a complete, consistent proof; the message names the line.
        """
        from assay.poc._parse import parse_proof

        return parse_proof(path)

    @classmethod
    def build(cls, header: Header, records: Sequence[Record], seconds: float, *, sha256: str | None = None) -> "Proof":
        """Put a proof together from its records, with the footer that follows from them.

        ``sha256`` is that of the record lines, for a caller who has hashed them already.
        """
        if sha256 is None:
            sha256 = hashlib.sha256("".join(f"{header.line(record)}\n" for record in records).encode()).hexdigest()
        valid = sum(header.is_valid(record) for record in records)
        footer = Footer(records=len(records), valid=valid, seconds=round(seconds, 3), sha256=sha256)
        return cls(header, tuple(records), footer)
