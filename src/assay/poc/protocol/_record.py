"""The parts of a proof file: JSON Lines with a header, one record per nonce, and a footer.

    {"kind":"assay.poc.proof","schema":1,"round":…,"pipeline":…,"model":…,"fingerprint":…,"nonces":…}
    {"nonce":0,"distance":1.4131,"valid":true}        or  {"nonce":0,"vector":"base64"}
    {"footer":{"records":256,"valid":151,"seconds":8.1,"sha256":"…"}}

The SHA-256 covers the bytes of the record lines, newlines included. Reading is strict: anything that is not exactly a
proof, spaces and the order of keys included, is an error that names the line.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import numpy as np

from assay.poc.protocol._fingerprint import Fingerprint
from assay.poc.protocol._pipelines import Pipeline
from assay.poc.protocol._round import Round
from assay.poc.protocol._validity import is_valid
from assay.poc.protocol._vectors import encode_vector
from assay.reports import dumps

__all__ = ["KIND", "SCHEMA", "DistanceRecord", "Footer", "Header", "Record", "VectorRecord"]

KIND = "assay.poc.proof"
SCHEMA = 1


@dataclass(frozen=True, kw_only=True)
class Header:
    """First line of a proof: everything about it that the records do not say.

    Args:
        round: Round, with its model named.
        pipeline: Description of the preset.
        digest: SHA-256 of the tensors of the checkpoint.
        weights: Weight mode of the model: trained, random-all or random-embed.
        fingerprint: Description of the prover's engine.
        nonces: Nonces of the records, in order, as runs ``[first, end, step]``.
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

    def claims(self) -> dict[str, Any]:
        """Return everything that the prover chose and a validator can pin, by the names of :class:`Pins`."""
        return {**self.round.as_dict(), "nonces": self.nonces, "prover_dtype": self.fingerprint.dtype}

    def line(self, record: "Record") -> str:
        """Return the line of a record, without its newline."""
        if isinstance(record, VectorRecord):
            return dumps({"nonce": record.nonce, "vector": encode_vector(record.vector)})
        return dumps({"nonce": record.nonce, "distance": record.distance, "valid": self.is_valid(record)})

    def is_valid(self, record: "Record") -> bool:
        """Return whether a record counts: every vector does, and a distance below the target."""
        return isinstance(record, VectorRecord) or is_valid(record.distance, self.round.r_target)


@dataclass(frozen=True, eq=False)
class DistanceRecord:
    """The result of one nonce under a preset that publishes distances."""

    nonce: int
    distance: float
    vector: ClassVar[None] = None  # `record.vector is None` tells the two kinds apart, for type checkers too


@dataclass(frozen=True, eq=False)
class VectorRecord:
    """The result of one nonce under a preset that publishes vectors: [K] in float16."""

    nonce: int
    vector: np.ndarray


Record = DistanceRecord | VectorRecord


@dataclass(frozen=True, kw_only=True)
class Footer:
    """Last line of a complete proof."""

    records: int
    valid: int
    seconds: float
    sha256: str

    def as_dict(self) -> dict[str, Any]:
        """Return the footer line."""
        return {"footer": {field.name: getattr(self, field.name) for field in fields(self)}}
