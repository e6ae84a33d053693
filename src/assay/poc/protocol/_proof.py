"""A complete proof: what a node hands in and a validator reads."""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from assay.poc.protocol._reader import read_proof
from assay.poc.protocol._record import Footer, Header, Record, VectorRecord
from assay.poc.protocol._round import Round
from assay.reports import PartialFile

__all__ = ["Proof"]


@dataclass(frozen=True, eq=False)
class Proof:
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
        """Distances [N] in float64; NaN where vectors are published."""
        return np.array([math.nan if isinstance(record, VectorRecord) else record.distance for record in self.records])

    @property
    def valid_rate(self) -> float:
        """Share of the nonces that are valid."""
        return self.footer.valid / max(1, self.footer.records)

    def save(self, path: str | Path, *, overwrite: bool = False) -> None:
        """Write the proof; the final name appears when the file is whole.

        Raises:
            StorageError: The file cannot be written.
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
            ProofFormatError: The file is not a complete, consistent proof; the message names the line.
        """
        return cls(*read_proof(path))

    @classmethod
    def build(cls, header: Header, records: Sequence[Record], seconds: float, *, sha256: str | None = None) -> "Proof":
        """Return the proof of these records, with the footer that follows from them.

        Args:
            header: Header of the proof.
            records: Records of all its nonces, in order.
            seconds: Time that the proof took.
            sha256: Hash of the record lines, if the caller has it already.
        """
        if sha256 is None:
            sha256 = hashlib.sha256("".join(f"{header.line(record)}\n" for record in records).encode()).hexdigest()
        valid = sum(header.is_valid(record) for record in records)
        footer = Footer(records=len(records), valid=valid, seconds=round(seconds, 3), sha256=sha256)
        return cls(header, tuple(records), footer)
